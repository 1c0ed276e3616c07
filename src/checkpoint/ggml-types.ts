/**
 * Tensor types of GGUF: how many values a block holds, how many bytes it takes, and what the bytes are worth.
 * Layouts are those of ggml's block structs; the arithmetic rounds to float32 where ggml does, so values are equal
 * bit for bit. In the K types a super-block of 256 values shares one or two float16 scales, and each sub-block has a
 * small integer scale (and minimum) of its own.
 */
import { f16ToF32, toFloat32 } from "../tensor/dtypes.ts";

/** Writes `count` blocks as float32 values. */
type Dequantize = (bytes: Uint8Array, count: number, out: Float32Array) => void;

interface GgmlTypeInfo {
  readonly id: number;
  readonly blockSize: number;
  readonly blockBytes: number;
  /** Absent: the type exists, but Nibble does not compute it. */
  readonly dequantize?: Dequantize;
}

const { fround } = Math;
/** Values of a super-block. */
const QK = 256;

const half = new Uint16Array(1);
const halfValue = new Float32Array(1);
function f16At(bytes: Uint8Array, at: number): number {
  half[0] = bytes[at] | (bytes[at + 1] << 8);
  return f16ToF32(half, halfValue)[0];
}

const signed = (byte: number): number => (byte << 24) >> 24;

function plain(dtype: Parameters<typeof toFloat32>[1]): Dequantize {
  return (bytes, _, out) => out.set(toFloat32(bytes, dtype));
}

/** Q4_0, Q5_0 (offset by half the range) and Q4_1, Q5_1 (with a minimum): 32 values, low nibbles first. */
function dequantizeLegacy(bits: 4 | 5, hasMinimum: boolean): Dequantize {
  const headBytes = hasMinimum ? 4 : 2;
  const blockBytes = headBytes + (bits === 5 ? 4 : 0) + 16;
  const middle = hasMinimum ? 0 : 2 ** (bits - 1);
  return (bytes, count, out) => {
    for (let block = 0; block < count; block++) {
      const at = block * blockBytes;
      const scale = f16At(bytes, at);
      const minimum = hasMinimum ? f16At(bytes, at + 2) : 0;
      const high = at + headBytes; // (4) one fifth bit per value
      const low = at + blockBytes - 16; // (16) two nibbles a byte: value i and value i + 16
      for (let i = 0; i < 32; i++) {
        const byte = bytes[low + (i & 15)];
        let code = i < 16 ? byte & 15 : byte >> 4;
        if (bits === 5) code |= ((bytes[high + (i >> 3)] >> (i & 7)) & 1) << 4;
        out[block * 32 + i] = fround(scale * (code - middle)) + minimum;
      }
    }
  };
}

const q8_0: Dequantize = (bytes, count, out) => {
  for (let block = 0; block < count; block++) {
    const at = block * 34;
    const scale = f16At(bytes, at);
    for (let i = 0; i < 32; i++) out[block * 32 + i] = scale * signed(bytes[at + 2 + i]);
  }
};

/** scales (16: low nibble scale, high nibble minimum), codes (64), d, dmin */
const q2K: Dequantize = (bytes, count, out) => {
  for (let block = 0; block < count; block++) {
    const at = block * 84;
    const d = f16At(bytes, at + 80);
    const dmin = f16At(bytes, at + 82);
    for (let sub = 0; sub < 16; sub++) {
      const scale = fround(d * (bytes[at + sub] & 15));
      const minimum = fround(dmin * (bytes[at + sub] >> 4));
      // 128 values share 32 bytes, two bits each: sub-blocks 0,1 lie in bits 0-1, sub-blocks 2,3 in bits 2-3, ...
      const codes = at + 16 + (sub >> 3) * 32 + (sub & 1) * 16;
      const shift = ((sub >> 1) & 3) * 2;
      for (let i = 0; i < 16; i++) {
        out[block * QK + sub * 16 + i] = fround(scale * ((bytes[codes + i] >> shift) & 3)) - minimum;
      }
    }
  }
};

/** hmask (32), codes (64), scales (12: sixteen of 6 bits), d */
const q3K: Dequantize = (bytes, count, out) => {
  for (let block = 0; block < count; block++) {
    const at = block * 110;
    const d = f16At(bytes, at + 108);
    for (let sub = 0; sub < 16; sub++) {
      const packed = at + 96;
      const low = (bytes[packed + (sub & 7)] >> (sub < 8 ? 0 : 4)) & 15;
      const high = (bytes[packed + 8 + (sub & 3)] >> (2 * (sub >> 2))) & 3;
      const scale = fround(d * ((low | (high << 4)) - 32));
      const offset = (sub & 1) * 16;
      const codes = at + 32 + (sub >> 3) * 32 + offset;
      const shift = ((sub >> 1) & 3) * 2;
      for (let i = 0; i < 16; i++) {
        const third = (bytes[at + offset + i] >> (sub >> 1)) & 1; // its absence takes 4 off
        out[block * QK + sub * 16 + i] = scale * (((bytes[codes + i] >> shift) & 3) - (third ? 0 : 4));
      }
    }
  }
};

/** The 6-bit scale and minimum of sub-block `sub` (of 8) among the 12 bytes from `at` on. */
function scaleOf(bytes: Uint8Array, at: number, sub: number): number {
  return sub < 4 ? bytes[at + sub] & 63 : (bytes[at + 4 + sub] & 15) | ((bytes[at + sub - 4] >> 6) << 4);
}
function minimumOf(bytes: Uint8Array, at: number, sub: number): number {
  return sub < 4 ? bytes[at + 4 + sub] & 63 : (bytes[at + 4 + sub] >> 4) | ((bytes[at + sub] >> 6) << 4);
}

/** d, dmin, scales (12), Q5_K: fifth bits (32), codes (128): sub-blocks 2k and 2k+1 share 32 bytes */
function dequantizeQ45K(bits: 4 | 5): Dequantize {
  const blockBytes = bits === 4 ? 144 : 176;
  return (bytes, count, out) => {
    for (let block = 0; block < count; block++) {
      const at = block * blockBytes;
      const d = f16At(bytes, at);
      const dmin = f16At(bytes, at + 2);
      for (let sub = 0; sub < 8; sub++) {
        const scale = fround(d * scaleOf(bytes, at + 4, sub));
        const minimum = fround(dmin * minimumOf(bytes, at + 4, sub));
        const codes = at + blockBytes - 128 + (sub >> 1) * 32;
        const shift = (sub & 1) * 4;
        for (let i = 0; i < 32; i++) {
          let code = (bytes[codes + i] >> shift) & 15;
          if (bits === 5) code |= ((bytes[at + 16 + i] >> sub) & 1) << 4;
          out[block * QK + sub * 32 + i] = fround(scale * code) - minimum;
        }
      }
    }
  };
}

/** low nibbles (128), high two bits (64), scales (16, signed), d */
const q6K: Dequantize = (bytes, count, out) => {
  for (let block = 0; block < count; block++) {
    const at = block * 210;
    const d = f16At(bytes, at + 208);
    for (let sub = 0; sub < 16; sub++) {
      const scale = fround(d * signed(bytes[at + 192 + sub]));
      const half = sub >> 3; // 128 values
      const quarter = (sub >> 1) & 3; // 32 values
      const within = (sub & 1) * 16;
      const low = at + half * 64 + (quarter & 1) * 32 + within;
      const lowShift = (quarter >> 1) * 4;
      const high = at + 128 + half * 32 + within;
      for (let i = 0; i < 16; i++) {
        const code = ((bytes[low + i] >> lowShift) & 15) | (((bytes[high + i] >> (quarter * 2)) & 3) << 4);
        out[block * QK + sub * 16 + i] = scale * (code - 32);
      }
    }
  }
};

/** The 16 values of the non-linear 4-bit types (ggml: kvalues_iq4nl). */
const IQ4_VALUES = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

const iq4NL: Dequantize = (bytes, count, out) => {
  for (let block = 0; block < count; block++) {
    const at = block * 18;
    const d = f16At(bytes, at);
    for (let i = 0; i < 16; i++) {
      const byte = bytes[at + 2 + i];
      out[block * 32 + i] = d * IQ4_VALUES[byte & 15];
      out[block * 32 + 16 + i] = d * IQ4_VALUES[byte >> 4];
    }
  }
};

/** d, high scale bits (2), low scale nibbles (4), codes (128) */
const iq4XS: Dequantize = (bytes, count, out) => {
  for (let block = 0; block < count; block++) {
    const at = block * 136;
    const d = f16At(bytes, at);
    const highScales = bytes[at + 2] | (bytes[at + 3] << 8);
    for (let sub = 0; sub < 8; sub++) {
      const low = (bytes[at + 4 + (sub >> 1)] >> ((sub & 1) * 4)) & 15;
      const scale = fround(d * ((low | (((highScales >> (2 * sub)) & 3) << 4)) - 32));
      const codes = at + 8 + sub * 16;
      for (let i = 0; i < 16; i++) {
        out[block * QK + sub * 32 + i] = scale * IQ4_VALUES[bytes[codes + i] & 15];
        out[block * QK + sub * 32 + 16 + i] = scale * IQ4_VALUES[bytes[codes + i] >> 4];
      }
    }
  }
};

/** Twice the values of OCP's e2m1. */
const E2M1_TWICE = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/** OCP MX: exponent (1, e8m0), codes (16) */
const mxfp4: Dequantize = (bytes, count, out) => {
  for (let block = 0; block < count; block++) {
    const at = block * 17;
    const scale = 2 ** (bytes[at] - 128); // half of 2^(e - 127): the values are doubled
    for (let i = 0; i < 16; i++) {
      out[block * 32 + i] = scale * E2M1_TWICE[bytes[at + 1 + i] & 15];
      out[block * 32 + 16 + i] = scale * E2M1_TWICE[bytes[at + 1 + i] >> 4];
    }
  }
};

/** Ternary: codes (64, two bits each), d */
const tq2: Dequantize = (bytes, count, out) => {
  for (let block = 0; block < count; block++) {
    const at = block * 66;
    const d = f16At(bytes, at + 64);
    for (let i = 0; i < QK; i++) {
      const code = (bytes[at + (i >> 7) * 32 + (i & 31)] >> (2 * ((i >> 5) & 3))) & 3;
      out[block * QK + i] = d * (code - 1);
    }
  }
};

/** Ternary, five values a byte in base 3 (as a fraction of 243 scaled to 256): 32 bytes, 16 bytes, then 4 of four; d */
const tq1: Dequantize = (bytes, count, out) => {
  const POWERS = [1, 3, 9, 27, 81];
  for (let block = 0; block < count; block++) {
    const at = block * 54;
    const d = f16At(bytes, at + 52);
    let next = block * QK;
    for (const [from, width, digits] of [
      [0, 32, 5],
      [32, 16, 5],
      [48, 4, 4],
    ]) {
      for (let digit = 0; digit < digits; digit++) {
        for (let i = 0; i < width; i++) {
          const shifted = (bytes[at + from + i] * POWERS[digit]) & 255;
          out[next++] = d * (((shifted * 3) >> 8) - 1);
        }
      }
    }
  }
};

/** Every type of ggml that files hold. */
export const GGML_TYPES = {
  F32: { id: 0, blockSize: 1, blockBytes: 4, dequantize: plain("f32") },
  F16: { id: 1, blockSize: 1, blockBytes: 2, dequantize: plain("f16") },
  Q4_0: { id: 2, blockSize: 32, blockBytes: 18, dequantize: dequantizeLegacy(4, false) },
  Q4_1: { id: 3, blockSize: 32, blockBytes: 20, dequantize: dequantizeLegacy(4, true) },
  Q5_0: { id: 6, blockSize: 32, blockBytes: 22, dequantize: dequantizeLegacy(5, false) },
  Q5_1: { id: 7, blockSize: 32, blockBytes: 24, dequantize: dequantizeLegacy(5, true) },
  Q8_0: { id: 8, blockSize: 32, blockBytes: 34, dequantize: q8_0 },
  Q8_1: { id: 9, blockSize: 32, blockBytes: 40 },
  Q2_K: { id: 10, blockSize: QK, blockBytes: 84, dequantize: q2K },
  Q3_K: { id: 11, blockSize: QK, blockBytes: 110, dequantize: q3K },
  Q4_K: { id: 12, blockSize: QK, blockBytes: 144, dequantize: dequantizeQ45K(4) },
  Q5_K: { id: 13, blockSize: QK, blockBytes: 176, dequantize: dequantizeQ45K(5) },
  Q6_K: { id: 14, blockSize: QK, blockBytes: 210, dequantize: q6K },
  Q8_K: { id: 15, blockSize: QK, blockBytes: 292 },
  IQ2_XXS: { id: 16, blockSize: QK, blockBytes: 66 },
  IQ2_XS: { id: 17, blockSize: QK, blockBytes: 74 },
  IQ3_XXS: { id: 18, blockSize: QK, blockBytes: 98 },
  IQ1_S: { id: 19, blockSize: QK, blockBytes: 50 },
  IQ4_NL: { id: 20, blockSize: 32, blockBytes: 18, dequantize: iq4NL },
  IQ3_S: { id: 21, blockSize: QK, blockBytes: 110 },
  IQ2_S: { id: 22, blockSize: QK, blockBytes: 82 },
  IQ4_XS: { id: 23, blockSize: QK, blockBytes: 136, dequantize: iq4XS },
  I8: { id: 24, blockSize: 1, blockBytes: 1, dequantize: plain("i8") },
  I16: { id: 25, blockSize: 1, blockBytes: 2, dequantize: plain("i16") },
  I32: { id: 26, blockSize: 1, blockBytes: 4, dequantize: plain("i32") },
  I64: { id: 27, blockSize: 1, blockBytes: 8, dequantize: plain("i64") },
  F64: { id: 28, blockSize: 1, blockBytes: 8, dequantize: plain("f64") },
  IQ1_M: { id: 29, blockSize: QK, blockBytes: 56 },
  BF16: { id: 30, blockSize: 1, blockBytes: 2, dequantize: plain("bf16") },
  TQ1_0: { id: 34, blockSize: QK, blockBytes: 54, dequantize: tq1 },
  TQ2_0: { id: 35, blockSize: QK, blockBytes: 66, dequantize: tq2 },
  NVFP4: { id: 40, blockSize: 64, blockBytes: 36 },
  Q1_0: { id: 41, blockSize: 128, blockBytes: 18 },
  MXFP4: { id: 39, blockSize: 32, blockBytes: 17, dequantize: mxfp4 },
} as const satisfies Readonly<Record<string, GgmlTypeInfo>>;

export type GgmlType = keyof typeof GGML_TYPES;

export function typeInfo(type: GgmlType): GgmlTypeInfo {
  return GGML_TYPES[type];
}

const BY_ID = new Map<number, GgmlType>(Object.entries(GGML_TYPES).map(([type, { id }]) => [id, type as GgmlType]));

export function typeById(id: number): GgmlType | undefined {
  return BY_ID.get(id);
}
