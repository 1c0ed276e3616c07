/**
 * What a compressed KV cache costs, apart from everything else: two caches of the same weights read the same text, and
 * only what is predicted from far back in it is scored.
 *   window   prefill (cached, not scored) | scored, a few tokens at a time, so that what they attend to comes out of
 *            the cache as it would while generating
 *   copy     A | other text | A again: what the second A costs more than with the reference's cache is lost recall
 */
import type { Ort } from "../onnx/ort.ts";
import type { OnProgress } from "../progress.ts";
import type { Rows } from "../runtime/session.ts";
import { type Comparison, LogitComparer } from "./compare.ts";
import { type Drift, joinComparisons, summarize } from "./drift.ts";

/** A cache with its model (`DecoderSession` and the sessions of other policies), emptied by an append at 0. */
export interface CachedModel {
  append(row: number, past: number, tokens: readonly number[], rows?: Rows): Promise<Float32Array[]>;
  readonly kvBytesAllocated: number;
}

export interface CacheDriftOptions {
  /** Tokens at the end of each window that are scored; default: a quarter of the window. */
  readonly scored?: number;
  /** Also measure recall by the copy task (default true). */
  readonly withCopy?: boolean;
  /** Tokens scored at once; default 16, about what is computed at once with guesses while generating. */
  readonly chunk?: number;
  readonly onProgress?: OnProgress;
  readonly signal?: AbortSignal;
}

export interface CacheDrift {
  /** Model against reference over the scored tokens of all windows. */
  readonly drift: Drift;
  /** exp(mean NLL) over the reference's, minus 1. */
  readonly perplexityChange: number;
  /** Mean NLL of the repeated part, in nats a token; absent where there were no two windows to make the task of. */
  readonly copy?: { readonly nll: number; readonly nllReference: number; readonly positions: number };
  /** Bytes of keys, values and everything that belongs to them, as allocated at the end of a window. */
  readonly kvBytes: number;
  readonly kvBytesReference: number;
}

/** Tokens of a prompt that are computed at once. */
const PREFILL = 512;
/** The repeated part is this share of a window, at its start and at its end. */
const COPY_SHARE = 1 / 8;
const DEFAULT_CHUNK = 16;

/** Windows are token ids of equal length; each two of them also make a copy task. */
export async function measureCache(
  ort: Ort,
  reference: CachedModel,
  model: CachedModel,
  windows: readonly (readonly number[])[],
  options: CacheDriftOptions = {},
): Promise<CacheDrift> {
  const length = windows[0].length;
  const { scored = Math.floor(length / 4), chunk = DEFAULT_CHUNK } = options;
  const comparer = new LogitComparer(ort);
  try {
    const task = copyTask(options.withCopy === false ? [] : windows, length);
    const texts = [...windows, ...task.texts];
    const results: Comparison[] = [];
    for (const [i, ids] of texts.entries()) {
      const from = i < windows.length ? length - scored : length - task.repeated + 1; // the first of A is no copy yet
      options.onProgress?.({ stage: "measure the KV cache", done: i, total: texts.length, unit: "windows" });
      results.push(await compareText(comparer, [reference, model], ids, from, chunk, options.signal));
    }
    const drift = summarize(results.slice(0, windows.length));
    const copies = results.slice(windows.length);
    return {
      drift,
      perplexityChange: drift.perplexity / drift.perplexityReference - 1,
      copy: copies.length > 0 ? recall(copies) : undefined,
      kvBytes: model.kvBytesAllocated,
      kvBytesReference: reference.kvBytesAllocated,
    };
  } finally {
    await comparer.dispose();
  }
}

function recall(copies: readonly Comparison[]): CacheDrift["copy"] {
  const positions = copies.reduce((total, { nll }) => total + nll.length, 0);
  const mean = (of: (part: Comparison) => Float32Array) =>
    copies.reduce((total, part) => total + of(part).reduce((sum, x) => sum + x, 0), 0) / positions;
  return { nll: mean((part) => part.nll), nllReference: mean((part) => part.nllReference), positions };
}

/** A | middle of another window | A, from each pair of neighbouring windows. */
function copyTask(windows: readonly (readonly number[])[], length: number): { texts: number[][]; repeated: number } {
  const repeated = Math.floor(length * COPY_SHARE);
  const texts: number[][] = [];
  for (let i = 0; i + 1 < windows.length; i += 2) {
    const part = windows[i].slice(0, repeated);
    texts.push([...part, ...windows[i + 1].slice(repeated, -repeated), ...part]);
  }
  return { texts, repeated };
}

/** The tokens from position `from` on, each predicted from all before it. */
async function compareText(
  comparer: LogitComparer,
  models: readonly [CachedModel, CachedModel],
  ids: readonly number[],
  from: number,
  chunk: number,
  signal: AbortSignal | undefined,
): Promise<Comparison> {
  const first = from - 1; // its logits predict the token at `from`
  for (let start = 0; start < first; start += PREFILL) {
    signal?.throwIfAborted();
    const part = ids.slice(start, Math.min(first, start + PREFILL));
    for (const model of models) await model.append(0, start, part);
  }
  const parts: Comparison[] = [];
  for (let start = first; start + 1 < ids.length; start += chunk) {
    signal?.throwIfAborted();
    const tokens = ids.slice(start, Math.min(ids.length - 1, start + chunk));
    const logits: Float32Array[] = [];
    for (const model of models) logits.push(together(await model.append(0, start, tokens, "all")));
    const vocab = logits[0].length / tokens.length;
    parts.push(await comparer.compare(logits[0], logits[1], vocab, ids.slice(start + 1, start + 1 + tokens.length)));
  }
  return joinComparisons(parts);
}

/** (rows, vocab) in memory of its own. */
function together(rows: readonly Float32Array[]): Float32Array {
  const all = new Float32Array(rows.length * rows[0].length);
  for (const [i, row] of rows.entries()) all.set(row, i * row.length);
  return all;
}
