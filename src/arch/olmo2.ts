/**
 * OLMo 2 (OLMo Team 2024, arXiv 2501.00656): norms after attention and MLP instead of before, and an RMSNorm over all heads
 * of the query and of the key together.
 */
import type { Architecture } from "./architecture.ts";
import { type LlamaConfig, llama, readLlamaConfig } from "./llama.ts";
import { upToDown, valueToOutput } from "./scaling.ts";

export const olmo2: Architecture<LlamaConfig> = {
  ...llama,
  modelTypes: ["olmo2"],

  readConfig(config) {
    config.ignore("attention_bias"); // a bias is there or not
    config.expect("clip_qkv", null);
    return readLlamaConfig(config);
  },

  block(m, x, layer, config) {
    const at = `model.layers.${layer}`;
    const eps = config.rmsNormEps;
    const [q, k, v] = m.linears(x, [`${at}.self_attn.q_proj`, `${at}.self_attn.k_proj`, `${at}.self_attn.v_proj`]);
    const qNormed = m.rmsNorm(q, `${at}.self_attn.q_norm`, eps); // over heads * headDim
    const kNormed = m.rmsNorm(k, `${at}.self_attn.k_norm`, eps);
    const attended = m.attention(qNormed, kNormed, v, { layer, ...config });
    const h = m.add(x, m.rmsNorm(m.linear(attended, `${at}.self_attn.o_proj`), `${at}.post_attention_layernorm`, eps));
    const mlp = m.gatedMlp(h, `${at}.mlp`, config.activation);
    return m.add(h, m.rmsNorm(mlp, `${at}.post_feedforward_layernorm`, eps));
  },

  /** The linears read the residual stream itself, which no scale can enter. */
  scalingGroups(layer, config) {
    const at = `model.layers.${layer}`;
    return [valueToOutput(`${at}.self_attn`, config), upToDown(`${at}.mlp`)];
  },
};
