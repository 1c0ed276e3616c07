/**
 * Phi 1, 1.5 and 2 (Li et al. 2023, arXiv 2309.05463): attention and MLP side by side on one LayerNorm, half of each head
 * rotated, biases everywhere, on the head too.
 */
import type { Architecture } from "./architecture.ts";
import { type RotaryDecoderConfig, readDecoderConfig } from "./decoder-config.ts";
import { decoderEnds } from "./llama.ts";
import { normToAttention, valueToOutput } from "./scaling.ts";

interface PhiConfig extends RotaryDecoderConfig {
  readonly layerNormEps: number;
  /** A LayerNorm on each head's query and key. */
  readonly headNorms: boolean;
}

export const phi: Architecture<PhiConfig> = {
  ...decoderEnds,
  modelTypes: ["phi"],

  readConfig(config) {
    return {
      ...readDecoderConfig(config, { partial: 0.5, activation: "gelu_new" }),
      layerNormEps: config.number("layer_norm_eps", 1e-5),
      headNorms: config.boolean("qk_layernorm", false),
    };
  },

  block(m, x, layer, config) {
    const at = `model.layers.${layer}`;
    const { heads, kvHeads, layerNormEps: eps } = config;
    const a = m.layerNorm(x, `${at}.input_layernorm`, eps); // (batch, seq, hidden)
    const qkv = [`${at}.self_attn.q_proj`, `${at}.self_attn.k_proj`, `${at}.self_attn.v_proj`];
    const [query, key, v, inner] = m.linears(a, [...qkv, `${at}.mlp.fc1`]);
    let [q, k] = [query, key];
    if (config.headNorms) {
      q = m.headLayerNorm(q, [`${at}.self_attn.q_layernorm`], heads, eps);
      k = m.headLayerNorm(k, [`${at}.self_attn.k_layernorm`], kvHeads, eps);
    }
    const attended = m.linear(m.attention(q, k, v, { layer, ...config }), `${at}.self_attn.dense`);
    const mlp = m.linear(m.activation(inner, config.activation), `${at}.mlp.fc2`);
    return m.add(m.add(attended, mlp), x);
  },

  finalNorm: (m, x, config) => m.layerNorm(x, "model.final_layernorm", config.layerNormEps),

  /** fc1's output goes through GELU, which no scale passes. */
  scalingGroups(layer, config) {
    const at = `model.layers.${layer}`;
    return [
      normToAttention(`${at}.input_layernorm`, `${at}.self_attn`, undefined, [`${at}.mlp.fc1`]),
      valueToOutput(`${at}.self_attn`, config, "dense"),
    ];
  },
};
