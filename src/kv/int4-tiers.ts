/**
 * The step half of the two-tier cache (int4.ts): which tokens are in the tail and which in the body, and the codes of a
 * token that goes from one to the other.
 *   tail   tokens 0 .. SINKS-1, then the newest ones; float16 (kvHeads, tailCapacity, headDim) a layer and part
 *   body   tokens SINKS .. SINKS+bodyLength-1; codes (kvHeads, bodyCapacity, headDim / 2), scales (bodyCapacity, parts * kvHeads)
 * As allocated that is 4.5 bits a number at 2,048 tokens of 64 channels: 4.06 of the body, 0.44 of the tail.
 */
import { f16ToF32 } from "../tensor/dtypes.ts";

/** The first tokens carry attention that nothing else can (StreamingLLM); 4 as there. */
export const SINKS = 4;
/** Newest tokens that always stay in float16: worth a factor of four in KL. */
export const RECENT = 36;
/** Tokens go over together, so that a step seldom pays for it. */
const STEP = 8;
/** Tail rows while generating: sinks, recent tokens, a step of them, and eight guesses. */
export const REST_CAPACITY = 56;
const BODY_STEP = 32;
/** Codes are -8 .. 7, stored + 8. */
const LOWEST = -8;
const HIGHEST = 7;
/** A body scale is one byte b, 2^(b / 16 - 10): 0.001 to 61, each 4 % above the one before. */
export const SCALES_PER_OCTAVE = 16;
export const SCALE_OCTAVES = 10;
const SCALES = Float64Array.from({ length: 256 }, (_, b) => 2 ** (b / SCALES_PER_OCTAVE - SCALE_OCTAVES));
/**
 * A row's scale is tried from this share of largest magnitude / 7.5 on, at so many
 * bytes, every other one, then beside the best: clipping a little is often better.
 */
const LEAST_SHARE = 0.79;
const TRIED_SCALES = 4;
/** Steps of rounding, in shares of the scale, that the codes are then tried with. */
const STEPS = [0.974, 0.983, 0.991, 1, 1.009, 1.018, 1.026];
/**
 * How much worse an error along the codes is than one in any other direction: it makes a key longer or shorter, so all
 * its scores wrong by one factor. (SmolLM2, scales 6 % apart without this: KL 0.0032; scales in float16: 0.0027.)
 */
const ALONG_WEIGHT = 10;

/** One layer's keys or values. */
export interface TierPart {
  readonly kvHeads: number;
  readonly headDim: number;
}

/** Scales of a static body, (kvHeads * headDim); undefined where each token has its own. */
export type StaticScales = readonly Float32Array[] | undefined;

export class TwoTierCache {
  /** Tokens in both tiers. */
  length = 0;
  bodyLength = 0;
  tailCapacity = 0;
  bodyCapacity = 0;
  /** Bits of float16. */
  tail: Uint16Array[] = [];
  codes: Uint8Array[] = [];
  scales = new Uint8Array(0);

  constructor(
    readonly parts: readonly TierPart[],
    private readonly fixedScales: StaticScales = undefined,
  ) {}

  get tailLength(): number {
    return this.length - this.bodyLength;
  }

  get bytes(): number {
    const sum = (arrays: readonly ArrayBufferView[]) => arrays.reduce((total, { byteLength }) => total + byteLength, 0);
    return sum(this.tail) + sum(this.codes) + this.scales.byteLength;
  }

  /** As large as `length` tokens will need while generating. */
  static bytesFor(parts: readonly TierPart[], length: number, fixed: boolean): number {
    const body = Math.ceil(Math.max(1, length - SINKS - RECENT) / BODY_STEP) * BODY_STEP;
    return parts.reduce(
      (sum, { kvHeads, headDim }) =>
        sum + kvHeads * (REST_CAPACITY * headDim * 2 + body * (headDim / 2 + (fixed ? 0 : 1))),
      0,
    );
  }

  /** Numbers in a row of `scales`. */
  get scaleWidth(): number {
    return this.fixedScales ? 0 : this.parts.reduce((sum, { kvHeads }) => sum + kvHeads, 0);
  }

  /** Goes back to the first `length` tokens; false where some of them would have to come back out of the body. */
  cut(length: number): boolean {
    if (length === 0) {
      this.length = 0;
      this.bodyLength = 0;
      return true;
    }
    if (this.bodyLength > 0 && length < this.bodyLength + SINKS) return false;
    this.length = Math.min(this.length, length);
    return true;
  }

  /** Room for `count` more tokens in the tail, and as many rows in the body; gives back what a prompt needed and a token does not. */
  reserve(count: number): void {
    this.settle();
    this.growBody(count); // the kernel reads as many rows as there are queries
    const needed = this.tailLength + count;
    const capacity = needed <= REST_CAPACITY ? REST_CAPACITY : needed;
    if (capacity === this.tailCapacity) return;
    if (needed <= this.tailCapacity && capacity > REST_CAPACITY) return;
    this.tail = this.parts.map(({ kvHeads, headDim }, i) => {
      const rows = new Uint16Array(kvHeads * capacity * headDim);
      for (let head = 0; head < kvHeads && this.tail[i]; head++) {
        const from = head * this.tailCapacity * headDim;
        rows.set(this.tail[i].subarray(from, from + this.tailLength * headDim), head * capacity * headDim);
      }
      return rows;
    });
    this.tailCapacity = capacity;
  }

  private growBody(rows: number): void {
    if (rows <= this.bodyCapacity) return;
    const capacity = Math.ceil(rows / BODY_STEP) * BODY_STEP;
    this.codes = this.parts.map(({ kvHeads, headDim }, i) => {
      const bytes = headDim / 2;
      const codes = new Uint8Array(kvHeads * capacity * bytes);
      for (let head = 0; head < kvHeads && this.codes[i]; head++) {
        const from = head * this.bodyCapacity * bytes;
        codes.set(this.codes[i].subarray(from, from + this.bodyLength * bytes), head * capacity * bytes);
      }
      return codes;
    });
    const scales = new Uint8Array(capacity * this.scaleWidth);
    scales.set(this.scales.subarray(0, this.bodyLength * this.scaleWidth));
    this.scales = scales;
    this.bodyCapacity = capacity;
  }

  /** The tail holds `count` new tokens now. */
  appended(count: number): void {
    this.length += count;
  }

  /**
   * Old tokens of the tail go to the body, in whole steps: before tokens are read and not after, so that it follows from
   * how many are kept alone, whatever guesses were dropped in between.
   */
  settle(): void {
    const spare = this.tailLength - SINKS - RECENT;
    if (spare >= STEP) this.demote(spare - (spare % STEP));
  }

  /** The oldest `count` tokens after the sinks get codes. */
  private demote(count: number): void {
    this.growBody(this.bodyLength + count);
    let column = 0;
    for (const [i, { kvHeads, headDim }] of this.parts.entries()) {
      const rows = this.tail[i];
      const bytes = headDim / 2;
      for (let head = 0; head < kvHeads; head++) {
        const start = (head * this.tailCapacity + SINKS) * headDim;
        for (let t = 0; t < count; t++) {
          const row = f16ToF32(rows.subarray(start + t * headDim, start + (t + 1) * headDim));
          const at = (head * this.bodyCapacity + this.bodyLength + t) * bytes;
          const codes = this.codes[i].subarray(at, at + bytes);
          if (this.fixedScales) encodeFixed(row, this.fixedScales[i].subarray(head * headDim), codes);
          else this.scales[(this.bodyLength + t) * this.scaleWidth + column] = encodeRow(row, codes);
        }
        const end = (head * this.tailCapacity + this.tailLength) * headDim;
        rows.copyWithin(start, start + count * headDim, end);
        column++;
      }
    }
    this.bodyLength += count;
  }
}

/** Codes of one token's row, two to a byte, by the best of a few scales and roundings; returns the scale's byte. */
export function encodeRow(row: Float32Array, codes: Uint8Array): number {
  let largest = 0;
  for (let i = 0; i < row.length; i++) largest = Math.max(largest, Math.abs(row[i]));
  const wanted = Math.log2((LEAST_SHARE * largest) / 7.5); // -Infinity for a row of zeros
  const first = Math.ceil((wanted + SCALE_OCTAVES) * SCALES_PER_OCTAVE);
  let byte = 0;
  let least = Number.POSITIVE_INFINITY;
  const tryScale = (tried: number): void => {
    const within = Math.max(0, Math.min(SCALES.length - 1, tried));
    const error = roundingError(row, SCALES[within], SCALES[within], 0);
    if (error >= least) return;
    least = error;
    byte = within;
  };
  for (let i = 0; i < TRIED_SCALES; i++) tryScale(first + 2 * i);
  const middle = byte;
  tryScale(middle - 1);
  tryScale(middle + 1);
  const scale = SCALES[byte];
  let inverse = 1 / scale;
  least = Number.POSITIVE_INFINITY;
  for (const share of STEPS) {
    const error = roundingError(row, scale, share * scale, ALONG_WEIGHT);
    if (error >= least) continue;
    least = error;
    inverse = 1 / (share * scale);
  }
  for (let i = 0; i < row.length; i += 2) {
    const low = roundCode(row[i] * inverse);
    const high = roundCode(row[i + 1] * inverse);
    codes[i / 2] = (low - LOWEST) | ((high - LOWEST) << 4);
  }
  return byte;
}

/** Squared error of codes rounded by `step` and read with `scale`, its part along the codes counted `alongWeight` times more. */
function roundingError(row: Float32Array, scale: number, step: number, alongWeight: number): number {
  let error = 0;
  let along = 0; // sum of c (x - scale c)
  let square = 0; // sum of c c
  const inverse = 1 / step;
  for (let i = 0; i < row.length; i++) {
    const c = roundCode(row[i] * inverse);
    const rest = row[i] - scale * c;
    error += rest * rest;
    along += c * rest;
    square += c * c;
  }
  return square > 0 ? error + (alongWeight * along * along) / square : error;
}

/** Codes with one scale per channel. */
function encodeFixed(row: Float32Array, scales: Float32Array, codes: Uint8Array): void {
  for (let i = 0; i < row.length; i += 2) {
    const low = roundCode(row[i] / scales[i]);
    const high = roundCode(row[i + 1] / scales[i + 1]);
    codes[i / 2] = (low - LOWEST) | ((high - LOWEST) << 4);
  }
}

/** Added and taken off again it leaves a whole number: a double holds no fractions there. Half the time of Math.round. */
const WHOLE = 1.5 * 2 ** 52;

function roundCode(x: number): number {
  const code = x + WHOLE - WHOLE;
  return code < LOWEST ? LOWEST : code > HIGHEST ? HIGHEST : code;
}

/** What `encodeRow` wrote, as the graph reads it. */
export function decodeRow(codes: Uint8Array, scaleByte: number): Float32Array {
  return Float32Array.from({ length: 2 * codes.length }, (_, i) => {
    const byte = codes[i >> 1];
    return SCALES[scaleByte] * ((i % 2 ? byte >> 4 : byte & 15) + LOWEST);
  });
}
