/** config.json as published: popular checkpoints of every family are accepted, and what changes the computation is not overlooked. */
import { readdirSync, readFileSync } from "node:fs";
import { basename, join } from "node:path";
import { describe, expect, test } from "vitest";
import { modelTypes, resolveConfig } from "../../src/arch/index.ts";
import type { LlamaConfig } from "../../src/arch/llama.ts";
import { textPart } from "../../src/checkpoint/text-part.ts";
import { repoPath } from "../helpers.ts";

type Json = Record<string, unknown>;
const folder = repoPath("test", "fixtures", "configs");
const published = new Map(
  readdirSync(folder).map((file) => [
    basename(file, ".json"),
    JSON.parse(readFileSync(join(folder, file), "utf8")) as Json,
  ]),
);
const embedding = new Map([["language_model.model.embed_tokens.weight", { shape: [262208, 2560] }]]); // gemma-3-4b's
const read = (json: Json) => resolveConfig(textPart(json, embedding, "test").config, "test").config as LlamaConfig;
const config = (name: string, changes: Json = {}) => read({ ...published.get(name), ...changes });

test.each([...published.keys()])("%s is read", (name) => {
  const { layers, heads, kvHeads, headDim, vocabSize } = config(name);
  for (const size of [layers, heads, kvHeads, headDim, vocabSize]) expect(size).toBeGreaterThan(0);
});

test("every family has a published config here", () => {
  const types = new Set([...published.values()].map((json) => textPart(json, embedding, "test").config.model_type));
  expect([...types].sort()).toEqual(modelTypes);
});

describe("what a config says arrives", () => {
  test("gemma-3-4b's nested text model has the defaults of its class and linear scaling on global layers only", () => {
    const gemma = config("gemma-3-4b-it") as LlamaConfig & { localRope: LlamaConfig["rope"] };
    expect(gemma).toMatchObject({ layers: 34, heads: 8, kvHeads: 4, headDim: 256, vocabSize: 262208, tied: true });
    expect(gemma.rope.frequencies[0]).toBeCloseTo(1 / 8);
    expect(gemma.localRope.frequencies[0]).toBe(1);
    expect(gemma.windows?.slice(0, 7)).toEqual([1024, 1024, 1024, 1024, 1024, undefined, 1024]);
  });

  test("both layouts of gemma-3-270m mean the same", () => {
    expect(config("gemma-3-270m-transformers-5")).toEqual(config("gemma-3-270m-it"));
  });

  test("a window counts in Qwen2 only with use_sliding_window, from max_window_layers on", () => {
    const windows = (changes: Json) => config("Qwen2.5-0.5B", changes).windows?.filter((w) => w !== undefined).length;
    expect(windows({})).toBe(0);
    expect(windows({ use_sliding_window: true })).toBe(0);
    expect(windows({ use_sliding_window: true, max_window_layers: 20 })).toBe(4);
  });

  test("Phi-4-mini rotates three quarters of each head, by two sets of frequencies", () => {
    const { rope, headDim } = config("Phi-4-mini-instruct");
    expect(rope.rotaryDim).toBe(0.75 * headDim);
    expect(rope.long?.above).toBe(4096);
  });

  test("every key layout gives Llama 3.2 the same rotary frequencies", () => {
    const { rope_theta, rope_scaling, ...rest } = published.get("Llama-3.2-1B-Instruct")!;
    const modern = read({ ...rest, rope_parameters: { rope_theta, ...(rope_scaling as Json) } });
    expect(modern.rope).toEqual(config("Llama-3.2-1B-Instruct").rope);
  });
});

describe("what Nibble does not compute is refused by name", () => {
  test.each([
    ["Llama-3.2-1B-Instruct", { attention_sink_size: 4 }, "attention_sink_size"],
    ["Llama-3.2-1B-Instruct", { rope_scaling: { type: "dynamic", factor: 2 } }, "dynamic"],
    ["Llama-3.2-1B-Instruct", { rope_scaling: { rope_type: "mystery" } }, "mystery"],
    ["Llama-3.2-1B-Instruct", { rope_scaling: { type: "linear", factor: 2, twist: 1 } }, "twist"],
    ["Llama-3.2-1B-Instruct", { hidden_act: "relu2" }, "relu2"],
    ["Llama-3.2-1B-Instruct", { num_key_value_heads: 5 }, "num_key_value_heads"],
    ["Qwen2.5-0.5B", { use_mrope: true }, "use_mrope"],
    ["OLMoE-1B-7B-0924", { clip_qkv: 8 }, "clip_qkv"],
    ["gpt2", { add_cross_attention: true }, "add_cross_attention"],
    ["gemma-3-270m-it", { use_bidirectional_attention: true }, "use_bidirectional_attention"],
    ["gemma-3-270m-it", { layer_types: Array(18).fill("chunked_attention") }, "chunked_attention"],
    ["SmolLM3-3B", { layer_types: ["full_attention"] }, "layer_types"],
    ["LFM2-350M", { block_use_swiglu: false }, "block_use_swiglu"],
    ["SmolLM2-135M-Instruct", { model_type: "llama9" }, "llama9"],
  ])("%s with %o", (name, changes, named) => {
    expect(() => config(name, changes)).toThrow(named);
  });
});
