/** Qwen3-30B-A3B and its like (Yang et al. 2025, arXiv 2505.09388): Qwen3's attention, and a mixture of experts for its MLP. */
import type { Architecture } from "./architecture.ts";
import { readQwenWindows } from "./layer-types.ts";
import { llama, readLlamaConfig } from "./llama.ts";
import { mixtureOfExperts, mixtureScaling, readMixture } from "./moe.ts";
import { type QwenMoeConfig, readSparseLayers } from "./qwen2-moe.ts";
import { gatedMlpScaling, normToAttention, valueToOutput } from "./scaling.ts";

export const qwen3Moe: Architecture<QwenMoeConfig> = {
  ...llama,
  modelTypes: ["qwen3_moe"],

  readConfig(config) {
    config.ignore("attention_bias"); // a bias is there or not
    const base = readLlamaConfig(config, { kvHeads: 4 });
    return {
      ...base,
      ...readMixture(config, "num_experts", config.boolean("norm_topk_prob", false)),
      sparse: readSparseLayers(config, base.layers),
      windows: readQwenWindows(config, base.layers),
    };
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
    const mlp = config.sparse[layer]
      ? mixtureOfExperts(m, b, `${at}.mlp`, config)
      : m.gatedMlp(b, `${at}.mlp`, config.activation);
    return m.add(h, mlp);
  },

  scalingGroups(layer, config) {
    const at = `model.layers.${layer}`;
    const norm = `${at}.post_attention_layernorm`;
    return [
      normToAttention(`${at}.input_layernorm`, `${at}.self_attn`),
      valueToOutput(`${at}.self_attn`, config),
      ...(config.sparse[layer] ? mixtureScaling(norm, `${at}.mlp`, config) : gatedMlpScaling(norm, `${at}.mlp`)),
    ];
  },
};
