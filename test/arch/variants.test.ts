/**
 * Keys of a config that no golden model sets: each is checked by an equality that holds in the family's own definition,
 * or by a change that it has to make.
 */
import { expect, test } from "vitest";
import { resolveModel } from "../../src/arch/index.ts";
import type { Checkpoint } from "../../src/checkpoint/checkpoint.ts";
import type { FloatTensor } from "../../src/tensor/dtypes.ts";
import { openInMemory } from "../fixtures/open-in-memory.ts";
import { isMissing, repoPath, sharedPath } from "../helpers.ts";
import { Decoder, floats, maxDifference } from "./golden-model.ts";
import { changed, normals } from "./random-checkpoint.ts";

const TOLERANCE = 2e-4; // as in golden.test.ts
const IDS = Array.from({ length: 40 }, (_, i) => (i * 37 + 5) % 500);
const golden = (name: string) => sharedPath("golden", "models", name);

async function logits(checkpoint: Checkpoint): Promise<Float32Array> {
  const decoder = await Decoder.of(resolveModel(checkpoint));
  const outputs = await decoder.run([IDS], [IDS.map(() => 1)]);
  await decoder.dispose();
  return floats(outputs.logits);
}

const vector = (values: Float32Array): FloatTensor => ({ shape: [values.length], data: values });

test("Qwen2: use_sliding_window from layer 0 on is a window in every layer, one longer than the text is none", async () => {
  const base = await openInMemory(repoPath("test", "golden", "models", "qwen2-yarn"));
  const windowed = (sliding_window: number) =>
    logits(changed(base, { use_sliding_window: true, sliding_window, max_window_layers: 0 }));
  const plain = await logits(base);
  expect(maxDifference(await windowed(IDS.length), plain)).toBeLessThan(TOLERANCE);
  const short = await windowed(8);
  const vocab = short.length / IDS.length;
  expect(maxDifference(short.subarray(0, 8 * vocab), plain.subarray(0, 8 * vocab))).toBeLessThan(TOLERANCE);
  expect(maxDifference(short.subarray(8 * vocab), plain.subarray(8 * vocab))).toBeGreaterThan(0.1);
});

test("Phi: qk_layernorm with one gain g for all channels of unit keys scales scores as g does", async () => {
  const base = await openInMemory(repoPath("test", "golden", "models", "phi"));
  const {
    num_attention_heads: heads,
    hidden_size: hidden,
    num_hidden_layers: layers,
  } = base.config as Record<string, number>;
  const headDim = hidden / heads;
  const withGains = (query: number, key: number) => {
    const tensors = new Map<string, FloatTensor>();
    for (let layer = 0; layer < layers; layer++) {
      for (const [part, gain] of [
        ["q", query],
        ["k", key],
      ] as const) {
        const at = `model.layers.${layer}.self_attn.${part}_layernorm`;
        tensors.set(`${at}.weight`, vector(new Float32Array(headDim).fill(gain)));
        tensors.set(`${at}.bias`, vector(new Float32Array(headDim)));
      }
    }
    return logits(changed(base, { qk_layernorm: true }, tensors));
  };
  const one = await withGains(1, 1);
  expect(maxDifference(await withGains(2, 0.5), one)).toBeLessThan(TOLERANCE); // q k is all that counts
  expect(maxDifference(await withGains(2, 1), one)).toBeGreaterThan(0.01);
  expect(maxDifference(await logits(base), one)).toBeGreaterThan(0.01);
});

test.skipIf(isMissing(golden("stablelm")))(
  "StableLM 2 12B: every head is normed, by gains of its own; parallel is another function (needs NIBBLE_SHARED)",
  async () => {
    const base = await openInMemory(golden("stablelm"));
    const {
      num_attention_heads: heads,
      num_key_value_heads: kvHeads,
      hidden_size: hidden,
      num_hidden_layers: layers,
    } = base.config as Record<string, number>;
    const headDim = hidden / heads;
    const random = normals(3);
    const gains = { q: random(headDim), k: random(headDim) };
    const withHeadNorms = (factors: (head: number) => number) => {
      const tensors = new Map<string, FloatTensor>();
      for (let layer = 0; layer < layers; layer++) {
        for (const [part, count] of [
          ["q", heads],
          ["k", kvHeads],
        ] as const) {
          for (let head = 0; head < count; head++) {
            const name = `model.layers.${layer}.self_attn.${part}_layernorm.norms.${head}.weight`;
            const factor = part === "q" ? factors(head) : 1;
            tensors.set(name, vector(gains[part].map((gain) => gain * factor)));
          }
        }
      }
      return changed(base, { qk_layernorm: true }, tensors);
    };
    const equal = await logits(withHeadNorms(() => 1));
    // a factor on one head's gains is a factor on that head alone
    expect(maxDifference(await logits(withHeadNorms((head) => (head === 1 ? 3 : 1))), equal)).toBeGreaterThan(0.01);
    expect(maxDifference(await logits(base), equal)).toBeGreaterThan(0.01);
    const parallel = await logits(changed(base, { use_parallel_residual: true }));
    expect(maxDifference(parallel, await logits(base))).toBeGreaterThan(0.1);
  },
);

test.skipIf(isMissing(golden("gpt_neox")))(
  "GPT-NeoX without parallel residual adds attention before the MLP reads (needs NIBBLE_SHARED)",
  async () => {
    const base = await openInMemory(golden("gpt_neox"));
    const { num_hidden_layers: layers, hidden_size: hidden } = base.config as Record<string, number>;
    const mute = new Map<string, FloatTensor>();
    for (let layer = 0; layer < layers; layer++) {
      const at = `gpt_neox.layers.${layer}.attention.dense`;
      mute.set(`${at}.weight`, { shape: [hidden, hidden], data: new Float32Array(hidden * hidden) });
      mute.set(`${at}.bias`, vector(new Float32Array(hidden)));
    }
    const both = (use_parallel_residual: boolean, tensors?: typeof mute) =>
      logits(changed(base, { use_parallel_residual }, tensors));
    expect(maxDifference(await both(true), await both(false))).toBeGreaterThan(0.1);
    // where attention adds nothing, the order does not matter
    expect(maxDifference(await both(true, mute), await both(false, mute))).toBeLessThan(TOLERANCE);
  },
);

test.skipIf(isMissing(golden("gpt2")))(
  "GPT-2: scale_attn_by_inverse_layer_idx divides the queries of layer n by n + 1 (needs NIBBLE_SHARED)",
  async () => {
    const base = await openInMemory(golden("gpt2"));
    const { n_layer: layers, n_embd: hidden } = base.config as Record<string, number>;
    const divided = new Map<string, FloatTensor>();
    for (let layer = 0; layer < layers; layer++) {
      for (const kind of ["weight", "bias"]) {
        const name = `transformer.h.${layer}.attn.c_attn.${kind}`;
        const { shape, data } = await base.readTensor(name);
        const cut = data.map((x, i) => (i % (3 * hidden) < hidden ? x / (layer + 1) : x)); // columns of q come first
        divided.set(name, { shape, data: cut });
      }
    }
    const flagged = await logits(changed(base, { scale_attn_by_inverse_layer_idx: true }));
    expect(maxDifference(flagged, await logits(changed(base, {}, divided)))).toBeLessThan(TOLERANCE);
    expect(maxDifference(flagged, await logits(base))).toBeGreaterThan(0.1);
  },
);

test.skipIf(isMissing(golden("lfm2")))(
  "LFM2: layer_types and full_attn_idxs say the same, and a convolution's bias counts (needs NIBBLE_SHARED)",
  async () => {
    const base = await openInMemory(golden("lfm2"));
    const layer_types = ["conv", "conv", "full_attention", "conv"];
    expect(maxDifference(await logits(changed(base, { full_attn_idxs: null, layer_types })), await logits(base))).toBe(
      0,
    );
    const bias = new Map([["model.layers.0.conv.conv.bias", vector(new Float32Array(64).fill(0.5))]]);
    expect(maxDifference(await logits(changed(base, { conv_bias: true }, bias)), await logits(base))).toBeGreaterThan(
      0.01,
    );
  },
);
