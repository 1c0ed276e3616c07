/**
 * GGUF v2 and v3 (github.com/ggml-org/ggml, docs/gguf.md): magic, version, counts, metadata, tensor infos, aligned data.
 * Every count and length is compared with what is left of the file before anything is allocated for it.
 */
import { NibbleError } from "../errors.ts";
import { type ByteSource, badFile } from "../files.ts";
import { GGML_TYPES, type GgmlType, typeById } from "./ggml-types.ts";

/** A metadata value; 64-bit integers that a double cannot hold are bigints. */
export type GgufValue = number | bigint | boolean | string | readonly GgufValue[];

export interface GgufTensor {
  readonly name: string;
  readonly type: GgmlType;
  /** Row-major, outermost first: the reverse of what the file says. */
  readonly shape: readonly number[];
  /** From the start of the file. */
  readonly offset: number;
  readonly sizeBytes: number;
}

export interface Gguf {
  readonly version: number;
  readonly metadata: ReadonlyMap<string, GgufValue>;
  readonly tensors: ReadonlyMap<string, GgufTensor>;
}

/** ggml's own limit on dimensions. */
const MAX_DIMS = 4;
/** Header of gemma3, 262,144 tokens with scores and types: 15 MB. */
const MAX_HEADER_BYTES = 256 * 2 ** 20;
const MAX_ARRAY_ITEMS = 2 ** 24;
const MAX_NESTING = 4;
const MAX_ALIGNMENT = 2 ** 20;
const FIRST_READ_BYTES = 2 ** 20;

/** Metadata value types, by their number in the file. */
export const VALUE_TYPES = [
  "u8",
  "i8",
  "u16",
  "i16",
  "u32",
  "i32",
  "f32",
  "bool",
  "string",
  "array",
  "u64",
  "i64",
  "f64",
] as const;
export type GgufValueType = (typeof VALUE_TYPES)[number];

/** Least bytes that one value takes, to compare an array's count with the file before reading it. */
const LEAST_BYTES: Readonly<Record<GgufValueType, number>> = {
  u8: 1,
  i8: 1,
  u16: 2,
  i16: 2,
  u32: 4,
  i32: 4,
  f32: 4,
  bool: 1,
  string: 8,
  array: 12,
  u64: 8,
  i64: 8,
  f64: 8,
};

/** Reads and checks everything before the tensor data; errors: `bad_file`, `unsupported`. */
export async function readGguf(source: ByteSource): Promise<Gguf> {
  // the header's length stands nowhere: read a piece, and twice as much whenever it was too short
  for (let length = Math.min(FIRST_READ_BYTES, source.sizeBytes); ; ) {
    try {
      return parseHeader(new Cursor(await source.read(0, length), source));
    } catch (error) {
      if (!(error instanceof TooShort)) throw error;
      if (length === source.sizeBytes)
        throw badFile(source, "the file ends within its header; was the download cut off?");
      if (length >= MAX_HEADER_BYTES) throw badFile(source, `its header is longer than ${MAX_HEADER_BYTES} bytes`);
      length = Math.min(Math.max(2 * length, error.wanted), MAX_HEADER_BYTES, source.sizeBytes);
    }
  }
}

/** The bytes at hand end before the header does. */
class TooShort extends Error {
  constructor(readonly wanted: number) {
    super("the piece of the header that was read is too short");
  }
}

class Cursor {
  private at = 0;
  private readonly view: DataView;
  private readonly text = new TextDecoder(); // tokens may be cut inside a character: not fatal

  constructor(
    private readonly bytes: Uint8Array,
    readonly source: ByteSource,
  ) {
    this.view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  }

  get position(): number {
    return this.at;
  }

  /** Moves over `length` bytes, which have to be in the file, and returns where they begin. */
  take(length: number, what: string): number {
    if (length > this.source.sizeBytes - this.at) {
      throw badFile(
        this.source,
        `${what} at byte ${this.at} needs ${length} bytes, but the file ends at ${this.source.sizeBytes}; was the download cut off?`,
      );
    }
    if (this.at + length > this.bytes.length) throw new TooShort(this.at + length);
    const start = this.at;
    this.at += length;
    return start;
  }

  u32(what: string): number {
    return this.view.getUint32(this.take(4, what), true);
  }

  /** A u64 that counts something: refused where a double cannot hold it. */
  count(what: string): number {
    const value = this.view.getBigUint64(this.take(8, what), true);
    if (value <= BigInt(Number.MAX_SAFE_INTEGER)) return Number(value);
    throw badFile(this.source, `${what} is ${value}`);
  }

  /** Says at once whether `items` of at least `bytes` each can still follow. */
  fits(items: number, bytes: number, what: string): void {
    if (items * bytes <= this.source.sizeBytes - this.at) return;
    throw badFile(
      this.source,
      `${what} is ${items}, more than the file of ${this.source.sizeBytes} bytes can hold; was the download cut off?`,
    );
  }

  string(what: string): string {
    const length = this.count(`the length of ${what}`);
    const start = this.take(length, what);
    return this.text.decode(this.bytes.subarray(start, start + length));
  }

  valueType(what: string): GgufValueType {
    const id = this.u32(what);
    if (id < VALUE_TYPES.length) return VALUE_TYPES[id];
    throw badFile(this.source, `${what} has the unknown type ${id}`);
  }

  value(type: GgufValueType, what: string, depth = 0): GgufValue {
    const { view } = this;
    switch (type) {
      case "u8":
        return view.getUint8(this.take(1, what));
      case "i8":
        return view.getInt8(this.take(1, what));
      case "u16":
        return view.getUint16(this.take(2, what), true);
      case "i16":
        return view.getInt16(this.take(2, what), true);
      case "u32":
        return view.getUint32(this.take(4, what), true);
      case "i32":
        return view.getInt32(this.take(4, what), true);
      case "f32":
        return view.getFloat32(this.take(4, what), true);
      case "f64":
        return view.getFloat64(this.take(8, what), true);
      case "u64":
        return safeNumber(view.getBigUint64(this.take(8, what), true));
      case "i64":
        return safeNumber(view.getBigInt64(this.take(8, what), true));
      case "bool": {
        const byte = view.getUint8(this.take(1, what));
        if (byte <= 1) return byte === 1;
        throw badFile(this.source, `${what} is a bool with the value ${byte}`);
      }
      case "string":
        return this.string(what);
      case "array": {
        if (depth === MAX_NESTING) throw badFile(this.source, `${what} nests arrays deeper than ${MAX_NESTING}`);
        const itemType = this.valueType(what);
        const length = this.count(`the length of ${what}`);
        this.fits(length, LEAST_BYTES[itemType], `the length of ${what}`);
        if (length > MAX_ARRAY_ITEMS)
          throw badFile(this.source, `${what} has ${length} items, above ${MAX_ARRAY_ITEMS}`);
        const items: GgufValue[] = [];
        for (let i = 0; i < length; i++) items.push(this.value(itemType, what, depth + 1));
        return items;
      }
    }
  }
}

function safeNumber(value: bigint): number | bigint {
  const number = Number(value);
  return Number.isSafeInteger(number) ? number : value;
}

function parseHeader(cursor: Cursor): Gguf {
  const { source } = cursor;
  if (cursor.u32("the magic") !== 0x46554747) throw badFile(source, 'it does not begin with "GGUF"');
  const version = cursor.u32("the version");
  if (version !== 2 && version !== 3) {
    const found = version > 0xffff ? "a big-endian file" : `GGUF version ${version}`;
    throw new NibbleError("unsupported", `${source.name} is ${found}; Nibble reads little-endian versions 2 and 3.`);
  }
  const tensorCount = cursor.count("the tensor count");
  const entryCount = cursor.count("the metadata count");
  cursor.fits(tensorCount, 24, "the tensor count"); // name length, dimensions, type, offset
  cursor.fits(entryCount, 13, "the metadata count"); // key length, type, one byte
  const metadata = new Map<string, GgufValue>();
  for (let i = 0; i < entryCount; i++) {
    const key = cursor.string(`metadata key ${i}`);
    if (metadata.has(key)) throw badFile(source, `metadata key "${key}" occurs twice`);
    metadata.set(key, cursor.value(cursor.valueType(`metadata "${key}"`), `metadata "${key}"`));
  }
  const tensors: GgufTensor[] = [];
  for (let i = 0; i < tensorCount; i++) tensors.push(readTensorInfo(cursor, i));
  return { version, metadata, tensors: placeTensors(tensors, alignmentOf(metadata, source), cursor) };
}

function alignmentOf(metadata: ReadonlyMap<string, GgufValue>, source: ByteSource): number {
  const alignment = metadata.get("general.alignment") ?? 32;
  const isPowerOfTwo = typeof alignment === "number" && alignment > 0 && (alignment & (alignment - 1)) === 0;
  if (isPowerOfTwo && alignment <= MAX_ALIGNMENT) return alignment;
  throw badFile(source, `general.alignment is ${alignment}; it has to be a power of two up to ${MAX_ALIGNMENT}`);
}

function readTensorInfo(cursor: Cursor, index: number): GgufTensor {
  const { source } = cursor;
  const name = cursor.string(`the name of tensor ${index}`);
  const what = `tensor "${name}"`;
  const dims = cursor.u32(what);
  if (dims > MAX_DIMS) throw badFile(source, `${what} has ${dims} dimensions, above ${MAX_DIMS}`);
  const shape: number[] = [];
  for (let i = 0; i < dims; i++) shape.unshift(cursor.count(what));
  if (shape.includes(0)) throw badFile(source, `${what} has the shape [${shape}]`);
  const id = cursor.u32(what);
  const type = typeById(id);
  if (!type) throw badFile(source, `${what} has the unknown type ${id}`);
  const { blockSize, blockBytes } = GGML_TYPES[type];
  const rowLength = shape.at(-1) ?? 1;
  if (rowLength % blockSize !== 0) {
    throw badFile(source, `${what} has rows of ${rowLength}, but ${type} comes in blocks of ${blockSize}`);
  }
  const blocks = shape.slice(0, -1).reduce((product, dim) => product * BigInt(dim), BigInt(rowLength / blockSize));
  const sizeBytes = blocks * BigInt(blockBytes);
  if (sizeBytes > BigInt(source.sizeBytes)) {
    throw badFile(source, `${what} ${type} [${shape}] needs ${sizeBytes} bytes, but the file has ${source.sizeBytes}`);
  }
  return { name, type, shape, offset: cursor.count(what), sizeBytes: Number(sizeBytes) };
}

/** Offsets count from the aligned end of the header; they have to be aligned, inside the file and apart. */
function placeTensors(relative: readonly GgufTensor[], alignment: number, cursor: Cursor): Map<string, GgufTensor> {
  const { source, position } = cursor;
  const dataStart = Math.ceil(position / alignment) * alignment;
  const placed = new Map<string, GgufTensor>();
  let end = dataStart;
  for (const tensor of [...relative].sort((a, b) => a.offset - b.offset || a.sizeBytes - b.sizeBytes)) {
    const { name, sizeBytes } = tensor;
    const offset = dataStart + tensor.offset;
    if (placed.has(name)) throw badFile(source, `tensor "${name}" occurs twice`);
    if (tensor.offset % alignment !== 0) {
      throw badFile(source, `tensor "${name}" begins at ${tensor.offset}, no multiple of the alignment ${alignment}`);
    }
    if (offset + sizeBytes > source.sizeBytes) {
      throw badFile(
        source,
        `tensor "${name}" ends at byte ${offset + sizeBytes}, but the file has ${source.sizeBytes}; was the download cut off?`,
      );
    }
    if (offset < end) throw badFile(source, `tensor "${name}" overlaps the one before it`);
    end = offset + sizeBytes;
    placed.set(name, { ...tensor, offset });
  }
  // in the file's order
  return new Map(relative.map(({ name }) => [name, placed.get(name)!]));
}
