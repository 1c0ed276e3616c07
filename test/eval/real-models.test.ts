/** The two real models, tokenizer to logits, against transformers: rendered chats, greedy answers, perplexity. */
import { readFileSync } from "node:fs";
import * as ort from "onnxruntime-node";
import { describe, expect, test } from "vitest";
import { resolveModel } from "../../src/arch/index.ts";
import { floatWeights } from "../../src/arch/weights.ts";
import { BlockForward } from "../../src/eval/block-forward.ts";
import { openCheckpoint } from "../../src/node/open-checkpoint.ts";
import { loadTokenizer } from "../../src/tokenizer/hf-tokenizer.ts";
import type { ChatMessage } from "../../src/tokenizer/tokenizer.ts";
import { isMissing, modelPath, sharedPath } from "../helpers.ts";

/** README of both models: greedy tokens are compared up to the first step with a smaller margin. */
const SAFE_MARGIN = 0.05;
/** README: perplexity within 0.1 %. */
const PERPLEXITY_TOLERANCE = 1e-3;
/** How many of the reference's windows: all would take minutes on two cores. */
const WINDOWS = 3;

/** README: float32 logits; SmolLM2's float16 folder is the GGUF's function to within 0.05. */
const LOGITS_TOLERANCE = 5e-3;
const LOGITS_TOLERANCE_OF_ROUNDED = 0.1;

interface Golden {
  readonly prompts: readonly {
    readonly input_ids: readonly number[];
    readonly top20_ids: readonly (readonly number[])[];
    readonly top20_logits: readonly (readonly number[])[];
  }[];
  readonly chats: readonly {
    readonly messages: readonly ChatMessage[];
    readonly tools?: readonly unknown[];
    readonly rendered: string;
    readonly input_ids: readonly number[];
    readonly greedy_tokens: readonly number[];
    readonly margins: readonly number[];
  }[];
  readonly perplexity: { readonly first_ids: readonly number[]; readonly nll_per_window: readonly number[] };
}

/** Logits of each text, by one pass over the blocks. */
async function logitsOf(path: string, texts: readonly (readonly number[])[]): Promise<Float32Array[]> {
  const checkpoint = await openCheckpoint(path);
  const model = resolveModel(checkpoint);
  const forward = new BlockForward(
    ort,
    model,
    floatWeights(model.checkpoint),
    Math.max(...texts.map((ids) => ids.length)),
  );
  const hidden = await forward.embed(texts);
  for (let layer = 0; layer < model.config.layers; layer++) await forward.block(layer, hidden);
  const logits: Float32Array[] = [];
  for await (const of of forward.logits(hidden)) logits.push(of.slice());
  await forward.dispose();
  await checkpoint.dispose();
  return logits;
}

function argmax(row: Float32Array): number {
  let best = 0;
  for (let i = 1; i < row.length; i++) if (row[i] > row[best]) best = i;
  return best;
}

/** Mean cross-entropy of tokens 1 .. given those before. */
function meanLoss(logits: Float32Array, ids: readonly number[]): number {
  const vocab = logits.length / ids.length;
  let sum = 0;
  for (let t = 1; t < ids.length; t++) {
    const row = logits.subarray((t - 1) * vocab, t * vocab);
    const largest = row[argmax(row)];
    let total = 0;
    for (const value of row) total += Math.exp(value - largest);
    sum += Math.log(total) + largest - row[ids[t]];
  }
  return sum / (ids.length - 1);
}

const cases = [
  { model: "smollm2", golden: "smollm2-135m-instruct", source: "smollm2-135m-instruct-q4_1.gguf" },
  { model: "smollm2", golden: "smollm2-135m-instruct", source: "hf" },
  { model: "qwen", golden: "qwen2.5-coder-0.5b-instruct", source: "hf" },
] as const;

describe.each(cases)("$golden from $source", ({ model, golden: folder, source }) => {
  const path = modelPath(model, source);
  const goldenPath = sharedPath("models", folder, "golden.json");
  const missing = isMissing(path) || isMissing(goldenPath);
  const read = () => JSON.parse(readFileSync(goldenPath, "utf8")) as Golden;
  const tokenizer = async () => {
    const checkpoint = await openCheckpoint(path);
    const loaded = loadTokenizer(checkpoint.sideFiles);
    await checkpoint.dispose();
    return loaded;
  };

  test.skipIf(missing)("chats, with tools where there are some, are rendered and encoded alike", async () => {
    const { applyChatTemplate, encode } = await tokenizer().then((t) => ({
      applyChatTemplate: t.applyChatTemplate.bind(t),
      encode: t.encode.bind(t),
    }));
    for (const { messages, tools, rendered, input_ids } of read().chats) {
      expect(applyChatTemplate(messages, { tools })).toBe(rendered);
      expect(encode(rendered, { addSpecialTokens: false })).toEqual(input_ids);
    }
  });

  test.skipIf(missing)(
    "the 20 largest logits at every position are the reference's",
    { timeout: 300_000 },
    async () => {
      const { prompts } = read();
      const logits = await logitsOf(
        path,
        prompts.map(({ input_ids }) => input_ids),
      );
      const tolerance = model === "smollm2" && source === "hf" ? LOGITS_TOLERANCE_OF_ROUNDED : LOGITS_TOLERANCE;
      for (const [n, { input_ids, top20_ids, top20_logits }] of prompts.entries()) {
        const vocab = logits[n].length / input_ids.length;
        for (const [position, ids] of top20_ids.entries()) {
          for (const [i, id] of ids.entries()) {
            expect(Math.abs(logits[n][position * vocab + id] - top20_logits[position][i])).toBeLessThan(tolerance);
          }
        }
      }
    },
  );

  // the float16 folder of SmolLM2 is the GGUF's function only to within 0.05 of a logit
  const safeMargin = model === "smollm2" && source === "hf" ? 0.2 : SAFE_MARGIN;

  test.skipIf(missing)(
    "the likeliest token is the reference's up to the first close call",
    { timeout: 300_000 },
    async () => {
      const { chats } = read();
      const texts = chats.map(({ input_ids, greedy_tokens }) => [...input_ids, ...greedy_tokens]);
      const logits = await logitsOf(path, texts);
      for (const [i, { input_ids, greedy_tokens, margins }] of chats.entries()) {
        const vocab = logits[i].length / texts[i].length;
        const close = margins.findIndex((margin) => margin < safeMargin);
        const steps = close < 0 ? greedy_tokens.length : close;
        const got = Array.from({ length: steps }, (_, step) => {
          const at = input_ids.length - 1 + step;
          return argmax(logits[i].subarray(at * vocab, (at + 1) * vocab));
        });
        expect(got).toEqual(greedy_tokens.slice(0, steps));
      }
    },
  );

  test.skipIf(missing)(
    `the loss of the first ${WINDOWS} windows is the reference's`,
    { timeout: 300_000 },
    async () => {
      const { perplexity } = read();
      const text = readFileSync(sharedPath("data", "wikitext2-test.txt"), "utf8").slice(0, 20_000 * WINDOWS);
      const ids = (await tokenizer()).encode(text, { addSpecialTokens: false });
      expect(ids.slice(0, perplexity.first_ids.length)).toEqual(perplexity.first_ids);
      const windows = Array.from({ length: WINDOWS }, (_, w) => ids.slice(w * 512, (w + 1) * 512));
      const logits = await logitsOf(path, windows);
      for (const [w, window] of windows.entries()) {
        const loss = meanLoss(logits[w], window);
        expect(Math.abs(loss - perplexity.nll_per_window[w])).toBeLessThan(PERPLEXITY_TOLERANCE);
      }
    },
  );
});
