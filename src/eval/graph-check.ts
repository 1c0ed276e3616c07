/**
 * Does an exported graph compute what it should? Its logits, with float activations, against the model's float graph
 * on the very values that the file holds. What accuracy_level 4 adds by rounding activations is measured apart.
 */
import type { InferenceSession } from "onnxruntime-common";
import type { Model } from "../arch/index.ts";
import { dequantizedWeights, type Weights } from "../arch/weights.ts";
import { NibbleError } from "../errors.ts";
import type { Manifest } from "../export/model-folder.ts";
import { openGraph } from "../export/open-graph.ts";
import type { FolderSource } from "../files.ts";
import { type Ort, typedArray } from "../onnx/ort.ts";
import { BlockForward } from "./block-forward.ts";

/**
 * Largest difference of a logit as a share of the logits' standard deviation. float32: two orders of summation over a
 * few thousand terms and some dozen layers leave 1e-5 to 1e-4. float16: 11 significant bits in every activation.
 */
export const GRAPH_TOLERANCE = { float32: 2e-3, float16: 0.15 } as const;

export interface GraphCheck {
  /** Largest |logit - reference| / standard deviation of the reference, activations in float. */
  readonly graphError: number;
  /** Root mean square of what int8 activations (accuracy_level 4) add, in the same unit; absent for float exports. */
  readonly activationRounding?: number;
}

/** Runs `ids` (seq) through both; throws `verification` where they differ by more than GRAPH_TOLERANCE. */
export async function checkGraph(
  ort: Ort,
  folder: FolderSource,
  manifest: Manifest,
  model: Model,
  weights: Weights,
  ids: readonly number[],
): Promise<GraphCheck> {
  const reference = await referenceLogits(ort, model, weights, ids);
  const deviation = standardDeviation(reference);
  const quantized = manifest.dtype.startsWith("q") || manifest.dtype === "int8";
  const exact = await graphLogits(ort, folder, manifest.graph, ids, quantized ? 0 : undefined);
  const graphError = largestDifference(exact, reference) / deviation;
  const tolerance = GRAPH_TOLERANCE[manifest.dtype.endsWith("16") ? "float16" : "float32"];
  if (!(graphError <= tolerance)) {
    throw new NibbleError(
      "verification",
      `${manifest.graph}: its logits differ from the float graph on the same weights by ${graphError.toPrecision(3)} standard deviations, where at most ${tolerance} is rounding. The export is wrong and was not kept; please report this with the model's config.json.`,
    );
  }
  if (!quantized) return { graphError };
  const shipped = await graphLogits(ort, folder, manifest.graph, ids);
  return { graphError, activationRounding: rootMeanSquare(shipped, exact) / deviation };
}

async function referenceLogits(
  ort: Ort,
  model: Model,
  weights: Weights,
  ids: readonly number[],
): Promise<Float32Array> {
  const forward = new BlockForward(ort, model, dequantizedWeights(weights), ids.length);
  try {
    const hidden = await forward.embed([ids]);
    for (let layer = 0; layer < model.config.layers; layer++) await forward.block(layer, hidden);
    for await (const logits of forward.logits(hidden)) return logits;
    throw new NibbleError("engine", "The reference gave no logits.");
  } finally {
    await forward.dispose();
  }
}

/** Logits (seq, vocab) of an exported graph from an empty cache. */
async function graphLogits(
  ort: Ort,
  folder: FolderSource,
  path: string,
  ids: readonly number[],
  accuracyLevel?: 0 | 4,
): Promise<Float32Array> {
  const session = await openGraph(ort, folder, path, { accuracyLevel });
  try {
    const { logits } = await session.run(emptyCacheFeeds(ort, session, ids), ["logits"]);
    return logits.data as Float32Array;
  } finally {
    await session.release();
  }
}

/** Feeds for one sequence with nothing before it, all logits wanted. */
export function emptyCacheFeeds(
  ort: Ort,
  session: InferenceSession,
  ids: readonly number[],
): InferenceSession.FeedsType {
  const seq = ids.length;
  const feeds: Record<string, InstanceType<Ort["Tensor"]>> = {};
  for (const input of session.inputMetadata) {
    if (!input.isTensor) continue;
    const { name, type, shape } = input;
    if (name === "input_ids") feeds[name] = new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, seq]);
    else if (name === "attention_mask")
      feeds[name] = new ort.Tensor("int64", new BigInt64Array(seq).fill(1n), [1, seq]);
    else if (name === "position_ids")
      feeds[name] = new ort.Tensor(
        "int64",
        BigInt64Array.from(ids, (_, i) => BigInt(i)),
        [1, seq],
      );
    else if (name === "num_logits_to_keep") feeds[name] = new ort.Tensor("int64", BigInt64Array.of(0n), []);
    else {
      // caches: the batch is 1, what has a name is empty
      const dims = shape.map((dim, i) => (typeof dim === "number" ? dim : i === 0 ? 1 : 0));
      feeds[name] = new ort.Tensor(
        type,
        typedArray(
          type,
          dims.reduce((product, dim) => product * dim, 1),
        ),
        dims,
      );
    }
  }
  return feeds;
}

function largestDifference(a: Float32Array, b: Float32Array): number {
  let largest = 0;
  for (let i = 0; i < b.length; i++) {
    const difference = Math.abs(a[i] - b[i]);
    if (!(difference <= largest)) largest = difference; // NaN is kept
  }
  return largest;
}

function rootMeanSquare(a: Float32Array, b: Float32Array): number {
  let sum = 0;
  for (let i = 0; i < b.length; i++) sum += (a[i] - b[i]) ** 2;
  return Math.sqrt(sum / b.length);
}

function standardDeviation(values: Float32Array): number {
  let sum = 0;
  let squares = 0;
  for (const value of values) {
    sum += value;
    squares += value * value;
  }
  return Math.sqrt(squares / values.length - (sum / values.length) ** 2);
}
