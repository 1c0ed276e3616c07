import { readFileSync } from "node:fs";
import * as ort from "onnxruntime-node";
import { describe, expect, test } from "vitest";
import { resolveModel } from "../../src/arch/index.ts";
import { floatWeights } from "../../src/arch/weights.ts";
import { openHfFolder } from "../../src/checkpoint/hf-folder.ts";
import { LogitComparer } from "../../src/eval/compare.ts";
import { measureDrift, summarize } from "../../src/eval/drift.ts";
import { nodeFolder } from "../../src/node/files.ts";
import type { Ort } from "../../src/onnx/ort.ts";
import { loadTokenizer } from "../../src/tokenizer/hf-tokenizer.ts";
import { isMissing, modelPath, sharedPath } from "../helpers.ts";

describe("comparing logits", () => {
  test("cross-entropy, divergence and agreement are those of the definition", async () => {
    const vocab = 8;
    const reference = Float32Array.from({ length: 2 * vocab }, (_, i) => Math.sin(3 * i));
    const logits = Float32Array.from({ length: 2 * vocab }, (_, i) => Math.sin(3 * i) + 0.3 * Math.cos(i));
    const next = [3, 6];
    const comparer = new LogitComparer(ort as Ort);
    const result = await comparer.compare(reference, logits, vocab, next);
    await comparer.dispose();
    const softmax = (values: Float32Array) => {
      const exps = [...values].map(Math.exp);
      const sum = exps.reduce((a, b) => a + b);
      return exps.map((e) => e / sum);
    };
    const order = (values: number[]) => values.map((_, i) => i).sort((a, b) => values[b] - values[a]);
    for (let i = 0; i < 2; i++) {
      const p = softmax(reference.subarray(i * vocab, (i + 1) * vocab));
      const q = softmax(logits.subarray(i * vocab, (i + 1) * vocab));
      expect(result.nllReference[i]).toBeCloseTo(-Math.log(p[next[i]]), 5);
      expect(result.nll[i]).toBeCloseTo(-Math.log(q[next[i]]), 5);
      expect(result.kl[i]).toBeCloseTo(
        p.reduce((sum, value, v) => sum + value * Math.log(value / q[v]), 0),
        5,
      );
      expect(result.top1[i]).toBe(Number(order(p)[0] === order(q)[0]));
      const five = new Set(order(q).slice(0, 5));
      expect(result.top5[i]).toBe(
        order(p)
          .slice(0, 5)
          .filter((v) => five.has(v)).length,
      );
    }
  });

  test("the summary takes means over windows for perplexity and over positions for the rest", () => {
    const window = (nll: number[], kl: number[]) => ({
      nllReference: Float32Array.from(nll, (x) => x - 0.5),
      nll: Float32Array.from(nll),
      kl: Float32Array.from(kl),
      top1: Float32Array.from(nll, () => 1),
      top5: Float32Array.from(nll, () => 4),
    });
    const drift = summarize([window([1, 3], [0.25, 0.5]), window([4], [0.75])]);
    expect(drift.positions).toBe(3);
    expect(drift.perplexity).toBeCloseTo(Math.exp(3), 4); // means 2 and 4
    expect(drift.perplexityReference).toBeCloseTo(Math.exp(2.5), 4);
    expect(drift.kl).toEqual({ mean: 0.5, median: 0.5, p99: 0.75, max: 0.75 });
    expect(drift.top1).toBe(1);
    expect(drift.top5).toBeCloseTo(0.8, 6);
  });
});

const checkpointPath = modelPath("smollm2/hf");
const textPath = sharedPath("data/wikitext2-test.txt");

test.skipIf(isMissing(checkpointPath) || isMissing(textPath))(
  "SmolLM2's perplexity by window is that of transformers on the same weights (needs NIBBLE_MODELS and NIBBLE_SHARED)",
  async () => {
    const golden = JSON.parse(readFileSync(sharedPath("models/smollm2-135m-instruct/golden.json"), "utf8"));
    const checkpoint = await openHfFolder(nodeFolder(checkpointPath));
    const model = resolveModel(checkpoint);
    const tokenizer = loadTokenizer(checkpoint.sideFiles, { config: checkpoint.config });
    // the first 20,000 characters hold more than two windows; cutting there moves no earlier token
    const ids = tokenizer.encode(readFileSync(textPath, "utf8").slice(0, 20_000), { addSpecialTokens: false });
    const windows = [ids.slice(0, 512), ids.slice(512, 1024)];
    const float = floatWeights(checkpoint);
    const drift = await measureDrift(ort as Ort, model, float, float, windows);
    const [a, b] = golden.perplexity.nll_per_window;
    // the folder differs from the golden's GGUF by float16 rounding of rescaled weights: 0.1 %, says its README
    expect(Math.abs(drift.perplexityReference / Math.exp((a + b) / 2) - 1)).toBeLessThan(1e-3);
    expect(drift.kl.max).toBeLessThan(1e-5);
    expect(drift.top1).toBe(1);
    await checkpoint.dispose();
  },
  300_000,
);
