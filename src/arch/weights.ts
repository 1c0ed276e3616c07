/** Where a graph's weights come from: a checkpoint as it is, or one of whose matrices some are quantized or changed. */
import type { Checkpoint } from "../checkpoint/checkpoint.ts";
import { NibbleError } from "../errors.ts";
import { dequantize, matrixRows, type QuantizedMatrix, type ScaleBits } from "../tensor/quantized.ts";

/** What a graph has to know of a quantized matrix before its codes are read; groups are blocks of MatMulNBits. */
export interface QuantizedWeight extends Pick<QuantizedMatrix, "rows" | "cols" | "bits" | "groupSize"> {
  readonly symmetric: boolean;
  /** Default 16. */
  readonly scaleBits?: ScaleBits;
  /**
   * Inputs are rounded as well and products run on integer kernels: codes are 8 bits, symmetric, with one scale a row
   * (groupSize = cols). Left out: MatMulNBits.
   */
  readonly inputBits?: 8;
  load(): Promise<QuantizedMatrix>;
}

export interface Weights {
  /** Full tensor names: "model.norm.weight". */
  has(tensor: string): boolean;
  shape(tensor: string): readonly number[];
  load(tensor: string): Promise<Float32Array>;
  /** Rows [start, end) alone, where a whole table is too much memory at once; absent where only all of it can be had. */
  loadRows?(tensor: string, start: number, end: number): Promise<Float32Array>;
  /** The quantized form of a matrix, by full tensor name; undefined = it is float. */
  quantized(tensor: string): QuantizedWeight | undefined;
}

/** Every tensor in float, as the checkpoint has it. */
export function floatWeights(checkpoint: Checkpoint): Weights {
  return {
    has: (tensor) => checkpoint.tensors.has(tensor),
    shape: (tensor) => {
      const info = checkpoint.tensors.get(tensor);
      if (info) return info.shape;
      throw new NibbleError(
        "bad_weights",
        `${checkpoint.name}: there is no tensor "${tensor}", which its config.json asks for.`,
      );
    },
    load: async (tensor) => (await checkpoint.readTensor(tensor)).data,
    ...(checkpoint.readRows && {
      loadRows: async (tensor, start, end) => (await checkpoint.readRows!(tensor, start, end)).data,
    }),
    quantized: () => undefined,
  };
}

/** The same values with every matrix in float: what a quantized graph should compute. */
export function dequantizedWeights(weights: Weights): Weights {
  return {
    ...weights,
    load: async (tensor) => {
      const quantized = weights.quantized(tensor);
      return quantized ? dequantize(await quantized.load()) : weights.load(tensor);
    },
    loadRows: async (tensor, start, end) => {
      const quantized = weights.quantized(tensor);
      return quantized
        ? dequantize(matrixRows(await quantized.load(), start, end))
        : rowsOf(weights, tensor, start, end);
    },
    quantized: () => undefined,
  };
}

/** Rows of a table by their numbers, ascending: (ids, cols). */
export async function gatherRows(weights: Weights, tensor: string, ids: readonly number[]): Promise<Float32Array> {
  const [rows, cols] = weights.shape(tensor);
  const out = new Float32Array(ids.length * cols);
  for (let at = 0; at < ids.length; ) {
    // neighbours and those close by come in one read
    let last = at;
    while (last + 1 < ids.length && ids[last + 1] - ids[last] <= NEAR_ROWS) last++;
    const [first, end] = weights.loadRows ? [ids[at], ids[last] + 1] : [0, rows];
    if (!weights.loadRows) last = ids.length - 1;
    const part = await rowsOf(weights, tensor, first, end);
    for (; at <= last; at++) out.set(part.subarray((ids[at] - first) * cols, (ids[at] - first + 1) * cols), at * cols);
  }
  return out;
}

/** Rows further apart than this are not worth reading what is between them. */
const NEAR_ROWS = 16;

/** Rows [start, end) of a table, or elements of a vector. */
export async function rowsOf(weights: Weights, tensor: string, start: number, end: number): Promise<Float32Array> {
  if (weights.loadRows) return weights.loadRows(tensor, start, end);
  const values = await weights.load(tensor);
  const length = values.length / weights.shape(tensor)[0];
  return values.subarray(start * length, end * length);
}
