/** Where a graph's weights come from: a checkpoint as it is, or one of whose matrices some are quantized or changed. */
import type { Checkpoint } from "../checkpoint/checkpoint.ts";
import { NibbleError } from "../errors.ts";
import { dequantize, type QuantizedMatrix, type ScaleBits } from "../tensor/quantized.ts";

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
    quantized: () => undefined,
  };
}
