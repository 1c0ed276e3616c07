/** Qwen3, dense (Yang et al. 2025, arXiv 2505.09388): Llama with an RMSNorm on each head's query and key before RoPE. */
import type { Architecture } from "./architecture.ts";
import { readQwenWindows } from "./layer-types.ts";
import { type LlamaConfig, llama, readLlamaConfig } from "./llama.ts";

export const qwen3: Architecture<LlamaConfig> = {
  ...llama,
  modelTypes: ["qwen3"],

  readConfig(config) {
    config.ignore("attention_bias"); // a bias is there or not
    config.expect("use_mrope", false);
    const base = readLlamaConfig(config, { headDim: 128 }); // Qwen3Config's default, not hidden / heads
    return { ...base, windows: readQwenWindows(config, base.layers) };
  },

  block(m, x, layer, config) {
    const at = `model.layers.${layer}`;
    const { heads, kvHeads, rmsNormEps } = config;
    const a = m.rmsNorm(x, `${at}.input_layernorm`, rmsNormEps); // (batch, seq, hidden)
    const [q, k, v] = m.linears(a, [`${at}.self_attn.q_proj`, `${at}.self_attn.k_proj`, `${at}.self_attn.v_proj`]);
    const qNormed = m.headNorm(q, `${at}.self_attn.q_norm`, heads, rmsNormEps);
    const kNormed = m.headNorm(k, `${at}.self_attn.k_norm`, kvHeads, rmsNormEps);
    const attended = m.attention(qNormed, kNormed, v, { layer, ...config, window: config.windows?.[layer] });
    const h = m.add(x, m.linear(attended, `${at}.self_attn.o_proj`));
    const b = m.rmsNorm(h, `${at}.post_attention_layernorm`, rmsNormEps);
    return m.add(h, m.gatedMlp(b, `${at}.mlp`, config.activation));
  },
};
