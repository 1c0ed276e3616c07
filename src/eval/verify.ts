/**
 * What an export has to show before it is kept: its graph computes what it should, the float model it came from is a
 * language model and no other reading of its checkpoint is a better one, and what quantization cost is measured.
 * Reference and model run block by block.
 */
import type { Model } from "../arch/index.ts";
import { dequantizedWeights, floatWeights, type Weights } from "../arch/weights.ts";
import { NibbleError } from "../errors.ts";
import type { Manifest } from "../export/model-folder.ts";
import type { FolderSource } from "../files.ts";
import type { Ort } from "../onnx/ort.ts";
import { type Drift, type DriftOptions, measureDrift } from "./drift.ts";
import { evaluateGraph } from "./evaluate.ts";
import { checkGraph, type GraphCheck } from "./graph-check.ts";
import { requireBestReading } from "./readings.ts";

/** Tokens of the graph check: enough for every position-dependent part to matter, few enough to be quick. */
const GRAPH_CHECK_TOKENS = 64;

export interface Measured extends GraphCheck {
  readonly drift: Drift;
}

/** @param windows token ids of held-back text, at least one window. Throws `verification`; the caller discards. */
export async function verifyExport(
  ort: Ort,
  folder: FolderSource,
  manifest: Manifest,
  model: Model,
  weights: Weights,
  windows: readonly (readonly number[])[],
  options: DriftOptions = {},
): Promise<Measured> {
  const graph = await checkGraph(ort, folder, manifest, model, weights, windows[0].slice(0, GRAPH_CHECK_TOKENS));
  await requireBestReading(ort, model, windows, Math.log(unigramPerplexity(windows)), options);
  const reference = floatWeights(model.checkpoint);
  // rounding inputs is part of what an integer graph is: it is judged as it runs
  const drift =
    manifest.dtype === "q8"
      ? await evaluateGraph(ort, folder, manifest.graph, model, windows, options)
      : await measureDrift(ort, model, reference, dequantizedWeights(weights), windows, options);
  requireLanguageModel(model, windows, drift);
  return { ...graph, drift };
}

/**
 * A model that knows nothing but how often each token occurs in this very text has the unigram perplexity; a language
 * model is below it, and one with a badly wrong norm is far above. A rotary that is wrong but near enough for the
 * closest tokens shows in another way: the loss rises with the distance from the start of the text, where that of every
 * language model falls.
 */
export function requireLanguageModel(
  { checkpoint }: Model,
  windows: readonly (readonly number[])[],
  {
    perplexityReference: perplexity,
    contextGainReference: gain = Number.POSITIVE_INFINITY,
  }: Pick<Drift, "perplexityReference" | "contextGainReference">,
): void {
  const limit = unigramPerplexity(windows);
  if (perplexity < limit && gain > 0) return;
  const found =
    perplexity < limit
      ? `loss on held-back text is ${(-gain).toPrecision(2)} nats higher far into the text than at its start, where a ` +
        "language model's is lower"
      : `perplexity on held-back text is ${perplexity.toPrecision(4)}, where guessing by token frequency alone gives ` +
        limit.toPrecision(4);
  throw new NibbleError(
    "verification",
    `${checkpoint.name}: the float model's ${found}. Either the text is nothing this model was trained for ` +
      "(give one that it was with --calibration), or the checkpoint is damaged or computed wrongly.",
  );
}

/** exp of the entropy of the windows' token frequencies. */
function unigramPerplexity(windows: readonly (readonly number[])[]): number {
  const counts = new Map<number, number>();
  let total = 0;
  for (const window of windows) {
    for (const id of window) {
      counts.set(id, (counts.get(id) ?? 0) + 1);
      total++;
    }
  }
  let entropy = 0;
  for (const count of counts.values()) entropy -= (count / total) * Math.log(count / total);
  return Math.exp(entropy);
}
