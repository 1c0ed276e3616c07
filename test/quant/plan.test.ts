/** Plans as data, and what fitting one to a budget gives on stories260K. */
import { readFileSync } from "node:fs";
import * as ort from "onnxruntime-node";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { PlanFitter, type PlannedSize, sizeBySite } from "../../quant/fit.ts";
import {
  formatName,
  type Plan,
  parsePlan,
  plannedWeights,
  sitesOf,
  type WeightFormat,
  withPlan,
} from "../../quant/plan.ts";
import { ortProducts } from "../../quant/products.ts";
import { quantizeModel } from "../../quant/quantize.ts";
import { gptq, preset, type Recipe } from "../../quant/recipes.ts";
import { type Model, resolveModel } from "../../src/arch/index.ts";
import { floatWeights } from "../../src/arch/weights.ts";
import type { Checkpoint } from "../../src/checkpoint/checkpoint.ts";
import { measureDrift } from "../../src/eval/drift.ts";
import { mainGraph } from "../../src/export/export.ts";
import { writtenSize } from "../../src/onnx/external-data.ts";
import type { Ort } from "../../src/onnx/ort.ts";
import { loadTokenizer } from "../../src/tokenizer/hf-tokenizer.ts";
import { openInMemory } from "../fixtures/open-in-memory.ts";
import { repoPath } from "../helpers.ts";

const SEQUENCE = 128;
const LAYER = "model.layers.2.";
let checkpoint: Checkpoint;
let model: Model;
let windows: number[][];
const products = ortProducts(ort as Ort);
const tools = { ort: ort as Ort, products };
const recipe: Recipe = { ...preset("fast"), windows: 16 };

beforeAll(async () => {
  checkpoint = await openInMemory(repoPath("models/stories260k"));
  model = resolveModel(checkpoint);
  const tokenizer = loadTokenizer(checkpoint.sideFiles, { config: checkpoint.config });
  const text = readFileSync(repoPath("models/stories260k/stories-sample.txt"), "utf8").replaceAll("<|endoftext|>", "");
  const ids = tokenizer.encode(text.slice(0, 40_000), { addSpecialTokens: false });
  windows = Array.from({ length: 32 }, (_, i) => ids.slice(i * SEQUENCE, (i + 1) * SEQUENCE));
});
afterAll(async () => {
  await products.dispose();
  await checkpoint.dispose();
});

const format = (bits: number, groupSize: number): WeightFormat => ({ bits, groupSize, symmetric: false, scaleBits: 8 });

/** One format for linears, one for the head. */
function single(linears: WeightFormat, head: WeightFormat): Plan {
  return Object.fromEntries(
    sitesOf(model).flatMap((site) =>
      site.linears.map((name) => [name, site.layer === undefined ? head : linears] as const),
    ),
  );
}

function sizeOf(plan: Plan): PlannedSize {
  const graph = mainGraph({ model, weights: plannedWeights(model, plan) }, { dtype: "q4" });
  const { graphBytes, dataBytes } = writtenSize(graph);
  return { sizeBytes: graphBytes + dataBytes, perSite: sizeBySite(model, graph.initializers.values(), graphBytes) };
}

describe("a plan", () => {
  test("gives each matrix its format, and the recipe the bits of most weights", async () => {
    const plan: Plan = { ...single(format(4, 32), format(8, 32)), [`${LAYER}mlp.down_proj`]: format(3, 16) };
    const planned = withPlan(checkpoint, gptq(), plan);
    expect(planned).toMatchObject({ bits: 4, groupSize: 32, scaleBits: 8 });
    const quantized = await quantizeModel(model, { ...planned, windows: 4 }, windows.slice(0, 4), tools);
    for (const [name, { bits, groupSize }] of quantized.matrices) {
      expect({ name, bits, groupSize }).toMatchObject({ ...pick(plan[name.slice(0, -".weight".length)]) });
    }
    expect(Object.keys(quantized.extras)).toEqual(["plan.json"]);
    expect(parsePlan("plan.json", JSON.stringify(quantized.extras["plan.json"]))).toEqual(plan);
    expect(parsePlan("nibble.json", JSON.stringify({ recipe: quantized.recipe }))).toEqual(plan);
  });

  const pick = ({ bits, groupSize }: WeightFormat) => ({ bits, groupSize });

  test("of another model, or with two formats in one product, is refused by what is wrong", () => {
    const plan = single(format(4, 32), format(8, 32));
    const { [`${LAYER}mlp.down_proj`]: _, ...missing } = plan;
    for (const [wrong, what] of [
      [{ ...plan, "model.layers.9.mlp.down_proj": format(4, 32) }, /layers\.9/],
      [missing, /says nothing of model\.layers\.2\.mlp\.down_proj/],
      [{ ...plan, [`${LAYER}mlp.up_proj`]: format(3, 32) }, /one product/],
    ] as const) {
      expect(() => withPlan(checkpoint, gptq(), wrong)).toThrow(
        expect.objectContaining({ code: "bad_file", message: expect.stringMatching(what) }),
      );
    }
    const bits9 = { ...plan, "model.embed_tokens": format(9, 32) };
    expect(() => withPlan(checkpoint, gptq(), bits9)).toThrow(expect.objectContaining({ code: "bad_option" }));
  });

  test("in a file is read, and anything else is refused", () => {
    for (const text of ["{", "[]", "{}", '{"plan": []}', '{"plan": {"a": {"bits": 4}}}']) {
      expect(() => parsePlan("x.json", text)).toThrow(expect.objectContaining({ code: "bad_file" }));
    }
  });

  test("leaves the head float where it names none", async () => {
    const { "model.embed_tokens": _, ...linears } = single(format(4, 32), format(8, 32));
    const planned = { ...withPlan(checkpoint, gptq(), linears), windows: 2 };
    const quantized = await quantizeModel(model, planned, windows.slice(0, 2), tools);
    expect(quantized.matrices.has("model.embed_tokens.weight")).toBe(false);
  });

  test("formats have short names", () => {
    expect(formatName(format(4, 32))).toBe("4g32s8");
    expect(formatName({ bits: 8, groupSize: "row", symmetric: true })).toBe("8row sym");
    expect(formatName(undefined)).toBe("float");
  });
});

describe("fitting a plan", () => {
  let fitter: PlanFitter;
  beforeAll(async () => {
    fitter = await PlanFitter.measure(model, recipe, windows.slice(0, 16), sizeOf, tools);
  });
  /** At two bytes to a step, what rounding sizes up can cost. */
  const ROUNDING = 200;
  const singles = () => [
    single(format(4, 32), format(8, 32)),
    single(format(4, 128), format(4, 32)),
    single(format(3, 32), format(6, 32)),
  ];

  test("to a single setting's bytes never expects more drift than it", () => {
    for (const plan of singles()) {
      const { sizeBytes } = sizeOf(plan);
      const fitted = fitter.within(sizeBytes + ROUNDING);
      expect(fitted.sizeBytes).toBeLessThanOrEqual(sizeBytes + ROUNDING);
      expect(sizeOf(fitted.plan).sizeBytes).toBe(fitted.sizeBytes);
      expect(fitted.expectedKl).toBeLessThanOrEqual(fitter.expectedKl(plan));
    }
  });

  const driftOf = async (plan: Plan) => {
    const quantized = await quantizeModel(model, withPlan(checkpoint, recipe, plan), windows.slice(0, 16), tools);
    const float = floatWeights(checkpoint);
    return (await measureDrift(tools.ort, model, float, quantized.dequantized, windows.slice(16))).kl.mean;
  };

  /** By how much what is measured on other text, with all errors at once, may miss the sum of small ones. */
  const expectClose = (drift: number, expected: number) => {
    expect(drift / expected).toBeGreaterThan(0.5);
    expect(drift / expected).toBeLessThan(2);
  };

  test("to a single setting's bytes drifts less than it, and about as expected", async () => {
    for (const plan of singles()) {
      const fitted = fitter.within(sizeOf(plan).sizeBytes);
      const drift = await driftOf(fitted.plan);
      expect(drift).toBeLessThan(await driftOf(plan));
      expectClose(drift, fitted.expectedKl);
    }
  });

  test("to some bytes drifts less than the best single setting of as many", async () => {
    for (const budget of [240_000, 280_000]) {
      const single = fitter.single(budget)!;
      expect(single.sizeBytes).toBeLessThanOrEqual(budget);
      expect(sizeOf(single.plan).sizeBytes).toBe(single.sizeBytes);
      for (const plan of singles().filter((one) => sizeOf(one).sizeBytes <= budget)) {
        expect(single.expectedKl).toBeLessThanOrEqual(fitter.expectedKl(plan));
      }
      expect(await driftOf(fitter.within(budget).plan)).toBeLessThan(await driftOf(single.plan));
    }
    expect(fitter.single(1000)).toBeUndefined();
  });

  test("expects of a tied table what it costs as embedding and as head together", async () => {
    const fine = format(8, 32);
    for (const coarse of [format(3, 32), format(4, 32)]) {
      expectClose(await driftOf(single(fine, coarse)), fitter.expectedKl(single(fine, coarse)));
    }
  });

  test("to a drift takes the fewest bytes for it", () => {
    const { sizeBytes, expectedKl } = fitter.forKl(0.1);
    expect(expectedKl).toBeLessThanOrEqual(0.1);
    expect(fitter.within(sizeBytes - 2000).expectedKl).toBeGreaterThan(0.1);
  });

  test("says what is possible where it cannot", () => {
    expect(() => fitter.within(1000)).toThrow(
      expect.objectContaining({ message: expect.stringMatching(/smallest plan/) }),
    );
    expect(() => fitter.forKl(1e-9)).toThrow(expect.objectContaining({ message: expect.stringMatching(/possible/) }));
  });
});
