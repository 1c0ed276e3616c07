/**
 * Keys and values in GPU buffers of a fixed length, read and written in place: attention appends to the buffer that it
 * reads, so a step allocates nothing and copies nothing. Buffers grow by doubling, which copies each head once.
 */
import type { Tensor } from "onnxruntime-common";
import type { ModelProto } from "../onnx/proto.ts";

/** A cache input (batch 1, heads, length, headDim). */
export interface GpuSlot {
  readonly past: string;
  readonly type: Tensor.Type;
  readonly heads: number;
  readonly headDim: number;
}

/** Of the runtime: a tensor over a buffer. */
interface TensorFactory {
  fromGpuBuffer(buffer: GPUBuffer, options: { dataType: "float32" | "float16"; dims: readonly number[] }): Tensor;
}

/** Rows at first: a question and a short answer. */
const FIRST_ROWS = 256;
/** GPUBufferUsage.STORAGE, COPY_SRC and COPY_DST: constants of the browser's, which Node does not have. */
const USAGE = 0x80 | 0x4 | 0x8;
/** MAP_READ and COPY_DST, and GPUMapMode.READ. */
const READ_BACK = 0x1 | 0x8;
const MAP_READ = 0x1;
const BYTES: Readonly<Record<string, number>> = { float32: 4, float16: 2 };

/**
 * Whether every cache of a graph may be a buffer longer than the text: only GroupQueryAttention reads and writes it, and
 * takes the text's length from the mask.
 */
export function sharesCaches({ graph }: ModelProto): boolean {
  const caches = new Map<string, string>();
  for (const { opType, input, output } of graph.node) {
    if (opType !== "GroupQueryAttention") continue;
    for (const at of [0, 1]) caches.set(input[3 + at], output[1 + at]);
  }
  const pasts = graph.input.map(({ name }) => name).filter((name) => name.startsWith("past_"));
  const others = graph.node.filter(({ opType }) => opType !== "GroupQueryAttention").flatMap(({ input }) => input);
  const used = new Set(others);
  return pasts.length > 0 && pasts.every((past) => caches.has(past) && !used.has(past) && !used.has(caches.get(past)!));
}

export class GpuCache {
  private buffers = new Map<string, GPUBuffer>();
  private tensors = new Map<string, Tensor>();
  private rows = 0;

  constructor(
    private readonly device: GPUDevice,
    private readonly factory: TensorFactory,
    private readonly slots: readonly GpuSlot[],
    /** The model's context: buffers never get longer. */
    private readonly maxRows: number,
  ) {}

  /** Of all buffers. */
  get sizeBytes(): number {
    return this.slots.reduce((sum, slot) => sum + this.rows * rowBytes(slot), 0);
  }

  /** Input and output of a cache: the same tensor. */
  tensor(past: string): Tensor {
    return this.tensors.get(past)!;
  }

  /** Makes room for so many rows, keeping the first `kept`. */
  reserve(rows: number, kept: number): void {
    if (rows <= this.rows) return;
    const old = { buffers: this.buffers, rows: this.rows };
    this.rows = Math.max(rows, Math.min(this.maxRows, Math.max(FIRST_ROWS, 2 * this.rows)));
    this.buffers = new Map();
    const copies = this.device.createCommandEncoder();
    for (const slot of this.slots) {
      const { past, heads, headDim, type } = slot;
      const buffer = this.device.createBuffer({ size: this.rows * rowBytes(slot), usage: USAGE });
      const row = headDim * BYTES[type];
      const from = old.buffers.get(past);
      for (let head = 0; from && kept > 0 && head < heads; head++) {
        copies.copyBufferToBuffer(from, head * old.rows * row, buffer, head * this.rows * row, kept * row);
      }
      this.buffers.set(past, buffer);
      const dims = [1, heads, this.rows, headDim];
      this.tensors.set(past, this.factory.fromGpuBuffer(buffer, { dataType: type as "float32", dims }));
    }
    this.device.queue.submit([copies.finish()]);
    for (const buffer of old.buffers.values()) buffer.destroy();
  }

  /** `count` rows of a cache from row `start`, head by head. */
  async takeRows(slot: number, start: number, count: number): Promise<Uint8Array> {
    const { past, heads, headDim, type } = this.slots[slot];
    const row = headDim * BYTES[type];
    const size = heads * count * row;
    const staging = this.device.createBuffer({ size, usage: READ_BACK });
    const copies = this.device.createCommandEncoder();
    for (let head = 0; head < heads; head++) {
      const from = (head * this.rows + start) * row;
      copies.copyBufferToBuffer(this.buffers.get(past)!, from, staging, head * count * row, count * row);
    }
    this.device.queue.submit([copies.finish()]);
    await staging.mapAsync(MAP_READ);
    const bytes = new Uint8Array(staging.getMappedRange()).slice();
    staging.destroy();
    return bytes;
  }

  /** Puts what `takeRows` gave at row `start`; there is room for it. */
  putRows(slot: number, start: number, bytes: Uint8Array): void {
    const { past, heads, headDim, type } = this.slots[slot];
    const row = headDim * BYTES[type];
    const size = bytes.byteLength / heads;
    for (let head = 0; head < heads; head++) {
      const part = bytes.slice(head * size, (head + 1) * size);
      this.device.queue.writeBuffer(this.buffers.get(past)!, (head * this.rows + start) * row, part);
    }
  }

  dispose(): void {
    for (const buffer of this.buffers.values()) buffer.destroy();
    this.buffers.clear();
    this.tensors.clear();
    this.rows = 0;
  }
}

function rowBytes({ heads, headDim, type }: GpuSlot): number {
  return heads * headDim * BYTES[type];
}
