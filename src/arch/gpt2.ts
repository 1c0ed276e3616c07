/**
 * GPT-2 (Radford et al. 2019): learned positions, pre-LayerNorm, full multi-head attention, a GELU MLP. Its matrices are
 * stored as Conv1D, (inFeatures, outFeatures), with q, k and v side by side, and with or without `transformer.` in front.
 */
import type { Architecture, DecoderConfig } from "./architecture.ts";
import { ACTIVATIONS, type Activation } from "./model-builder.ts";
import { normToAttention, valueToOutput } from "./scaling.ts";
import { viewCheckpoint } from "./view.ts";

interface Gpt2Config extends DecoderConfig {
  readonly layerNormEps: number;
  readonly activation: Activation;
  /** Scores are divided by the layer's number, counted from 1 (Mistral's GPT-2 runs). */
  readonly scaleByLayer: boolean;
}

export const gpt2: Architecture<Gpt2Config> = {
  modelTypes: ["gpt2"],

  readConfig(config) {
    config.ignore("n_ctx", "n_inner"); // the matrices say it
    config.ignore("reorder_and_upcast_attn"); // how half precision is kept from overflowing
    config.expect("scale_attn_weights", true);
    config.expect("add_cross_attention", false);
    const heads = config.int("n_head");
    const hiddenSize = config.int("n_embd");
    if (hiddenSize % heads) throw config.error("n_head", `${heads} does not divide n_embd ${hiddenSize}`);
    return {
      modelType: config.modelType,
      layers: config.int("n_layer"),
      hiddenSize,
      vocabSize: config.int("vocab_size"),
      heads,
      kvHeads: heads,
      headDim: hiddenSize / heads,
      maxPositions: config.int("n_positions", 1024),
      tied: config.boolean("tie_word_embeddings", true),
      layerNormEps: config.number("layer_norm_epsilon", 1e-5),
      activation: config.choice("activation_function", ACTIVATIONS, "gelu_new"),
      scaleByLayer: config.boolean("scale_attn_by_inverse_layer_idx", false),
    };
  },

  view(checkpoint, { hiddenSize }) {
    return viewCheckpoint(checkpoint, (stored) => {
      if (/\.attn\.(masked_)?bias$/.test(stored)) return []; // the causal mask, saved as if it were a weight
      const name = stored === "lm_head.weight" || stored.startsWith("transformer.") ? stored : `transformer.${stored}`;
      const [, at, linear, kind] = /^(.*\.)(c_attn|c_proj|c_fc)(\.weight|\.bias)$/.exec(name) ?? [];
      if (linear === undefined) return [{ name }];
      if (linear !== "c_attn") return [{ name, transposed: true }];
      return ["q_proj", "k_proj", "v_proj"].map((part, i) => ({
        name: `${at}${part}${kind}`,
        transposed: true,
        rows: [[i * hiddenSize, (i + 1) * hiddenSize]],
      }));
    });
  },

  blockName: (layer) => `transformer.h.${layer}`,
  embeddingName: "transformer.wte",
  headName: (config) => (config.tied ? "transformer.wte" : "lm_head"),

  embed: (m, ids) => m.add(m.embedding(ids, "transformer.wte"), m.learnedPositions("transformer.wpe")),

  block(m, x, layer, config) {
    const at = `transformer.h.${layer}`;
    const a = m.layerNorm(x, `${at}.ln_1`, config.layerNormEps); // (batch, seq, hidden)
    const [q, k, v] = m.linears(a, [`${at}.attn.q_proj`, `${at}.attn.k_proj`, `${at}.attn.v_proj`]);
    const scale = config.headDim ** -0.5 / (config.scaleByLayer ? layer + 1 : 1);
    const h = m.add(x, m.linear(m.attention(q, k, v, { layer, ...config, scale }), `${at}.attn.c_proj`));
    const b = m.layerNorm(h, `${at}.ln_2`, config.layerNormEps);
    const inner = m.activation(m.linear(b, `${at}.mlp.c_fc`), config.activation);
    return m.add(h, m.linear(inner, `${at}.mlp.c_proj`));
  },

  finalNorm: (m, x, config) => m.layerNorm(x, "transformer.ln_f", config.layerNormEps),

  head: (m, x, config) => m.linear(x, config.tied ? "transformer.wte" : "lm_head"),

  scalingGroups(layer, config) {
    const at = `transformer.h.${layer}`;
    return [
      normToAttention(`${at}.ln_1`, `${at}.attn`),
      valueToOutput(`${at}.attn`, config, "c_proj"),
      { from: { norm: `${at}.ln_2` }, to: [`${at}.mlp.c_fc`] },
    ];
  },
};
