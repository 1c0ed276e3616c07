/**
 * Keys and values of one sequence in JavaScript's memory, (1, heads, rows, headDim) with room for a few tokens more: the
 * graph reads as far as its mask says and gives back the new rows alone, which are written behind the others.
 */
import type { Tensor } from "onnxruntime-common";
import { takeRows } from "./cache-rows.ts";

export interface RowSlot {
  readonly past: string;
  readonly present: string;
  readonly heads: number;
  readonly rowBytes: number;
  readonly tensor: (bytes: Uint8Array, rows: number) => Tensor;
}

/** Rows that a cache grows by: all of them are copied to the runtime at every step, used or not. */
const STEP_ROWS = 32;

export class RowCache {
  private bytes: readonly Uint8Array[] = [];
  private tensors = new Map<string, Tensor>();
  private rows = 0;

  constructor(private readonly slots: readonly RowSlot[]) {}

  get sizeBytes(): number {
    return this.bytes.reduce((sum, { byteLength }) => sum + byteLength, 0);
  }

  tensor(past: string): Tensor {
    return this.tensors.get(past)!;
  }

  /** Makes room for so many rows, keeping the first `kept`. */
  reserve(rows: number, kept: number): void {
    if (rows > this.rows) this.resize(rows, kept);
  }

  /** Leaves the first `kept` rows: what a longer text took would be copied at every step. */
  cut(kept: number): void {
    if (kept + STEP_ROWS <= this.rows) this.resize(kept, kept);
  }

  private resize(rows: number, kept: number): void {
    const before = this.rows;
    this.rows = Math.ceil(rows / STEP_ROWS) * STEP_ROWS;
    this.bytes = this.slots.map(({ heads, rowBytes }, i) => {
      const bytes = new Uint8Array(heads * this.rows * rowBytes);
      for (let head = 0; kept > 0 && head < heads; head++) {
        const from = head * before * rowBytes;
        bytes.set(this.bytes[i].subarray(from, from + kept * rowBytes), head * this.rows * rowBytes);
      }
      return bytes;
    });
    this.tensors = new Map(this.slots.map(({ past, tensor }, i) => [past, tensor(this.bytes[i], this.rows)]));
  }

  /** Writes (heads, count, headDim) of a slot from row `start` on; there is room for it. */
  putRows(slot: number, start: number, data: ArrayBufferView): void {
    const { heads, rowBytes } = this.slots[slot];
    const from = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
    const size = from.byteLength / heads;
    for (let head = 0; head < heads; head++) {
      this.bytes[slot].set(from.subarray(head * size, (head + 1) * size), (head * this.rows + start) * rowBytes);
    }
  }

  /** What a run gave of its new tokens, the first of which is token `start`. */
  append(start: number, results: Readonly<Record<string, unknown>>): void {
    for (const [i, { present }] of this.slots.entries()) {
      const given = results[present] as Tensor;
      this.putRows(i, start, given.data as Float32Array);
      given.dispose();
    }
  }

  takeRows(slot: number, start: number, count: number): Uint8Array {
    const { heads, rowBytes } = this.slots[slot];
    return takeRows(this.bytes[slot], { dims: [heads, this.rows, rowBytes], axis: 1, elementBytes: 1 }, start, count);
  }

  dispose(): void {
    this.bytes = [];
    this.tensors.clear();
    this.rows = 0;
  }
}
