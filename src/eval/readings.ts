/**
 * Whether a checkpoint is computed as it was trained: the same weights read in the other ways that occur (another rotary
 * base, pairs of channels side by side instead of half a head apart, norms exchanged, gains stored less 1, another
 * activation) on a few short windows. A trained model is best in its own way, by far; where another one is clearly better,
 * the config or the weights are wrong, and it says which part. The models run block by block.
 */
import type { DecoderConfig } from "../arch/architecture.ts";
import type { Model } from "../arch/index.ts";
import type { Activation } from "../arch/model-builder.ts";
import type { Rope } from "../arch/rope.ts";
import { floatWeights, type Weights } from "../arch/weights.ts";
import { NibbleError } from "../errors.ts";
import type { Ort } from "../onnx/ort.ts";
import { BlockForward } from "./block-forward.ts";
import { LogitComparer } from "./compare.ts";
import { compareStates, type DriftOptions, mean } from "./drift.ts";

/** One way to read a checkpoint. */
export interface Reading {
  /** What would be different, for messages: "rotary base 10000 instead of 500000". */
  readonly what: string;
  readonly model: Model;
  /** The checkpoint's weights as this reading takes them. */
  weights(stored: Weights): Weights;
}

/** What a reading makes of text, beside what the checkpoint's own makes of it. */
export interface ReadingLoss {
  readonly what: string;
  /** Mean cross-entropy, nats a token. */
  readonly loss: number;
  /** By how much the checkpoint's own reading is worse: mean and standard error over tokens. */
  readonly gain: number;
  readonly gainError: number;
}

/** Enough text to tell a reading that loses 0.1 nats from chance, and few enough passes to be a small part of the work. */
const WINDOWS = 2;
const WINDOW_TOKENS = 256;
/** Nats a token, and standard errors, by which another reading has to be better. */
const CLEAR_GAIN = 0.05;
const CLEAR_ERRORS = 4;

/** Many sessions take turns: those that wait must not spin on the cores of the one that runs. */
const SESSION = { extra: { session: { force_spinning_stop: "1" } } };

/** Rotary bases of published models. */
const BASES = [10_000, 100_000, 500_000, 1_000_000];

/** The other readings that the family has. */
export function otherReadings(model: Model): Reading[] {
  const changed = (change: object): Model => ({ ...model, config: { ...model.config, ...change } });
  const { rope, activation } = model.config as DecoderConfig & { rope?: Rope; activation?: Activation };
  const readings: Reading[] = [];
  const add = (what: string, reading: Partial<Reading>) =>
    readings.push({ what, model, weights: (stored) => stored, ...reading });
  const base = rope && plainBase(rope);
  if (rope && base !== undefined) {
    for (const other of BASES) {
      if (Math.abs(other / base - 1) < 1e-3) continue;
      const frequencies = rope.frequencies.map((_, i) => other ** ((-2 * i) / rope.rotaryDim));
      add(`rotary base ${other} instead of ${Math.round(base)}`, {
        model: changed({ rope: { ...rope, frequencies } }),
      });
    }
  }
  if (rope) {
    const half = rope.rotaryDim / 2;
    const apart = (i: number) => (i < half ? 2 * i : 2 * (i - half) + 1);
    const together = (i: number) => (i % 2 ? half + (i - 1) / 2 : i / 2);
    for (const [what, source] of [
      ["query and key rows for rotary pairs side by side, as they are for pairs half a head apart", apart],
      ["query and key rows for rotary pairs half a head apart, as they are for pairs side by side", together],
    ] as const) {
      add(what, {
        weights: (stored) => withHeadRows(stored, model.config.headDim, (i) => (i < rope.rotaryDim ? source(i) : i)),
      });
    }
  }
  if (activation !== undefined) {
    const other = activation === "silu" || activation === "swish" ? "gelu_pytorch_tanh" : "silu";
    add(`activation ${other} instead of ${activation}`, { model: changed({ activation: other }) });
  }
  const norms = normsOf(model, 0);
  if (norms.length === 2) {
    const short = norms.map(({ norm }) => norm.slice(model.arch.blockName(0).length + 1));
    add(`${short[0]} and ${short[1]} exchanged`, { weights: (stored) => withNormsExchanged(stored, model) });
  }
  if (norms.length > 0) {
    const offset = norms[0].gainOffset === 0 ? 1 : -1;
    add(`norm gains ${offset > 0 ? "stored less 1" : "stored as they are"}`, {
      weights: (stored) => withGains(stored, offset),
    });
  }
  return readings;
}

/**
 * Error `verification` where another reading is a language model and clearly better than the checkpoint's own.
 * @param limit nats a token that a language model stays below
 */
export async function requireBestReading(
  ort: Ort,
  model: Model,
  windows: readonly (readonly number[])[],
  limit: number,
  options: Pick<DriftOptions, "onProgress" | "signal"> = {},
): Promise<void> {
  const text = windows.slice(0, WINDOWS).map((ids) => ids.slice(0, WINDOW_TOKENS));
  const losses = await readingLosses(ort, model, otherReadings(model), text, options);
  const better = losses
    .filter(({ loss, gain, gainError }) => loss < limit && gain > Math.max(CLEAR_GAIN, CLEAR_ERRORS * gainError))
    .sort((a, b) => a.loss - b.loss);
  if (better.length === 0) return;
  const { what, loss, gain } = better[0];
  throw new NibbleError(
    "verification",
    `${model.checkpoint.name}: the float model is not what it was trained as. With ${what} its loss on held-back text is ` +
      `${loss.toFixed(2)} nats a token instead of ${(loss + gain).toFixed(2)}: correct config.json, or get the checkpoint again.`,
  );
}

/** What each reading makes of the windows, and by how much it is better than the checkpoint's own. */
export async function readingLosses(
  ort: Ort,
  model: Model,
  readings: readonly Reading[],
  windows: readonly (readonly number[])[],
  { onProgress, signal }: Pick<DriftOptions, "onProgress" | "signal"> = {},
): Promise<ReadingLoss[]> {
  const maxPositions = Math.max(...windows.map((ids) => ids.length));
  const own = { model, weights: (weights: Weights) => weights };
  const weights = readOnce(floatWeights(model.checkpoint));
  const sessions = new Map(); // most readings differ in their weights alone
  const forwards = [own, ...readings].map(
    (reading) => new BlockForward(ort, reading.model, reading.weights(weights), maxPositions, SESSION, sessions),
  );
  const comparer = new LogitComparer(ort, SESSION);
  try {
    const embedded = await forwards[0].embed(windows);
    const hidden = forwards.map(() => [...embedded]);
    const { layers } = model.config;
    for (let layer = 0; layer < layers; layer++) {
      onProgress?.({ stage: "other readings", done: layer, total: layers, unit: "layers" });
      weights.forget();
      for (const [i, forward] of forwards.entries()) await forward.block(layer, hidden[i], signal);
    }
    weights.forget();
    const compared = await compareStates(comparer, forwards, hidden, windows, { signal });
    return readings.map(({ what }, i) => {
      const gains = compared[i].flatMap(({ nll, nllReference }) => [...nll].map((loss, j) => nllReference[j] - loss));
      const gain = mean(gains);
      const gainError = Math.sqrt(mean(gains.map((each) => (each - gain) ** 2)) / gains.length);
      return { what, loss: mean(compared[i].flatMap(({ nll }) => [...nll])), gain, gainError };
    });
  } finally {
    for (const forward of forwards) await forward.dispose();
    await comparer.dispose();
  }
}

/** Weights that are read once for all readings: those of a block until `forget`, and one range of rows. */
function readOnce(weights: Weights): Weights & { forget(): void } {
  const whole = new Map<string, Promise<Float32Array>>();
  let rows: { readonly key: string; readonly data: Promise<Float32Array> } | undefined;
  return {
    ...weights,
    load: (tensor) => {
      const data = whole.get(tensor) ?? weights.load(tensor);
      whole.set(tensor, data);
      return data;
    },
    ...(weights.loadRows && {
      loadRows: (tensor: string, start: number, end: number) => {
        const key = `${tensor} ${start} ${end}`;
        if (rows?.key !== key) rows = { key, data: weights.loadRows!(tensor, start, end) };
        return rows.data;
      },
    }),
    forget: () => whole.clear(),
  };
}

/** The base b of frequencies b^(-2i/dim), or undefined where they are scaled in some way. */
function plainBase({ frequencies, rotaryDim, attentionFactor, long }: Rope): number | undefined {
  if (frequencies.length < 2 || attentionFactor !== 1 || long || frequencies[0] !== 1) return undefined;
  const last = frequencies.length - 1;
  const base = frequencies[last] ** (-rotaryDim / (2 * last));
  const isPlain = frequencies.every((f, i) => Math.abs(f * base ** ((2 * i) / rotaryDim) - 1) < 1e-3);
  return isPlain ? base : undefined;
}

/** Norms that linears of a block read. */
function normsOf(model: Model, layer: number): { readonly norm: string; readonly gainOffset: number }[] {
  const groups = model.arch.scalingGroups(layer, model.config);
  return groups.flatMap(({ from }) => ("norm" in from ? [{ norm: from.norm, gainOffset: from.gainOffset ?? 0 }] : []));
}

function withNormsExchanged(weights: Weights, model: Model): Weights {
  const other = new Map<string, string>();
  for (let layer = 0; layer < model.config.layers; layer++) {
    const [first, second] = normsOf(model, layer).map(({ norm }) => norm);
    if (first === undefined || second === undefined) continue;
    for (const part of ["weight", "bias"]) {
      other.set(`${first}.${part}`, `${second}.${part}`).set(`${second}.${part}`, `${first}.${part}`);
    }
  }
  return { ...weights, load: (tensor) => weights.load(other.get(tensor) ?? tensor) };
}

/** `offset` added to every norm's gain. */
function withGains(weights: Weights, offset: number): Weights {
  return {
    ...weights,
    load: async (tensor) => {
      const data = await weights.load(tensor);
      const isGain = weights.shape(tensor).length === 1 && /(norm|ln_\w+)\.weight$/.test(tensor);
      return isGain ? data.map((gain) => gain + offset) : data;
    },
  };
}

/** Queries and keys with each head's row i taken from row source(i). */
function withHeadRows(weights: Weights, headDim: number, source: (row: number) => number): Weights {
  return {
    ...weights,
    load: async (tensor) => {
      const data = await weights.load(tensor);
      if (!/[._][qk]_(proj|norm|layernorm)\.(weight|bias)$/.test(tensor)) return data;
      const [rows] = weights.shape(tensor);
      const width = data.length / rows;
      const out = new Float32Array(data.length);
      for (let row = 0; row < rows; row++) {
        const from = row - (row % headDim) + source(row % headDim);
        out.set(data.subarray(from * width, (from + 1) * width), row * width);
      }
      return out;
    },
  };
}
