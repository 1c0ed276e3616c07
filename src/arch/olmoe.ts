/**
 * OLMoE (Muennighoff et al. 2024, arXiv 2409.02060): a mixture of small experts whose weights are not normalised, and an
 * RMSNorm over all heads of the query and of the key together.
 */
import type { Architecture } from "./architecture.ts";
import { type LlamaConfig, llama, readLlamaConfig } from "./llama.ts";
import { type MixtureConfig, mixtureOfExperts, mixtureScaling, readMixture } from "./moe.ts";
import { normToAttention, valueToOutput } from "./scaling.ts";

type OlmoeConfig = LlamaConfig & MixtureConfig;

export const olmoe: Architecture<OlmoeConfig> = {
  ...llama,
  modelTypes: ["olmoe"],

  readConfig(config) {
    config.ignore("attention_bias"); // a bias is there or not
    config.expect("clip_qkv", null);
    const mixture = readMixture(config, "num_experts", config.boolean("norm_topk_prob", false));
    return { ...readLlamaConfig(config), rmsNormEps: config.number("rms_norm_eps", 1e-5), ...mixture };
  },

  block(m, x, layer, config) {
    const at = `model.layers.${layer}`;
    const eps = config.rmsNormEps;
    const a = m.rmsNorm(x, `${at}.input_layernorm`, eps); // (batch, seq, hidden)
    const [q, k, v] = m.linears(a, [`${at}.self_attn.q_proj`, `${at}.self_attn.k_proj`, `${at}.self_attn.v_proj`]);
    const qNormed = m.rmsNorm(q, `${at}.self_attn.q_norm`, eps); // over heads * headDim
    const kNormed = m.rmsNorm(k, `${at}.self_attn.k_norm`, eps);
    const attended = m.attention(qNormed, kNormed, v, { layer, ...config });
    const h = m.add(x, m.linear(attended, `${at}.self_attn.o_proj`));
    const b = m.rmsNorm(h, `${at}.post_attention_layernorm`, eps);
    return m.add(h, mixtureOfExperts(m, b, `${at}.mlp`, config));
  },

  scalingGroups(layer, config) {
    const at = `model.layers.${layer}`;
    return [
      normToAttention(`${at}.input_layernorm`, `${at}.self_attn`),
      valueToOutput(`${at}.self_attn`, config),
      ...mixtureScaling(`${at}.post_attention_layernorm`, `${at}.mlp`, config),
    ];
  },
};
