/**
 * Llama 2 and 3.x, SmolLM2 (Touvron et al. 2023, arXiv 2307.09288; Llama 3: arXiv 2407.21783): pre-norm, grouped-query
 * attention, RoPE, SwiGLU.
 */
import type { Value } from "../onnx/graph.ts";
import type { Architecture, DecoderConfig } from "./architecture.ts";
import type { ConfigReader } from "./config.ts";
import { type ConfigDefaults, type RotaryDecoderConfig, readDecoderConfig } from "./decoder-config.ts";
import type { ModelBuilder } from "./model-builder.ts";
import { gatedMlpScaling, valueToOutput } from "./scaling.ts";

export interface LlamaConfig extends RotaryDecoderConfig {
  readonly rmsNormEps: number;
  /** Per layer: how many positions a query sees; left out, all of them see everything. */
  readonly windows?: readonly (number | undefined)[];
}

/** The keys that every Llama-like family shares. */
export function readLlamaConfig(config: ConfigReader, defaults: ConfigDefaults = {}): LlamaConfig {
  return { ...readDecoderConfig(config, defaults), rmsNormEps: config.number("rms_norm_eps", 1e-6) };
}

/** Embedding and head under the names that most families use. */
export const decoderEnds = {
  blockName: (layer: number): string => `model.layers.${layer}`,
  embeddingName: "model.embed_tokens",
  headName: ({ tied }: DecoderConfig): string => (tied ? "model.embed_tokens" : "lm_head"),
  embed: (m: ModelBuilder, ids: Value): Value => m.embedding(ids, "model.embed_tokens"),
  head: (m: ModelBuilder, x: Value, config: DecoderConfig): Value => m.linear(x, decoderEnds.headName(config)),
};

export const llama: Architecture<LlamaConfig> = {
  ...decoderEnds,
  modelTypes: ["llama"],

  readConfig(config) {
    config.ignore("attention_bias", "mlp_bias"); // a bias is there or not
    config.ignore("rope_interleaved"); // llama2.c's own spelling; the weights are permuted already
    return readLlamaConfig(config);
  },

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
