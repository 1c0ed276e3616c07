/** Granite 3 (IBM 2024): Llama with constants on the embedding, the scores, what is added to the residual, and the logits. */
import type { Architecture } from "./architecture.ts";
import { type LlamaConfig, llama, readLlamaConfig } from "./llama.ts";

interface GraniteConfig extends LlamaConfig {
  readonly embeddingMultiplier: number;
  /** Of the scores, in place of 1 / sqrt(headDim). */
  readonly scale: number;
  readonly residualMultiplier: number;
  /** Divides the logits. */
  readonly logitsScaling: number;
}

export const granite: Architecture<GraniteConfig> = {
  ...llama,
  modelTypes: ["granite"],

  readConfig(config) {
    config.ignore("attention_bias", "mlp_bias"); // a bias is there or not
    return {
      ...readLlamaConfig(config),
      embeddingMultiplier: config.number("embedding_multiplier", 1),
      scale: config.number("attention_multiplier", 1), // GraniteConfig's default
      residualMultiplier: config.number("residual_multiplier", 1),
      logitsScaling: config.number("logits_scaling", 1),
    };
  },

  embed: (m, ids, config) => m.scale(m.embedding(ids, "model.embed_tokens"), config.embeddingMultiplier),

  block(m, x, layer, config) {
    const at = `model.layers.${layer}`;
    const a = m.rmsNorm(x, `${at}.input_layernorm`, config.rmsNormEps); // (batch, seq, hidden)
    const [q, k, v] = m.linears(a, [`${at}.self_attn.q_proj`, `${at}.self_attn.k_proj`, `${at}.self_attn.v_proj`]);
    const attended = m.linear(m.attention(q, k, v, { layer, ...config }), `${at}.self_attn.o_proj`);
    const h = m.add(x, m.scale(attended, config.residualMultiplier));
    const b = m.rmsNorm(h, `${at}.post_attention_layernorm`, config.rmsNormEps);
    const mlp = m.gatedMlp(b, `${at}.mlp`, config.activation);
    return m.add(h, m.scale(mlp, config.residualMultiplier));
  },

  head: (m, x, config) => m.scale(llama.head(m, x, config), 1 / config.logitsScaling),
};
