import { describe, expect, test } from "vitest";
import { checkShapes } from "../../src/checkpoint/check-shapes.ts";

const config = {
  hidden_size: 8,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  num_hidden_layers: 2,
  vocab_size: 10,
  num_experts: 2,
};
const shapes: Record<string, number[]> = {
  "model.embed_tokens.weight": [10, 8],
  "lm_head.weight": [10, 8],
  "model.layers.0.self_attn.q_proj.weight": [8, 8],
  "model.layers.0.self_attn.k_proj.weight": [4, 8],
  "model.layers.1.mlp.experts.1.up_proj.weight": [6, 8],
};
const tensors = new Map(Object.entries(shapes).map(([name, shape]) => [name, { name, shape, storedAs: "f32" }]));
const check = (changes: object) => () => checkShapes({ ...config, ...changes }, tensors, "m");

describe("a config that contradicts the weights", () => {
  test.each<[object, RegExp]>([
    [{ num_hidden_layers: 1 }, /"model\.layers\.1\.mlp.* layer 1, but config\.json's num_hidden_layers is 1/],
    [{ num_experts: 1 }, /expert 1, but config\.json's num_experts is 1/],
    [{ vocab_size: 9 }, /"model\.embed_tokens\.weight" is \[10, 8\].*\[9, 8\]/],
    [{ hidden_size: 16, head_dim: 2 }, /\[10, 16\]/],
    [{ num_attention_heads: 8, head_dim: 2 }, /q_proj.*num_attention_heads and head_dim ask for \[16, 8\]/],
    [{ num_key_value_heads: 4 }, /k_proj.*num_key_value_heads and head_dim ask for \[8, 8\]/],
    [{ head_dim: 4 }, /q_proj.*\[16, 8\]/],
  ])("%o", (changes, message) => {
    expect(check(changes)).toThrow(
      expect.objectContaining({ code: "bad_weights", message: expect.stringMatching(message) }),
    );
  });

  test("and one that does not, or leaves keys out", () => {
    expect(check({})).not.toThrow();
    expect(() => checkShapes({ model_type: "x" }, tensors, "m")).not.toThrow();
  });
});
