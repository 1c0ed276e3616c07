/**
 * Qwen1.5-MoE and Qwen2-57B-A14B (Yang et al. 2024, arXiv 2407.10671): Qwen2 whose MLP is a mixture of experts plus one
 * expert that every token passes, weighed by a sigmoid gate; some layers may keep a dense MLP.
 */
import type { Architecture } from "./architecture.ts";
import type { ConfigReader } from "./config.ts";
import { readQwenWindows } from "./layer-types.ts";
import { type LlamaConfig, llama, readLlamaConfig } from "./llama.ts";
import { type MixtureConfig, mixtureOfExperts, mixtureScaling, readMixture } from "./moe.ts";
import { gatedMlpScaling, normToAttention, upToDown, valueToOutput } from "./scaling.ts";

export interface QwenMoeConfig extends LlamaConfig, MixtureConfig {
  /** Layers whose MLP is a mixture; the others are dense. */
  readonly sparse: readonly boolean[];
}

/** The keys that Qwen2-MoE and Qwen3-MoE share. */
export function readSparseLayers(config: ConfigReader, layers: number): readonly boolean[] {
  config.ignore("moe_intermediate_size", "shared_expert_intermediate_size"); // the matrices say it
  const step = config.int("decoder_sparse_step", 1);
  const dense = new Set(config.numbers("mlp_only_layers"));
  return Array.from({ length: layers }, (_, layer) => !dense.has(layer) && (layer + 1) % step === 0);
}

export const qwen2Moe: Architecture<QwenMoeConfig> = {
  ...llama,
  modelTypes: ["qwen2_moe"],

  readConfig(config) {
    config.ignore("qkv_bias"); // a bias is there or not
    const base = readLlamaConfig(config);
    return {
      ...base,
      ...readMixture(config, "num_experts", config.boolean("norm_topk_prob", false)),
      sparse: readSparseLayers(config, base.layers),
      windows: readQwenWindows(config, base.layers),
    };
  },

  block(m, x, layer, config) {
    const at = `model.layers.${layer}`;
    const a = m.rmsNorm(x, `${at}.input_layernorm`, config.rmsNormEps); // (batch, seq, hidden)
    const [q, k, v] = m.linears(a, [`${at}.self_attn.q_proj`, `${at}.self_attn.k_proj`, `${at}.self_attn.v_proj`]);
    const attended = m.attention(q, k, v, { layer, ...config, window: config.windows?.[layer] });
    const h = m.add(x, m.linear(attended, `${at}.self_attn.o_proj`));
    const b = m.rmsNorm(h, `${at}.post_attention_layernorm`, config.rmsNormEps);
    if (!config.sparse[layer]) return m.add(h, m.gatedMlp(b, `${at}.mlp`, config.activation));
    const shared = m.gatedMlp(b, `${at}.mlp.shared_expert`, config.activation);
    const gate = m.sigmoid(m.router(b, `${at}.mlp.shared_expert_gate`)); // (batch, seq, 1)
    const routed = mixtureOfExperts(m, b, `${at}.mlp`, config);
    return m.add(h, m.add(routed, m.mul(gate, shared)));
  },

  scalingGroups(layer, config) {
    const at = `model.layers.${layer}`;
    const norm = `${at}.post_attention_layernorm`;
    const shared = `${at}.mlp.shared_expert`;
    const readers = [`${shared}.gate_proj`, `${shared}.up_proj`, `${at}.mlp.shared_expert_gate`];
    return [
      normToAttention(`${at}.input_layernorm`, `${at}.self_attn`),
      valueToOutput(`${at}.self_attn`, config),
      ...(config.sparse[layer]
        ? [...mixtureScaling(norm, `${at}.mlp`, config, readers), upToDown(shared)]
        : gatedMlpScaling(norm, `${at}.mlp`)),
    ];
  },
};
