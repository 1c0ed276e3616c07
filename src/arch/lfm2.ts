/**
 * LFM2 (Liquid AI 2025, arXiv 2511.23404): most layers mix the sequence by a gated short convolution, a few by grouped-query
 * attention with an RMSNorm on each head's query and key; each is followed by SwiGLU.
 */
import type { Architecture } from "./architecture.ts";
import { type RotaryDecoderConfig, readDecoderConfig } from "./decoder-config.ts";
import { readLayerTypes } from "./layer-types.ts";
import { decoderEnds } from "./llama.ts";
import { normToAttention, valueToOutput } from "./scaling.ts";
import { shortConv } from "./short-conv.ts";

interface Lfm2Config extends RotaryDecoderConfig {
  readonly rmsNormEps: number;
  /** Layers with attention; the others have a convolution. */
  readonly attends: readonly boolean[];
  /** Taps of the convolution. */
  readonly kernel: number;
}

export const lfm2: Architecture<Lfm2Config> = {
  ...decoderEnds,
  modelTypes: ["lfm2"],

  readConfig(config) {
    const tied = config.boolean("tie_embedding", true); // the key's spelling before transformers renamed it
    const theta = config.number("theta", 1_000_000); // another old spelling, of rope_theta
    const base = readDecoderConfig(config, { tied, theta, maxPositions: 128_000 });
    if (config.has("theta")) config.expect("rope_theta", theta);
    config.ignore("block_ff_dim", "block_ffn_dim_multiplier", "block_multiple_of", "block_auto_adjust_ff_dim"); // the matrices say it
    config.ignore("conv_bias"); // a bias is there or not
    config.ignore("block_norm_eps", "block_mlp_init_scale", "block_out_init_scale"); // norm_eps counts; the rest is training
    config.ignore("block_use_xavier_init", "conv_use_xavier_init");
    config.expect("block_use_swiglu", true);
    config.expect("use_pos_enc", true);
    config.expect("num_heads", base.heads);
    for (const key of ["block_dim", "conv_dim", "conv_dim_out"]) config.expect(key, base.hiddenSize);
    const types = readLayerTypes(config, base.layers, ["conv", "full_attention"]);
    const indices = config.numbers("full_attn_idxs");
    return {
      ...base,
      rmsNormEps: config.number("norm_eps", 1e-5),
      attends: Array.from({ length: base.layers }, (_, layer) =>
        types ? types[layer] === "full_attention" : (indices?.includes(layer) ?? true),
      ),
      kernel: config.int("conv_L_cache", 3),
    };
  },

  /** transformers.js shapes its caches by these. */
  exportedConfig: ({ attends, kernel }) => ({
    layer_types: attends.map((attend) => (attend ? "full_attention" : "conv")),
    conv_L_cache: kernel,
  }),

  block(m, x, layer, config) {
    const at = `model.layers.${layer}`;
    const { heads, kvHeads, rmsNormEps } = config;
    const a = m.rmsNorm(x, `${at}.operator_norm`, rmsNormEps); // (batch, seq, hidden)
    let mixed: typeof x;
    if (config.attends[layer]) {
      const [q, k, v] = m.linears(a, [`${at}.self_attn.q_proj`, `${at}.self_attn.k_proj`, `${at}.self_attn.v_proj`]);
      const qNormed = m.headNorm(q, `${at}.self_attn.q_layernorm`, heads, rmsNormEps);
      const kNormed = m.headNorm(k, `${at}.self_attn.k_layernorm`, kvHeads, rmsNormEps);
      mixed = m.linear(m.attention(qNormed, kNormed, v, { layer, ...config }), `${at}.self_attn.out_proj`);
    } else {
      const [before, after, value] = m.split(m.linear(a, `${at}.conv.in_proj`), 3); // B, C and x of the paper
      const convolved = shortConv(m, m.mul(before, value), `${at}.conv.conv`, config.kernel, layer);
      mixed = m.linear(m.mul(after, convolved), `${at}.conv.out_proj`);
    }
    const h = m.add(x, mixed);
    const b = m.rmsNorm(h, `${at}.ffn_norm`, rmsNormEps);
    const [gate, up] = m.linears(b, [`${at}.feed_forward.w1`, `${at}.feed_forward.w3`]);
    return m.add(h, m.linear(m.mul(m.activation(gate, config.activation), up), `${at}.feed_forward.w2`));
  },

  finalNorm: (m, x, config) => m.rmsNorm(x, "model.embedding_norm", config.rmsNormEps),

  scalingGroups(layer, config) {
    const at = `model.layers.${layer}`;
    const mixing = config.attends[layer]
      ? [
          normToAttention(`${at}.operator_norm`, `${at}.self_attn`),
          valueToOutput(`${at}.self_attn`, config, "out_proj"),
        ]
      : [
          { from: { norm: `${at}.operator_norm` }, to: [`${at}.conv.in_proj`] },
          {
            from: { linear: `${at}.conv.in_proj` },
            to: [`${at}.conv.out_proj`],
            source: (channel: number) => config.hiddenSize + channel, // C multiplies what goes out
          },
        ];
    return [
      ...mixing,
      { from: { norm: `${at}.ffn_norm` }, to: [`${at}.feed_forward.w1`, `${at}.feed_forward.w3`] },
      { from: { linear: `${at}.feed_forward.w3` }, to: [`${at}.feed_forward.w2`] },
    ];
  },
};
