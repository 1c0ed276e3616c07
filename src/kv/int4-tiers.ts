/**
 * The step half of the two-tier cache (int4.ts): which tokens are in the tail and which in the body, and the codes of a
 * token that goes from one to the other.
 *   tail   tokens 0 .. SINKS-1, then the newest ones; float32 (kvHeads, tailCapacity, headDim) a layer and part
 *   body   tokens SINKS .. SINKS+bodyLength-1; codes (kvHeads, bodyCapacity, headDim / 2), scales (bodyCapacity, parts * kvHeads)
 */
import { f16ToF32, toF16Bits } from "../tensor/dtypes.ts";

/** The first tokens carry attention that nothing else can (StreamingLLM); 4 as there. */
export const SINKS = 4;
/** Newest tokens that always stay in full precision: worth a factor of four in KL (32 measured). */
export const RECENT = 32;
/** Tokens go over together, so that a step seldom pays for it. */
const STEP = 16;
/** Tail rows while generating: sinks, recent tokens, a step of them, and a few guesses. */
export const REST_CAPACITY = 64;
const BODY_STEP = 128;
/** Codes are -8 .. 7, stored + 8. */
const LOWEST = -8;
const HIGHEST = 7;
/** Shares of largest magnitude / 7.5 that a row's scale is tried at: clipping a little is often better. */
const SHRINKS = [0.8, 0.87, 0.93, 1, 1.06];

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
  tail: Float32Array[] = [];
  codes: Uint8Array[] = [];
  scales = new Uint16Array(0);

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
        sum + kvHeads * (REST_CAPACITY * headDim * 4 + body * (headDim / 2 + (fixed ? 0 : 2))),
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
    this.growBody(count); // the kernel reads as many rows as there are queries
    const needed = this.tailLength + count;
    const capacity = needed <= REST_CAPACITY ? REST_CAPACITY : needed;
    if (capacity === this.tailCapacity) return;
    if (needed <= this.tailCapacity && capacity > REST_CAPACITY) return;
    this.tail = this.parts.map(({ kvHeads, headDim }, i) => {
      const rows = new Float32Array(kvHeads * capacity * headDim);
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
    const scales = new Uint16Array(capacity * this.scaleWidth).fill(toF16Bits(1));
    scales.set(this.scales.subarray(0, this.bodyLength * this.scaleWidth));
    this.scales = scales;
    this.bodyCapacity = capacity;
  }

  /** The tail has `count` new tokens; moves old ones to the body once there are enough of them. */
  appended(count: number): void {
    this.length += count;
    const recent = this.tailLength - SINKS;
    if (recent >= RECENT + STEP) this.demote(recent - RECENT);
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
          const row = rows.subarray(start + t * headDim, start + (t + 1) * headDim);
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

/** Codes of one token's row, two to a byte, by the best of a few scales; returns the scale's float16 bits. */
export function encodeRow(row: Float32Array, codes: Uint8Array): number {
  let largest = 0;
  for (let i = 0; i < row.length; i++) largest = Math.max(largest, Math.abs(row[i]));
  if (largest === 0) {
    codes.fill(0x88);
    return toF16Bits(1);
  }
  let best = 0;
  let bestGain = -1;
  for (const shrink of SHRINKS) {
    const step = (shrink * largest) / 7.5;
    let along = 0; // sum of x c
    let square = 0; // sum of c c
    for (let i = 0; i < row.length; i++) {
      const c = roundCode(row[i] / step);
      along += row[i] * c;
      square += c * c;
    }
    // with the least-squares scale along / square the squared error is |x|^2 - along^2 / square
    const gain = (along * along) / square;
    if (gain > bestGain) {
      bestGain = gain;
      best = step;
    }
  }
  let along = 0;
  let square = 0;
  for (let i = 0; i < row.length; i += 2) {
    const low = roundCode(row[i] / best);
    const high = roundCode(row[i + 1] / best);
    along += row[i] * low + row[i + 1] * high;
    square += low * low + high * high;
    codes[i / 2] = (low - LOWEST) | ((high - LOWEST) << 4);
  }
  return toF16Bits(along / square);
}

/** Codes with one scale per channel. */
function encodeFixed(row: Float32Array, scales: Float32Array, codes: Uint8Array): void {
  for (let i = 0; i < row.length; i += 2) {
    const low = roundCode(row[i] / scales[i]);
    const high = roundCode(row[i + 1] / scales[i + 1]);
    codes[i / 2] = (low - LOWEST) | ((high - LOWEST) << 4);
  }
}

function roundCode(x: number): number {
  const code = Math.round(x);
  return code < LOWEST ? LOWEST : code > HIGHEST ? HIGHEST : code;
}

/** What `encodeRow` wrote, as the kernel reads it. */
export function decodeRow(codes: Uint8Array, scaleBits: number): Float32Array {
  const [scale] = f16ToF32(Uint16Array.of(scaleBits));
  return Float32Array.from({ length: 2 * codes.length }, (_, i) => {
    const byte = codes[i >> 1];
    return scale * ((i % 2 ? byte >> 4 : byte & 15) + LOWEST);
  });
}
