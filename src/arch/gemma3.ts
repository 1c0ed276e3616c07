/**
 * Gemma 3, text (Gemma Team 2025, arXiv 2503.19786): Gemma 2 with an RMSNorm on each head's query and key in place of the
 * score cap; local layers rotate by a base of their own.
 */
import type { Architecture } from "./architecture.ts";
import { GEMMA_GAIN, type GemmaConfig, gemma2, readGemmaConfig } from "./gemma2.ts";
import { type Rope, readRope } from "./rope.ts";

export interface Gemma3Config extends GemmaConfig {
  /** Of the layers with a window. */
  readonly localRope: Rope;
}

export const gemma3: Architecture<Gemma3Config> = {
  ...gemma2,
  modelTypes: ["gemma3_text"],

  readConfig(config) {
    // every 6th layer sees everything; the key had two spellings before `layer_types`
    const pattern = config.int("sliding_window_pattern", config.int("_sliding_window_pattern", 6));
    const isSliding = (layer: number) => (layer + 1) % pattern !== 0;
    const base = readGemmaConfig(config, isSliding, { theta: 1_000_000, layerType: "full_attention" });
    if (base.attentionSoftcap !== undefined) config.expect("attn_logit_softcapping", null);
    const { headDim, maxPositions } = base;
    const localRope = readRope(config, {
      headDim,
      maxPositions,
      layerType: "sliding_attention",
      thetaKey: "rope_local_base_freq",
      scaled: false,
    });
    return { ...base, localRope };
  },

  block(m, x, layer, config) {
    const at = `model.layers.${layer}`;
    const { heads, kvHeads, rmsNormEps: eps } = config;
    const norm = (value: typeof x, name: string) => m.rmsNorm(value, `${at}.${name}`, eps, GEMMA_GAIN);
    const a = norm(x, "input_layernorm"); // (batch, seq, hidden)
    const [q, k, v] = m.linears(a, [`${at}.self_attn.q_proj`, `${at}.self_attn.k_proj`, `${at}.self_attn.v_proj`]);
    const qNormed = m.headNorm(q, `${at}.self_attn.q_norm`, heads, eps, GEMMA_GAIN);
    const kNormed = m.headNorm(k, `${at}.self_attn.k_norm`, kvHeads, eps, GEMMA_GAIN);
    const window = config.windows[layer];
    const rope = window === undefined ? config.rope : config.localRope;
    const attended = m.attention(qNormed, kNormed, v, { layer, ...config, window, rope });
    const h = m.add(x, norm(m.linear(attended, `${at}.self_attn.o_proj`), "post_attention_layernorm"));
    const b = norm(h, "pre_feedforward_layernorm");
    return m.add(h, norm(m.gatedMlp(b, `${at}.mlp`, config.activation), "post_feedforward_layernorm"));
  },
};
