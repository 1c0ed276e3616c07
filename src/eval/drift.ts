/**
 * What quantization cost: two sets of weights of one model (float and quantized) on the same windows of text, block by
 * block, so that models larger than memory can be compared.
 */
import type { Model } from "../arch/index.ts";
import type { Weights } from "../arch/weights.ts";
import type { Ort } from "../onnx/ort.ts";
import type { OnProgress } from "../progress.ts";
import { BlockForward, type Hidden } from "./block-forward.ts";
import { type Comparison, LogitComparer, RunningComparison } from "./compare.ts";

/** Over all scored positions. */
export interface Drift {
  readonly positions: number;
  /** exp of the mean over windows of each window's mean cross-entropy. */
  readonly perplexity: number;
  readonly perplexityReference: number;
  /** Nats by which a long context lowers the reference's loss; absent where there is too little text to tell. */
  readonly contextGainReference?: number;
  readonly kl: { readonly mean: number; readonly median: number; readonly p99: number; readonly max: number };
  /** Fraction of positions with the same likeliest token. */
  readonly top1: number;
  /** Mean fraction of the reference's five likeliest tokens among the model's five. */
  readonly top5: number;
}

export interface DriftOptions {
  readonly onProgress?: OnProgress;
  readonly signal?: AbortSignal;
  /** `finalStates` of the reference on the same windows, where they are known already: half of the work. */
  readonly referenceStates?: readonly Hidden[];
}

/** What a model's blocks make of each window, (seq, hidden): all but the last norm and the head. */
export async function finalStates(
  ort: Ort,
  model: Model,
  weights: Weights,
  windows: readonly (readonly number[])[],
): Promise<Hidden[]> {
  const forward = new BlockForward(ort, model, weights, Math.max(...windows.map((ids) => ids.length)));
  try {
    const hidden = await forward.embed(windows);
    for (let layer = 0; layer < model.config.layers; layer++) await forward.block(layer, hidden);
    return hidden;
  } finally {
    await forward.dispose();
  }
}

/** KL(reference || weights) and more; windows are token ids, scored at positions 1 and on, given those before. */
export async function measureDrift(
  ort: Ort,
  model: Model,
  reference: Weights,
  weights: Weights,
  windows: readonly (readonly number[])[],
  { onProgress, signal, referenceStates }: DriftOptions = {},
): Promise<Drift> {
  const maxPositions = Math.max(...windows.map((ids) => ids.length));
  const forwards = [reference, weights].map((w) => new BlockForward(ort, model, w, maxPositions));
  const comparer = new LogitComparer(ort);
  const { layers } = model.config;
  try {
    const hidden = [
      referenceStates ? [...referenceStates] : await forwards[0].embed(windows),
      await forwards[1].embed(windows),
    ];
    for (let layer = 0; layer < layers; layer++) {
      onProgress?.({ stage: "measure drift", done: layer, total: layers + 1, unit: "layers" });
      if (!referenceStates) await forwards[0].block(layer, hidden[0], signal);
      await forwards[1].block(layer, hidden[1], signal);
    }
    const onPart = (share: number) =>
      onProgress?.({ stage: "measure drift", done: layers + share, total: layers + 1, unit: "layers" });
    const [compared] = await compareStates(comparer, forwards, hidden, windows, { onPart, signal });
    return summarize(compared);
  } finally {
    for (const forward of forwards) await forward.dispose();
    await comparer.dispose();
  }
}

/**
 * Each of several models compared with the first, window by window, from what their blocks made of the text. Logits are the
 * largest tensors of all, and the head the largest weight: both come in parts.
 */
export async function compareStates(
  comparer: LogitComparer,
  forwards: readonly BlockForward[],
  hidden: readonly (readonly Hidden[])[],
  windows: readonly (readonly number[])[],
  { onPart, signal }: { readonly onPart?: (share: number) => void; readonly signal?: AbortSignal } = {},
): Promise<Comparison[][]> {
  const { hiddenSize } = forwards[0].model.config;
  const running = forwards
    .slice(1)
    .map(() => windows.map((ids) => cutAt(ids.slice(1), POSITIONS).map((next) => new RunningComparison(next))));
  const rows = forwards[0].headRows;
  const width = Math.ceil(rows / Math.ceil(rows / VOCABULARY));
  for (let first = 0; first < rows; first += width) {
    onPart?.(first / rows);
    const size = Math.min(rows - first, width);
    const heads: Awaited<ReturnType<BlockForward["head"]>>[] = [];
    for (const forward of forwards) heads.push(await forward.head(first, first + size));
    for (const [window, ids] of windows.entries()) {
      for (let start = 0, part = 0; start < ids.length - 1; start += POSITIONS, part++) {
        signal?.throwIfAborted();
        const end = Math.min(start + POSITIONS, ids.length - 1);
        const logits = (i: number) => heads[i](hidden[i][window].subarray(start * hiddenSize, end * hiddenSize));
        const reference = await logits(0);
        for (const [i, of] of running.entries()) {
          await comparer.add(of[window][part], reference, await logits(i + 1), first, size);
        }
      }
    }
  }
  return running.map((of) => of.map((parts) => joinComparisons(parts.map((part) => part.result()))));
}

/** Positions and token ids whose logits are held at once: 8 MB for each of the models. */
const POSITIONS = 128;
const VOCABULARY = 16384;

function cutAt(ids: readonly number[], length: number): number[][] {
  return Array.from({ length: Math.ceil(ids.length / length) }, (_, i) => ids.slice(i * length, (i + 1) * length));
}

/** Parts of one window as one. */
export function joinComparisons(parts: readonly Comparison[]): Comparison {
  const join = (of: (part: Comparison) => Float32Array) => Float32Array.from(parts.flatMap((part) => [...of(part)]));
  return {
    nllReference: join((part) => part.nllReference),
    nll: join((part) => part.nll),
    kl: join((part) => part.kl),
    top1: join((part) => part.top1),
    top5: join((part) => part.top5),
  };
}

/** The figures over all windows. */
export function summarize(windows: readonly Comparison[]): Drift {
  const kl = Float64Array.from(windows.flatMap((window) => [...window.kl])).sort();
  const all = (of: (window: Comparison) => Float32Array) => mean(windows.flatMap((window) => [...of(window)]));
  const perplexity = (of: (window: Comparison) => Float32Array) =>
    Math.exp(mean(windows.map((window) => mean([...of(window)]))));
  return {
    positions: kl.length,
    perplexity: perplexity((window) => window.nll),
    perplexityReference: perplexity((window) => window.nllReference),
    contextGainReference: contextGain(windows.map((window) => window.nllReference)),
    kl: { mean: mean([...kl]), median: quantile(kl, 0.5), p99: quantile(kl, 0.99), max: kl[kl.length - 1] },
    top1: all((window) => window.top1),
    top5: all((window) => window.top5) / 5,
  };
}

/** A token's loss varies by some 2 nats, so the mean of 96 is known to 0.2; a language model gains 0.4 and more. */
const EARLY = 16;
const LATE = 64;
const MIN_EARLY_TOKENS = 96;

/** Mean loss at the first positions of each window less that at positions far inside it. */
function contextGain(losses: readonly Float32Array[]): number | undefined {
  const long = losses.filter((loss) => loss.length >= 2 * LATE);
  if (long.length * EARLY < MIN_EARLY_TOKENS) return undefined;
  const stretch = (start: number, end?: number) => mean(long.flatMap((loss) => [...loss.subarray(start, end)]));
  return stretch(0, EARLY) - stretch(LATE);
}

export function mean(values: readonly number[]): number {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}

/** The value below which this fraction of a sorted list lies. */
function quantile(sorted: Float64Array, fraction: number): number {
  return sorted[Math.min(sorted.length - 1, Math.floor(fraction * sorted.length))];
}
