/** StableLM 2 and 3B (Bellagente et al. 2024, arXiv 2402.17834): Llama with LayerNorms, a quarter of each head rotated. */
import type { Architecture } from "./architecture.ts";
import { type RotaryDecoderConfig, readDecoderConfig } from "./decoder-config.ts";
import { decoderEnds } from "./llama.ts";
import { gatedMlpScaling, upToDown, valueToOutput } from "./scaling.ts";

interface StableLmConfig extends RotaryDecoderConfig {
  readonly layerNormEps: number;
  /** A LayerNorm on each head's query and key, every head with gains of its own (StableLM 2 12B). */
  readonly headNorms: boolean;
  /** Attention and MLP read the same norm (StableLM 2 12B). */
  readonly parallel: boolean;
}

export const stablelm: Architecture<StableLmConfig> = {
  ...decoderEnds,
  modelTypes: ["stablelm"],

  readConfig(config) {
    config.ignore("use_qkv_bias"); // a bias is there or not
    return {
      ...readDecoderConfig(config, { partial: 0.25 }),
      layerNormEps: config.number("layer_norm_eps", 1e-5),
      headNorms: config.boolean("qk_layernorm", false),
      parallel: config.boolean("use_parallel_residual", false),
    };
  },

  block(m, x, layer, config) {
    const at = `model.layers.${layer}`;
    const { heads, kvHeads, layerNormEps: eps } = config;
    const a = m.layerNorm(x, `${at}.input_layernorm`, eps); // (batch, seq, hidden)
    let [q, k, v] = m.linears(a, [`${at}.self_attn.q_proj`, `${at}.self_attn.k_proj`, `${at}.self_attn.v_proj`]);
    if (config.headNorms) {
      q = m.headLayerNorm(q, headNormNames(`${at}.self_attn.q_layernorm`, heads), heads, eps);
      k = m.headLayerNorm(k, headNormNames(`${at}.self_attn.k_layernorm`, kvHeads), kvHeads, eps);
    }
    const attended = m.linear(m.attention(q, k, v, { layer, ...config }), `${at}.self_attn.o_proj`);
    const h = m.add(x, attended);
    const b = config.parallel ? a : m.layerNorm(h, `${at}.post_attention_layernorm`, eps);
    return m.add(h, m.gatedMlp(b, `${at}.mlp`, config.activation));
  },

  finalNorm: (m, x, config) => m.layerNorm(x, "model.norm", config.layerNormEps),

  scalingGroups(layer, config) {
    const at = `model.layers.${layer}`;
    const qkv = [`${at}.self_attn.q_proj`, `${at}.self_attn.k_proj`, `${at}.self_attn.v_proj`];
    const norm = `${at}.input_layernorm`;
    const attention = valueToOutput(`${at}.self_attn`, config);
    if (config.parallel) {
      const to = [...qkv, `${at}.mlp.gate_proj`, `${at}.mlp.up_proj`];
      return [{ from: { norm }, to }, attention, upToDown(`${at}.mlp`)];
    }
    return [{ from: { norm }, to: qkv }, attention, ...gatedMlpScaling(`${at}.post_attention_layernorm`, `${at}.mlp`)];
  },
};

const headNormNames = (at: string, heads: number) => Array.from({ length: heads }, (_, head) => `${at}.norms.${head}`);
