/**
 * What quantizing one layer gave, as bytes: an interrupted run reads the layers it finished and goes on with the next
 * one, with the result it would have had.
 */
import { NibbleError } from "../src/errors.ts";
import type { QuantizedMatrix } from "../src/tensor/quantized.ts";

/** Keeps finished layers, so that a model's size is no matter, and between runs; the key is a file name. */
export interface LayerStore {
  get(key: string): Promise<Uint8Array | undefined>;
  put(key: string, bytes: Uint8Array): Promise<void>;
}

/** Goes up when stored layers are laid out in another way: those of an older version are no use then. */
export const LAYER_FORMAT = 2;

/** Finished layers in memory, codes packed: where there is no disk. */
export function memoryLayerStore(): LayerStore {
  const kept = new Map<string, Uint8Array>();
  return {
    get: async (key) => kept.get(key),
    put: async (key, bytes) => void kept.set(key, bytes),
  };
}

/** One quantized linear as calibration used it. */
export interface LinearRecord {
  readonly matrix: QuantizedMatrix;
  /** (cols) the factor that its inputs were divided by; undefined = none. */
  readonly columnScales: Float64Array | undefined;
  /** (rows) what a later fold divides its outputs by; undefined = nothing. */
  readonly rowScales: Float64Array | undefined;
  /** Undefined for embedding and head. */
  readonly report: LinearReport | undefined;
}

export interface LinearReport {
  /** Mean squared output error on the calibration inputs over the mean squared output. */
  readonly relativeError?: number;
  /** AWQ's exponent, where a fold was found worth it. */
  readonly foldExponent?: number;
  /** No token of the calibration text reached it (an expert of a mixture): it was rounded to nearest. */
  readonly unreached?: true;
}

export interface LayerRecord {
  /** By linear name. */
  readonly linears: Map<string, LinearRecord>;
  /** Float tensors that changed (norm gains, biases), by full tensor name. */
  readonly floats: Map<string, Float32Array>;
}

type TypedArray = Uint8Array | Float32Array | Float64Array;
const constructors = { u8: Uint8Array, f32: Float32Array, f64: Float64Array } as const;
const kindOf = (array: TypedArray): keyof typeof constructors =>
  array instanceof Uint8Array ? "u8" : array instanceof Float32Array ? "f32" : "f64";

interface Header {
  readonly linears: Record<
    string,
    Pick<QuantizedMatrix, "rows" | "cols" | "bits" | "groupSize"> & { scaleBits?: 6 | 8; isTable?: true } & LinearReport
  >;
  /** Name -> [kind, offset, length in elements]; "<linear>/codes", "float/<tensor>". */
  readonly arrays: Record<string, readonly [keyof typeof constructors, number, number]>;
}

/** Arrays start at multiples of this, so that a view of the bytes is aligned for float64. */
const ALIGNMENT = 8;
const HEADER_LENGTH_BYTES = 8;

export function encodeLayer({ linears, floats }: LayerRecord): Uint8Array {
  const arrays: Header["arrays"] = {};
  const parts: TypedArray[] = [];
  let offset = 0;
  const add = (name: string, array: TypedArray | undefined) => {
    if (!array) return;
    (arrays as Record<string, unknown>)[name] = [kindOf(array), offset, array.length];
    parts.push(array);
    offset += Math.ceil(array.byteLength / ALIGNMENT) * ALIGNMENT;
  };
  const heads: Header["linears"] = {};
  for (const [name, { matrix, columnScales, rowScales, report }] of linears) {
    const { rows, cols, bits, groupSize } = matrix;
    heads[name] = { rows, cols, bits, groupSize, scaleBits: matrix.scaleGrid?.bits, ...(report ?? { isTable: true }) };
    add(`${name}/codes`, pack(matrix.codes, bits));
    add(`${name}/scales`, matrix.scales);
    add(`${name}/zeros`, matrix.zeros);
    add(`${name}/factors`, matrix.scaleGrid?.factors);
    add(`${name}/columnScales`, columnScales);
    add(`${name}/rowScales`, rowScales);
  }
  for (const [name, data] of floats) add(`float/${name}`, data);
  const header = new TextEncoder().encode(JSON.stringify({ linears: heads, arrays } satisfies Header));
  const start = HEADER_LENGTH_BYTES + Math.ceil(header.length / ALIGNMENT) * ALIGNMENT;
  const bytes = new Uint8Array(start + offset);
  new DataView(bytes.buffer).setBigUint64(0, BigInt(header.length), true);
  bytes.set(header, HEADER_LENGTH_BYTES);
  let at = start;
  for (const part of parts) {
    bytes.set(new Uint8Array(part.buffer, part.byteOffset, part.byteLength), at);
    at += Math.ceil(part.byteLength / ALIGNMENT) * ALIGNMENT;
  }
  return bytes;
}

/** Codes that share a byte. */
const perByte = (bits: number): number => (bits <= 2 ? 4 : bits <= 4 ? 2 : 1);

/** Codes of up to 4 bits two or four a byte, low bits first. */
function pack(codes: Uint8Array, bits: number): Uint8Array {
  const count = perByte(bits);
  if (count === 1) return codes;
  const width = 8 / count;
  const packed = new Uint8Array(Math.ceil(codes.length / count));
  for (let i = 0; i < codes.length; i++) packed[Math.floor(i / count)] |= codes[i] << ((i % count) * width);
  return packed;
}

function unpack(packed: Uint8Array, bits: number, length: number): Uint8Array {
  const count = perByte(bits);
  if (count === 1) return packed;
  const width = 8 / count;
  const codes = new Uint8Array(length);
  for (let i = 0; i < length; i++)
    codes[i] = (packed[Math.floor(i / count)] >> ((i % count) * width)) & (2 ** width - 1);
  return codes;
}

/** Error `bad_file` when the bytes are no whole record. */
export function decodeLayer(stored: Uint8Array): LayerRecord {
  const bytes = stored.byteOffset % ALIGNMENT === 0 ? stored : stored.slice();
  const broken = () => new NibbleError("bad_file", "A stored layer is damaged; delete the folder of stored layers.");
  if (bytes.length < HEADER_LENGTH_BYTES) throw broken();
  const headerBytes = Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true));
  if (headerBytes > bytes.length - HEADER_LENGTH_BYTES) throw broken();
  const text = new TextDecoder().decode(bytes.subarray(HEADER_LENGTH_BYTES, HEADER_LENGTH_BYTES + headerBytes));
  let header: Header;
  try {
    header = JSON.parse(text);
  } catch {
    throw broken();
  }
  const start = HEADER_LENGTH_BYTES + Math.ceil(headerBytes / ALIGNMENT) * ALIGNMENT;
  const array = (name: string): TypedArray | undefined => {
    const entry = header.arrays[name];
    if (!entry) return undefined;
    const [kind, offset, length] = entry;
    const type = constructors[kind];
    if (start + offset + length * type.BYTES_PER_ELEMENT > bytes.length) throw broken();
    return new type(bytes.buffer as ArrayBuffer, bytes.byteOffset + start + offset, length);
  };
  const linears = new Map<string, LinearRecord>();
  for (const [name, head] of Object.entries(header.linears)) {
    const { rows, cols, bits, groupSize, scaleBits, isTable, ...report } = head;
    const packed = array(`${name}/codes`) as Uint8Array | undefined;
    const scales = array(`${name}/scales`) as Float32Array | undefined;
    const zeros = array(`${name}/zeros`) as Uint8Array | undefined;
    const factors = array(`${name}/factors`) as Float32Array | undefined;
    if (packed?.length !== Math.ceil((rows * cols) / perByte(bits))) throw broken();
    if (!scales || (scaleBits && !factors)) throw broken();
    const codes = unpack(packed, bits, rows * cols);
    const scaleGrid = scaleBits && factors && { bits: scaleBits, factors };
    linears.set(name, {
      matrix: { rows, cols, bits, groupSize, codes, scales, zeros, ...(scaleGrid && { scaleGrid }) },
      columnScales: array(`${name}/columnScales`) as Float64Array | undefined,
      rowScales: array(`${name}/rowScales`) as Float64Array | undefined,
      report: isTable ? undefined : report,
    });
  }
  const floats = new Map<string, Float32Array>();
  for (const name of Object.keys(header.arrays)) {
    if (name.startsWith("float/")) floats.set(name.slice("float/".length), array(name) as Float32Array);
  }
  return { linears, floats };
}
