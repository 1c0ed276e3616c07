/** Element types that checkpoints store and ONNX tensors hold, with conversion to and from float32. */

export type DType =
  | "f64"
  | "f32"
  | "f16"
  | "bf16"
  | "f8_e4m3"
  | "f8_e5m2"
  | "i64"
  | "i32"
  | "i16"
  | "i8"
  | "u64"
  | "u32"
  | "u16"
  | "u8"
  | "bool";

/** Bytes per element. */
export const sizeOf: Readonly<Record<DType, number>> = {
  f64: 8,
  f32: 4,
  f16: 2,
  bf16: 2,
  f8_e4m3: 1,
  f8_e5m2: 1,
  i64: 8,
  i32: 4,
  i16: 2,
  i8: 1,
  u64: 8,
  u32: 4,
  u16: 2,
  u8: 1,
  bool: 1,
};

/** A float32 tensor, row-major. */
export interface FloatTensor {
  readonly shape: readonly number[];
  readonly data: Float32Array;
}

export function elementCount(shape: readonly number[]): number {
  return shape.reduce((product, dim) => product * dim, 1);
}

/** float16 bit pattern -> float32 value, for all 65,536 patterns (IEEE 754 binary16). */
let f16Table: Float32Array | undefined;

function halfTable(): Float32Array {
  if (f16Table) return f16Table;
  const table = new Float32Array(65536);
  for (let bits = 0; bits < 65536; bits++) {
    const sign = bits & 0x8000 ? -1 : 1;
    const exponent = (bits >> 10) & 0x1f;
    const mantissa = bits & 0x3ff;
    if (exponent === 0) table[bits] = sign * mantissa * 2 ** -24;
    else if (exponent === 31) table[bits] = mantissa ? Number.NaN : sign * Number.POSITIVE_INFINITY;
    else table[bits] = sign * (1 + mantissa / 1024) * 2 ** (exponent - 15);
  }
  f16Table = table;
  return table;
}

export function f16ToF32(halves: Uint16Array, out = new Float32Array(halves.length)): Float32Array {
  const table = halfTable();
  for (let i = 0; i < halves.length; i++) out[i] = table[halves[i]];
  return out;
}

const f32Scratch = new Float32Array(1);
const u32Scratch = new Uint32Array(f32Scratch.buffer);

/** One float32 value as a float16 bit pattern, rounded to nearest even, overflowing to infinity. */
export function toF16Bits(value: number): number {
  f32Scratch[0] = value;
  const bits = u32Scratch[0];
  const sign = (bits >>> 16) & 0x8000;
  const magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00; // NaN
  if (magnitude >= 0x477ff000) return sign | 0x7c00; // rounds to 2^16 or beyond
  if (magnitude < 0x38800000) {
    // subnormal: the value in units of 2^-24, to nearest even
    const units = Math.abs(f32Scratch[0]) * 2 ** 24;
    const floor = Math.floor(units);
    const rest = units - floor;
    return sign | (rest > 0.5 || (rest === 0.5 && floor & 1) ? floor + 1 : floor);
  }
  const rounded = magnitude + 0xfff + ((magnitude >>> 13) & 1);
  return sign | ((rounded - 0x38000000) >>> 13);
}

export function f32ToF16(values: Float32Array, out = new Uint16Array(values.length)): Uint16Array {
  for (let i = 0; i < values.length; i++) out[i] = toF16Bits(values[i]);
  return out;
}

export function bf16ToF32(halves: Uint16Array, out = new Float32Array(halves.length)): Float32Array {
  const bits = new Uint32Array(out.buffer, out.byteOffset, out.length);
  for (let i = 0; i < halves.length; i++) bits[i] = halves[i] << 16;
  return out;
}

/** float8 bit pattern -> value: e4m3 (no infinities, 0x7f is NaN) and e5m2 (OCP 8-bit floating point specification). */
function f8Value(bits: number, exponentBits: 4 | 5): number {
  const mantissaBits = 7 - exponentBits;
  const bias = 2 ** (exponentBits - 1) - 1;
  const sign = bits & 0x80 ? -1 : 1;
  const exponent = (bits & 0x7f) >> mantissaBits;
  const mantissa = bits & (2 ** mantissaBits - 1);
  if (exponentBits === 4 && (bits & 0x7f) === 0x7f) return Number.NaN;
  if (exponentBits === 5 && exponent === 31) return mantissa ? Number.NaN : sign * Number.POSITIVE_INFINITY;
  if (exponent === 0) return (sign * mantissa * 2 ** (1 - bias)) / 2 ** mantissaBits;
  return sign * (1 + mantissa / 2 ** mantissaBits) * 2 ** (exponent - bias);
}

/** Stored bytes (little-endian, any float or integer dtype) as float32 values. */
export function toFloat32(bytes: Uint8Array, dtype: DType): Float32Array {
  const count = bytes.byteLength / sizeOf[dtype];
  const aligned = bytes.byteOffset % sizeOf[dtype] === 0 ? bytes : bytes.slice();
  const { buffer, byteOffset } = aligned;
  switch (dtype) {
    case "f32":
      return new Float32Array(buffer, byteOffset, count);
    case "f16":
      return f16ToF32(new Uint16Array(buffer, byteOffset, count));
    case "bf16":
      return bf16ToF32(new Uint16Array(buffer, byteOffset, count));
    case "f64":
      return Float32Array.from(new Float64Array(buffer, byteOffset, count));
    case "f8_e4m3":
      return Float32Array.from(aligned, (bits) => f8Value(bits, 4));
    case "f8_e5m2":
      return Float32Array.from(aligned, (bits) => f8Value(bits, 5));
    case "i64":
      return Float32Array.from(new BigInt64Array(buffer, byteOffset, count), Number);
    case "u64":
      return Float32Array.from(new BigUint64Array(buffer, byteOffset, count), Number);
    case "i32":
      return Float32Array.from(new Int32Array(buffer, byteOffset, count));
    case "u32":
      return Float32Array.from(new Uint32Array(buffer, byteOffset, count));
    case "i16":
      return Float32Array.from(new Int16Array(buffer, byteOffset, count));
    case "u16":
      return Float32Array.from(new Uint16Array(buffer, byteOffset, count));
    case "i8":
      return Float32Array.from(new Int8Array(buffer, byteOffset, count));
    case "u8":
    case "bool":
      return Float32Array.from(aligned);
  }
}
