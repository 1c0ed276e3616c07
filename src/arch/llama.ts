/**
 * Llama 2 and 3.x, SmolLM2 (Touvron et al. 2023, arXiv 2307.09288; Llama 3: arXiv 2407.21783): pre-norm, grouped-query
 * attention, RoPE, SwiGLU.
 */
import type { Architecture, DecoderConfig } from "./architecture.ts";
import type { ConfigReader } from "./config.ts";
import { ACTIVATIONS, type Activation } from "./model-builder.ts";
import { type Rope, readRope } from "./rope.ts";
import { gatedMlpScaling, valueToOutput } from "./scaling.ts";

export interface LlamaConfig extends DecoderConfig {
  readonly rmsNormEps: number;
  readonly activation: Activation;
  readonly rope: Rope;
  /** Per layer: how many positions a query sees; left out, all of them see everything. */
  readonly windows?: readonly (number | undefined)[];
}

/** Where a family's config class differs from LlamaConfig in what a missing key means. */
export interface LlamaDefaults {
  readonly tied?: boolean;
  readonly headDim?: number;
  readonly theta?: number;
  readonly epsilonKey?: string;
  readonly activationKey?: string;
  readonly activation?: Activation;
}

/** The keys that every Llama-like family shares. */
export function readLlamaConfig(config: ConfigReader, defaults: LlamaDefaults = {}): LlamaConfig {
  const heads = config.int("num_attention_heads");
  const hiddenSize = config.int("hidden_size");
  const headDim = config.int("head_dim", defaults.headDim ?? hiddenSize / heads);
  const maxPositions = config.int("max_position_embeddings", 2048);
  config.ignore("intermediate_size"); // the matrices say it
  return {
    modelType: config.modelType,
    layers: config.int("num_hidden_layers"),
    hiddenSize,
    vocabSize: config.int("vocab_size"),
    heads,
    kvHeads: config.int("num_key_value_heads", heads),
    headDim,
    maxPositions,
    tied: config.boolean("tie_word_embeddings", defaults.tied ?? false),
    rmsNormEps: config.number(defaults.epsilonKey ?? "rms_norm_eps", 1e-6),
    activation: config.choice(defaults.activationKey ?? "hidden_act", ACTIVATIONS, defaults.activation ?? "silu"),
    rope: readRope(config, { headDim, maxPositions, theta: defaults.theta }),
  };
}

export const llama: Architecture<LlamaConfig> = {
  modelTypes: ["llama"],

  readConfig(config) {
    config.ignore("attention_bias", "mlp_bias"); // a bias is there or not
    config.ignore("rope_interleaved"); // llama2.c's own spelling; the weights are permuted already
    return readLlamaConfig(config);
  },

  blockName: (layer) => `model.layers.${layer}`,
  embeddingName: "model.embed_tokens",
  headName: (config) => (config.tied ? "model.embed_tokens" : "lm_head"),

  embed: (m, ids) => m.embedding(ids, "model.embed_tokens"),

  block(m, x, layer, config) {
    const at = `model.layers.${layer}`;
    const a = m.rmsNorm(x, `${at}.input_layernorm`, config.rmsNormEps); // (batch, seq, hidden)
    const [q, k, v] = m.linears(a, [`${at}.self_attn.q_proj`, `${at}.self_attn.k_proj`, `${at}.self_attn.v_proj`]);
    const attended = m.attention(q, k, v, { layer, ...config, window: config.windows?.[layer] }); // (batch, seq, heads * headDim)
    const h = m.add(x, m.linear(attended, `${at}.self_attn.o_proj`));
    const b = m.rmsNorm(h, `${at}.post_attention_layernorm`, config.rmsNormEps);
    return m.add(h, m.gatedMlp(b, `${at}.mlp`, config.activation));
  },

  finalNorm: (m, x, config) => m.rmsNorm(x, "model.norm", config.rmsNormEps),

  head: (m, x, config) => m.linear(x, config.tied ? "model.embed_tokens" : "lm_head"),

  scalingGroups(layer, config) {
    const at = `model.layers.${layer}`;
    return [
      {
        from: { norm: `${at}.input_layernorm` },
        to: [`${at}.self_attn.q_proj`, `${at}.self_attn.k_proj`, `${at}.self_attn.v_proj`],
      },
      valueToOutput(`${at}.self_attn`, config),
      ...gatedMlpScaling(`${at}.post_attention_layernorm`, `${at}.mlp`),
    ];
  },
};
