/**
 * GPT-NeoX and Pythia (Black et al. 2022, arXiv 2204.06745; Biderman et al. 2023, arXiv 2304.01373): attention and MLP side
 * by side on two LayerNorms, a part of each head rotated, q, k and v of each head stored together.
 */
import type { Architecture } from "./architecture.ts";
import { type RotaryDecoderConfig, readDecoderConfig } from "./decoder-config.ts";
import { normToAttention, valueToOutput } from "./scaling.ts";
import { viewCheckpoint } from "./view.ts";

interface GptNeoxConfig extends RotaryDecoderConfig {
  readonly layerNormEps: number;
  readonly parallel: boolean;
}

export const gptNeox: Architecture<GptNeoxConfig> = {
  modelTypes: ["gpt_neox"],

  readConfig(config) {
    config.ignore("attention_bias"); // a bias is there or not
    // transformers 4.4x wrote these two under both names
    config.expect("rope_theta", config.number("rotary_emb_base", 10000));
    config.expect("partial_rotary_factor", config.number("rotary_pct", 0.25));
    return {
      ...readDecoderConfig(config, {
        activation: "gelu",
        thetaKey: "rotary_emb_base",
        partialKey: "rotary_pct",
        partial: 0.25,
      }),
      layerNormEps: config.number("layer_norm_eps", 1e-5),
      parallel: config.boolean("use_parallel_residual", true),
    };
  },

  /** query_key_value has rows (heads, 3, headDim): each head's query, key and value in turn. */
  view(checkpoint, { heads, headDim }) {
    const rowsOf = (part: number) =>
      Array.from({ length: heads }, (_, head) => {
        const start = (3 * head + part) * headDim;
        return [start, start + headDim] as const;
      });
    return viewCheckpoint(checkpoint, (name) => {
      const [, at, kind] = /^(.*\.attention\.)query_key_value(\.weight|\.bias)$/.exec(name) ?? [];
      if (kind === undefined) return [{ name }];
      return ["q_proj", "k_proj", "v_proj"].map((linear, part) => ({
        name: `${at}${linear}${kind}`,
        rows: rowsOf(part),
      }));
    });
  },

  blockName: (layer) => `gpt_neox.layers.${layer}`,
  embeddingName: "gpt_neox.embed_in",
  headName: (config) => (config.tied ? "gpt_neox.embed_in" : "embed_out"),

  embed: (m, ids) => m.embedding(ids, "gpt_neox.embed_in"),

  block(m, x, layer, config) {
    const at = `gpt_neox.layers.${layer}`;
    const a = m.layerNorm(x, `${at}.input_layernorm`, config.layerNormEps); // (batch, seq, hidden)
    const [q, k, v] = m.linears(a, [`${at}.attention.q_proj`, `${at}.attention.k_proj`, `${at}.attention.v_proj`]);
    const attended = m.linear(m.attention(q, k, v, { layer, ...config }), `${at}.attention.dense`);
    const h = m.add(x, attended);
    const b = m.layerNorm(config.parallel ? x : h, `${at}.post_attention_layernorm`, config.layerNormEps);
    const inner = m.activation(m.linear(b, `${at}.mlp.dense_h_to_4h`), config.activation);
    return m.add(h, m.linear(inner, `${at}.mlp.dense_4h_to_h`));
  },

  finalNorm: (m, x, config) => m.layerNorm(x, "gpt_neox.final_layer_norm", config.layerNormEps),

  head: (m, x, config) => m.linear(x, config.tied ? "gpt_neox.embed_in" : "embed_out"),

  scalingGroups(layer, config) {
    const at = `gpt_neox.layers.${layer}`;
    return [
      normToAttention(`${at}.input_layernorm`, `${at}.attention`),
      valueToOutput(`${at}.attention`, config, "dense"),
      { from: { norm: `${at}.post_attention_layernorm` }, to: [`${at}.mlp.dense_h_to_4h`] },
    ];
  },
};
