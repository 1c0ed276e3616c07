/**
 * safetensors, read and written: u64 header length, JSON header { name: { dtype, shape, data_offsets } }, data.
 * Every number of the header is checked against the file before it is used; the rules are those of the reference
 * implementation (github.com/huggingface/safetensors): no overlap, no hole, no byte that no tensor owns.
 */
import { NibbleError } from "../errors.ts";
import { type ByteSink, type ByteSource, badFile } from "../files.ts";
import { type DType, sizeOf } from "../tensor/dtypes.ts";
import { duplicateKeys, isJsonObject, type JsonObject } from "./json.ts";

/** The reference implementation's limit on the header. */
const MAX_HEADER_BYTES = 100_000_000;

const DTYPES: Readonly<Record<string, DType>> = {
  F64: "f64",
  F32: "f32",
  F16: "f16",
  BF16: "bf16",
  F8_E4M3: "f8_e4m3",
  F8_E5M2: "f8_e5m2",
  I64: "i64",
  I32: "i32",
  I16: "i16",
  I8: "i8",
  U64: "u64",
  U32: "u32",
  U16: "u16",
  U8: "u8",
  BOOL: "bool",
};

/** Types of the format that no model Nibble computes is stored in. */
const FOREIGN_DTYPES = ["F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64"];

export interface SafetensorsTensor {
  readonly name: string;
  readonly dtype: DType;
  readonly shape: readonly number[];
  /** From the start of the file. */
  readonly offset: number;
  readonly sizeBytes: number;
}

export interface SafetensorsHeader {
  readonly tensors: ReadonlyMap<string, SafetensorsTensor>;
  readonly metadata: Readonly<Record<string, string>>;
}

/** Reads and checks the header of a safetensors file; errors: `bad_file`, `unsupported` for a foreign dtype. */
export async function readSafetensorsHeader(source: ByteSource): Promise<SafetensorsHeader> {
  const bad = (found: string) => badFile(source, found);
  if (source.sizeBytes < 8) {
    throw bad(`${source.sizeBytes} bytes are too few for a safetensors file; was the download cut off?`);
  }
  const lengthBytes = await source.read(0, 8);
  const declared = new DataView(lengthBytes.buffer, lengthBytes.byteOffset, 8).getBigUint64(0, true);
  if (declared > BigInt(MAX_HEADER_BYTES)) {
    throw bad(`its first 8 bytes say the header has ${declared} bytes, above the limit of ${MAX_HEADER_BYTES}`);
  }
  const headerBytes = Number(declared);
  const dataStart = 8 + headerBytes;
  if (dataStart > source.sizeBytes) {
    throw bad(`its header says ${headerBytes} bytes, but the file has ${source.sizeBytes} in all`);
  }
  const header = parseHeader(await source.read(8, headerBytes), bad);
  const tensors = Object.entries(header)
    .filter(([name]) => name !== "__metadata__")
    .map(([name, entry]) => readEntry(name, entry, dataStart, source.sizeBytes, bad))
    .sort((a, b) => a.offset - b.offset || a.sizeBytes - b.sizeBytes);

  let end = dataStart;
  for (const tensor of tensors) {
    if (tensor.offset < end) throw bad(`tensor "${tensor.name}" overlaps the one before it`);
    if (tensor.offset > end) throw bad(`${tensor.offset - end} bytes before tensor "${tensor.name}" belong to none`);
    end += tensor.sizeBytes;
  }
  if (end !== source.sizeBytes) throw bad(`${source.sizeBytes - end} bytes after the last tensor belong to none`);
  return { tensors: new Map(tensors.map((tensor) => [tensor.name, tensor])), metadata: readMetadata(header, bad) };
}

type Bad = (found: string) => NibbleError;
function parseHeader(bytes: Uint8Array, bad: Bad): JsonObject {
  let text: string;
  let header: unknown;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
    header = JSON.parse(text);
  } catch (cause) {
    throw bad(`its header is no JSON (${(cause as Error).message})`);
  }
  if (!isJsonObject(header)) throw bad("its header is JSON but no object");
  const [duplicate] = duplicateKeys(text);
  if (duplicate !== undefined) throw bad(`its header names "${duplicate}" twice`);
  return header;
}

function readEntry(name: string, entry: unknown, dataStart: number, fileBytes: number, bad: Bad): SafetensorsTensor {
  if (!isJsonObject(entry)) throw bad(`tensor "${name}" is described by ${JSON.stringify(entry)} instead of an object`);
  const dtype = typeof entry.dtype === "string" && Object.hasOwn(DTYPES, entry.dtype) ? DTYPES[entry.dtype] : undefined;
  if (!dtype) {
    const known = Object.keys(DTYPES).join(", ");
    const code = FOREIGN_DTYPES.includes(String(entry.dtype)) ? "unsupported" : "bad_file";
    throw new NibbleError(
      code,
      bad(`tensor "${name}" has dtype ${JSON.stringify(entry.dtype)}; Nibble reads ${known}`).message,
      {
        param: name,
      },
    );
  }
  const { shape, data_offsets: offsets } = entry;
  if (!isCounts(shape)) throw bad(`tensor "${name}" has the shape ${JSON.stringify(shape)}`);
  if (!isCounts(offsets) || offsets.length !== 2 || offsets[0] > offsets[1]) {
    throw bad(`tensor "${name}" has the data_offsets ${JSON.stringify(offsets)}`);
  }
  const sizeBytes = offsets[1] - offsets[0];
  // dims are up to 2^53 each: their product is taken in BigInt
  const wanted = shape.reduce((product, dim) => product * BigInt(dim), BigInt(sizeOf[dtype]));
  if (wanted !== BigInt(sizeBytes)) {
    throw bad(`tensor "${name}" ${entry.dtype} [${shape}] needs ${wanted} bytes, its data_offsets give ${sizeBytes}`);
  }
  if (offsets[1] > fileBytes - dataStart) {
    throw bad(
      `tensor "${name}" ends at byte ${offsets[1]} of the data, but the file holds ${fileBytes - dataStart}; ` +
        "was the download cut off?",
    );
  }
  return { name, dtype, shape, offset: dataStart + offsets[0], sizeBytes };
}

function isCounts(value: unknown): value is number[] {
  return Array.isArray(value) && value.every((count) => Number.isSafeInteger(count) && count >= 0);
}

function readMetadata(header: JsonObject, bad: Bad): Record<string, string> {
  const metadata = header.__metadata__ ?? {};
  if (!isJsonObject(metadata) || !Object.values(metadata).every((value) => typeof value === "string")) {
    throw bad("its __metadata__ is no map of strings");
  }
  return metadata as Record<string, string>;
}

/** A tensor to write: `bytes` little-endian, of the size that dtype and shape say. */
export interface TensorToWrite {
  readonly name: string;
  readonly dtype: DType;
  readonly shape: readonly number[];
  readonly bytes: () => Uint8Array | Promise<Uint8Array>;
}

/** Writes tensors one after the other, in the order given; data begins at a multiple of 8 as the format advises. */
export async function writeSafetensors(
  sink: ByteSink,
  tensors: readonly TensorToWrite[],
  metadata: Readonly<Record<string, string>> = { format: "pt" },
): Promise<void> {
  const header: Record<string, unknown> = { __metadata__: metadata };
  let end = 0;
  for (const { name, dtype, shape } of tensors) {
    const start = end;
    end += shape.reduce((product, dim) => product * dim, sizeOf[dtype]);
    header[name] = { dtype: dtype.toUpperCase(), shape, data_offsets: [start, end] };
  }
  const json = new TextEncoder().encode(JSON.stringify(header));
  const head = new Uint8Array(8 + Math.ceil(json.length / 8) * 8).fill(0x20); // padded with spaces
  new DataView(head.buffer).setBigUint64(0, BigInt(head.length - 8), true);
  head.set(json, 8);
  await sink.write(head);
  for (const { name, dtype, shape, bytes } of tensors) {
    const data = await bytes();
    const wanted = shape.reduce((product, dim) => product * dim, sizeOf[dtype]);
    if (data.byteLength !== wanted) {
      throw new NibbleError(
        "bad_option",
        `tensor "${name}" ${dtype} [${shape}] needs ${wanted} bytes, not ${data.byteLength}.`,
      );
    }
    await sink.write(data);
  }
  await sink.close();
}
