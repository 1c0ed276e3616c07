/** Qwen2-MoE beyond its golden model: which layers are sparse. */
import { expect, test } from "vitest";
import { ConfigReader } from "../../src/arch/config.ts";
import { readSparseLayers } from "../../src/arch/qwen2-moe.ts";

const sparse = (json: Record<string, unknown>) => readSparseLayers(new ConfigReader(json, "test"), 4);

test("every decoder_sparse_step-th layer is a mixture, counted from 1", () => {
  expect(sparse({})).toEqual([true, true, true, true]);
  expect(sparse({ decoder_sparse_step: 2 })).toEqual([false, true, false, true]);
});

test("a layer of mlp_only_layers is dense whatever the step says", () => {
  expect(sparse({ mlp_only_layers: [1], decoder_sparse_step: 2 })).toEqual([false, false, false, true]);
});
