/** Learned rounding beside the walk over blocks: keeps the float model's hidden states as the targets of each block. */
import type { Tensor } from "onnxruntime-common";
import type { Model } from "../src/arch/index.ts";
import { floatWeights } from "../src/arch/weights.ts";
import { BlockForward } from "../src/eval/block-forward.ts";
import type { Ort } from "../src/onnx/ort.ts";
import { type Activations, BlockRunner } from "./block-runner.ts";
import { type LearnedRounding, RoundingLearner } from "./learned-rounding.ts";
import { CALM } from "./products.ts";
import type { LayerRecord } from "./record.ts";

export class LearnedBlocks {
  private readonly forward: BlockForward;
  private readonly learner: RoundingLearner;
  /** The float prefix's hidden states, a window each. */
  private readonly float: Float32Array[];

  /** @param embedded what goes into the first block, in batches of windows. */
  constructor(ort: Ort, model: Model, options: LearnedRounding, embedded: readonly Activations[]) {
    const inputs = this.inputs(embedded);
    const [, seq] = inputs[0].dims;
    this.forward = new BlockForward(ort, model, floatWeights(model.checkpoint), seq, CALM);
    this.learner = new RoundingLearner(ort, model, options, seq);
    this.float = windowsOf(inputs).map((window) => window.slice());
  }

  /** The block's inputs, before the walk runs over them. */
  inputs(batches: readonly Activations[]): readonly Tensor[] {
    return batches.map((batch) => batch.get(BlockRunner.input)!);
  }

  /** Takes the float prefix one block further. */
  async advance(layer: number): Promise<void> {
    await this.forward.block(layer, this.float);
  }

  /** Learns against the float block's outputs; call after `advance`. */
  async improve(
    layer: number,
    record: LayerRecord,
    inputs: readonly Tensor[],
    signal?: AbortSignal,
  ): Promise<LayerRecord> {
    return (await this.learner.learn(layer, record, windowsOf(inputs), this.float, signal)).record;
  }

  async dispose(): Promise<void> {
    await this.forward.dispose();
    await this.learner.dispose();
  }
}

/** Batches (windows, seq, hidden) as one array a window. */
function windowsOf(batches: readonly Tensor[]): Float32Array[] {
  return batches.flatMap(({ data, dims }) => {
    const values = data as Float32Array;
    const size = values.length / dims[0];
    return Array.from({ length: dims[0] }, (_, i) => values.subarray(i * size, (i + 1) * size));
  });
}
