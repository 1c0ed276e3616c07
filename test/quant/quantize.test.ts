import { readFileSync } from "node:fs";
import * as ort from "onnxruntime-node";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { type Activations, BlockRunner, floatName } from "../../quant/block-runner.ts";
import { ortProducts } from "../../quant/products.ts";
import { type QuantizeTools, quantizeModel } from "../../quant/quantize.ts";
import type { QuantizedModel } from "../../quant/quantized-model.ts";
import { awq, gptq, hqq, preset, prune, type Recipe, rtn } from "../../quant/recipes.ts";
import { memoryLayerStore } from "../../quant/record.ts";
import { type Model, resolveModel } from "../../src/arch/index.ts";
import { floatWeights } from "../../src/arch/weights.ts";
import type { Checkpoint } from "../../src/checkpoint/checkpoint.ts";
import { BlockForward } from "../../src/eval/block-forward.ts";
import { measureDrift } from "../../src/eval/drift.ts";
import type { Ort } from "../../src/onnx/ort.ts";
import { dequantize } from "../../src/tensor/quantized.ts";
import { loadTokenizer } from "../../src/tokenizer/hf-tokenizer.ts";
import { openInMemory } from "../fixtures/open-in-memory.ts";
import { repoPath } from "../helpers.ts";

const SEQUENCE = 128;
let checkpoint: Checkpoint;
let model: Model;
let windows: number[][];
const products = ortProducts(ort as Ort);
const tools: QuantizeTools = { ort: ort as Ort, products };

beforeAll(async () => {
  checkpoint = await openInMemory(repoPath("models/stories260k"));
  model = resolveModel(checkpoint);
  const tokenizer = loadTokenizer(checkpoint.sideFiles, { config: checkpoint.config });
  const text = readFileSync(repoPath("models/stories260k/stories-sample.txt"), "utf8").replaceAll("<|endoftext|>", "");
  const ids = tokenizer.encode(text.slice(0, 30_000), { addSpecialTokens: false });
  windows = Array.from({ length: 24 }, (_, i) => ids.slice(i * SEQUENCE, (i + 1) * SEQUENCE));
});
afterAll(async () => {
  await products.dispose();
  await checkpoint.dispose();
});

const linears = () => [...checkpoint.tensors.keys()].filter((name) => name.endsWith("_proj.weight"));
const calibration = () => windows.slice(0, 16);
const few = (recipe: Recipe): Recipe => ({ ...recipe, windows: Math.min(recipe.windows, 16), head: undefined });

async function drift(quantized: QuantizedModel): Promise<number> {
  const { kl } = await measureDrift(
    ort as Ort,
    model,
    floatWeights(checkpoint),
    quantized.dequantized,
    windows.slice(16),
  );
  return kl.mean;
}

/** All codes, scales, zero points and changed floats. */
async function valuesOf({ matrices, floats }: QuantizedModel): Promise<Map<string, unknown>> {
  const values = new Map<string, unknown>();
  for (const [name, { load }] of matrices) values.set(name, await load());
  for (const [name, load] of floats) values.set(name, await load());
  return values;
}

const dataOf = (activations: Activations, name: string) => activations.get(name)!.data as Float32Array;

function expectClose(a: Float32Array, b: Float32Array): void {
  expect(a.length).toBe(b.length);
  for (let i = 0; i < a.length; i++) if (!(Math.abs(a[i] - b[i]) < 5e-5)) expect(a[i]).toBeCloseTo(b[i], 4);
}

describe("a block cut at its sites", () => {
  test("computes what the whole block computes", async () => {
    const forward = new BlockForward(ort as Ort, model, floatWeights(checkpoint), SEQUENCE);
    const hidden = await forward.embed(windows.slice(0, 2));
    const data = new Float32Array(2 * hidden[0].length);
    for (const [i, state] of hidden.entries()) data.set(state, i * state.length);
    const runner = new BlockRunner(ort as Ort, model, SEQUENCE);
    const block = await runner.open(0);
    expect(block.sites.map((site) => site.length)).toEqual([3, 1, 2, 1]);
    expect(block.segments.length).toBe(5);
    // o and down are added to the residual stream
    expect(block.segments.map(({ residual }) => residual !== undefined)).toEqual([false, true, false, true, false]);
    expect(block.segments[1].residual?.before).toBe(BlockRunner.input);
    const { hiddenSize } = model.config;
    const input = new ort.Tensor("float32", data, [2, SEQUENCE, hiddenSize]);
    const activations = new Map([[BlockRunner.input, input as never]]);
    const wanted = block.segments.flatMap((segment) => floatName(segment) ?? []);
    const float = await block.runFloat(input as never, wanted);
    for (const segment of block.segments) {
      await block.run(segment, activations);
      // the streams are sums that the next segment makes, on its way to where it gives them out
      for (const name of wanted.filter((each) => activations.has(each))) {
        expectClose(dataOf(activations, name), dataOf(float, name));
      }
    }
    await forward.block(0, hidden);
    const [output] = block.segments.at(-1)!.writes;
    const whole = new Float32Array(hidden.length * hidden[0].length);
    for (const [i, state] of hidden.entries()) whole.set(state, i * state.length);
    expectClose(dataOf(activations, output), whole);
    expectClose(dataOf(float, output), whole);
    await runner.dispose();
    await forward.dispose();
  });
});

describe("quantizing a model", () => {
  test("gptq drifts less than rtn by a wide margin", async () => {
    const plain = await drift(await quantizeModel(model, few(rtn()), [], tools));
    const calibrated = await drift(await quantizeModel(model, few(gptq()), calibration(), tools));
    expect(calibrated).toBeLessThan(0.7 * plain);
  });

  test("aiming at the float prefix drifts less than aiming at the quantized one", async () => {
    const plain = await drift(await quantizeModel(model, few({ ...gptq(), asymmetry: 0 }), calibration(), tools));
    const aimed = await drift(await quantizeModel(model, few({ ...gptq(), asymmetry: 0.5 }), calibration(), tools));
    expect(aimed).toBeLessThan(0.95 * plain);
  });

  test("hqq needs no text, and drifts less than rtn", async () => {
    const quantized = await quantizeModel(model, few(hqq()), [], tools);
    expect(quantized.matrices.size).toBe(5 * 7);
    expect([...quantized.reports.values()].some(({ foldExponent }) => foldExponent !== undefined)).toBe(true);
    const plain = await drift(await quantizeModel(model, few(rtn()), [], tools));
    expect(await drift(quantized)).toBeLessThan(plain);
  });

  test("a recipe that calibrates says so when there is no text", async () => {
    await expect(quantizeModel(model, gptq(), [], tools)).rejects.toMatchObject({ code: "bad_option" });
  });

  test("a fold leaves the float function as it was", async () => {
    const quantized = await quantizeModel(model, few({ ...awq(), bits: 8 }), calibration(), tools);
    const folds = [...quantized.reports.values()].filter(({ foldExponent }) => foldExponent !== undefined);
    expect(folds.length).toBeGreaterThan(0);
    // 8-bit rounding of a folded model stays as close as that of an unfolded one: nothing but rounding was changed
    expect(await drift(quantized)).toBeLessThan(0.002);
  });

  test("the same text gives the same codes", async () => {
    const recipe = few(preset("fast"));
    const first = await quantizeModel(model, recipe, calibration(), tools);
    const second = await quantizeModel(model, recipe, calibration(), tools);
    expect(await valuesOf(second)).toEqual(await valuesOf(first));
  });

  test("an interrupted run goes on where it stopped, with the result it would have had", async () => {
    const recipe: Recipe = { ...preset("default", { headBits: 4 }), windows: 16 };
    const whole = await quantizeModel(model, recipe, calibration(), tools);
    const kept = new Map<string, Uint8Array>();
    const store = {
      get: async (key: string) => kept.get(key),
      put: async (key: string, bytes: Uint8Array) => void kept.set(key, bytes),
    };
    const stop = new AbortController();
    const interrupted = quantizeModel(model, recipe, calibration(), {
      ...tools,
      store,
      signal: stop.signal,
      onProgress: ({ done }) => done === 3 && stop.abort(),
    });
    await expect(interrupted).rejects.toThrow();
    expect(kept.size).toBeGreaterThanOrEqual(2);
    expect(kept.size).toBeLessThan(5);
    const resumed = await quantizeModel(model, recipe, calibration(), { ...tools, store });
    expect(await valuesOf(resumed)).toEqual(await valuesOf(whole));
    // a run that finds everything computes nothing
    const onTime = () => expect.unreachable("computed again");
    const again = await quantizeModel(model, recipe, calibration(), { ...tools, store, onTime });
    expect(await valuesOf(again)).toEqual(await valuesOf(whole));
    expect(again.reports).toEqual(whole.reports);
  });

  test("a model whose layers are gone says so", async () => {
    const store = memoryLayerStore();
    let isGone = false;
    const get = async (key: string) => (isGone ? undefined : store.get(key));
    const quantized = await quantizeModel(model, rtn(), [], { ...tools, store: { ...store, get } });
    isGone = true;
    await expect(quantized.weights.quantized(linears()[0])!.load()).rejects.toMatchObject({ code: "not_found" });
  });

  test("a tied 8-bit head is one matrix, within half a step of its weights", async () => {
    const quantized = await quantizeModel(model, rtn(), [], tools);
    const head = await quantized.matrices.get("model.embed_tokens.weight")!.load();
    expect(head.bits).toBe(8);
    const { data } = await checkpoint.readTensor("model.embed_tokens.weight");
    const values = dequantize(head);
    const groups = head.scales.length / head.rows;
    for (let i = 0; i < data.length; i++) {
      const scale = head.scales[Math.floor(i / head.cols) * groups + Math.floor((i % head.cols) / head.groupSize)];
      expect(Math.abs(values[i] - data[i])).toBeLessThanOrEqual(1.01 * scale);
    }
  });
});

describe("pruning a model", () => {
  const half = { method: "sparsegpt", sparsity: { n: 2, m: 4 } } as const;
  /** Smallest number of zeros in any four neighbours. */
  function fewestZeros(values: Float32Array): number {
    let fewest = 4;
    for (let at = 0; at < values.length; at += 4) {
      fewest = Math.min(fewest, values.subarray(at, at + 4).filter((w) => w === 0).length);
    }
    return fewest;
  }

  test("alone leaves the rest float, and drifts less by SparseGPT than by Wanda", async () => {
    const drifts: number[] = [];
    for (const method of ["sparsegpt", "wanda"] as const) {
      const pruned = await quantizeModel(model, few(prune({ ...half, method })), calibration(), tools);
      expect(pruned.matrices.size).toBe(0);
      for (const name of linears()) expect(fewestZeros(await pruned.weights.load(name))).toBe(2);
      drifts.push(await drift(pruned));
    }
    expect(drifts[0]).toBeLessThan(0.9 * drifts[1]);
  });

  test("before any way of rounding leaves zeros where it put them", async () => {
    for (const recipe of [rtn({ prune: half }), hqq({ prune: half }), preset("default", { prune: half })]) {
      const pruned = await quantizeModel(model, few(recipe), calibration(), tools);
      for (const name of linears()) expect(fewestZeros(await pruned.dequantized.load(name))).toBeGreaterThanOrEqual(2);
    }
  });

  test("interrupted goes on with the result it would have had", async () => {
    const recipe = few(prune({ method: "sparsegpt", sparsity: 0.5 }));
    const whole = await quantizeModel(model, recipe, calibration(), tools);
    const [first, store] = [memoryLayerStore(), memoryLayerStore()];
    await quantizeModel(model, recipe, calibration(), { ...tools, store: first });
    for (const key of ["layer-0.bin", "layer-1.bin"]) await store.put(key, (await first.get(key))!);
    const resumed = await quantizeModel(model, recipe, calibration(), { ...tools, store });
    for (const name of linears()) expect(await resumed.weights.load(name)).toEqual(await whole.weights.load(name));
  });

  test("and learned rounding, which would move what is zero, are refused together", async () => {
    const both = quantizeModel(model, preset("best", { prune: half, learn: true }), calibration(), tools);
    await expect(both).rejects.toMatchObject({ code: "unsupported" });
  });
});
