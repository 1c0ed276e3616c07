/** An exported folder against the checkpoint it was made from, on text: the file itself runs, activations as it says. */
import type { InferenceSession } from "onnxruntime-common";
import type { Model } from "../arch/index.ts";
import { floatWeights } from "../arch/weights.ts";
import { openGraph } from "../export/open-graph.ts";
import type { FolderSource } from "../files.ts";
import type { Ort } from "../onnx/ort.ts";
import { BlockForward } from "./block-forward.ts";
import { type Comparison, LogitComparer } from "./compare.ts";
import { type Drift, type DriftOptions, summarize } from "./drift.ts";
import { emptyCacheFeeds } from "./graph-check.ts";

/** How the exported graph runs; the checkpoint's runs in float on the CPU. */
interface GraphOptions extends DriftOptions {
  /** 0 computes 4-bit products with float activations. */
  readonly accuracyLevel?: 0 | 4;
  readonly session?: InferenceSession.SessionOptions;
}

/** @param path the graph inside the folder */
export async function evaluateGraph(
  ort: Ort,
  folder: FolderSource,
  path: string,
  model: Model,
  windows: readonly (readonly number[])[],
  { onProgress, signal, accuracyLevel, session: sessionOptions }: GraphOptions = {},
): Promise<Drift> {
  const maxPositions = Math.max(...windows.map((ids) => ids.length));
  const { layers, vocabSize } = model.config;
  const reference = new BlockForward(ort, model, floatWeights(model.checkpoint), maxPositions);
  const comparer = new LogitComparer(ort);
  const session = await openGraph(ort, folder, path, { accuracyLevel, session: sessionOptions });
  try {
    const hidden = await reference.embed(windows);
    for (let layer = 0; layer < layers; layer++) {
      onProgress?.({ stage: "reference", done: layer, total: layers, unit: "layers" });
      await reference.block(layer, hidden, signal);
    }
    const comparisons: Comparison[] = [];
    const expected = reference.logits(hidden);
    for (const [i, ids] of windows.entries()) {
      signal?.throwIfAborted();
      onProgress?.({ stage: "exported graph", done: i, total: windows.length, unit: "windows" });
      const { logits } = await session.run(emptyCacheFeeds(ort, session, ids), ["logits"]);
      const { value } = await expected.next();
      comparisons.push(await comparer.compare(value!, logits.data as Float32Array, vocabSize, ids.slice(1)));
    }
    await expected.return(undefined);
    return summarize(comparisons);
  } finally {
    await session.release();
    await reference.dispose();
    await comparer.dispose();
  }
}
