/** Mixtral (Jiang et al. 2024, arXiv 2401.04088): Mistral with a mixture of experts for its MLP. */
import type { Architecture } from "./architecture.ts";
import { readWindows } from "./layer-types.ts";
import { type LlamaConfig, llama, readLlamaConfig } from "./llama.ts";
import { type MixtureConfig, mixtureOfExperts, mixtureScaling, readMixture } from "./moe.ts";
import { normToAttention, valueToOutput } from "./scaling.ts";
import { viewCheckpoint } from "./view.ts";

type MixtralConfig = LlamaConfig & MixtureConfig;

/** As Mistral's own code calls the matrices of an expert. */
const EXPERT_NAMES: Readonly<Record<string, string>> = { w1: "gate_proj", w2: "down_proj", w3: "up_proj" };

export const mixtral: Architecture<MixtralConfig> = {
  ...llama,
  modelTypes: ["mixtral"],

  readConfig(config) {
    const base = readLlamaConfig(config, { theta: 1_000_000, kvHeads: 8 });
    config.expect("attention_bias", false);
    const window = config.has("sliding_window") ? config.int("sliding_window") : undefined;
    return {
      ...base,
      ...readMixture(config, "num_local_experts", true),
      windows: readWindows(config, base.layers, window, () => true),
    };
  },

  view: (checkpoint) =>
    viewCheckpoint(checkpoint, (name) => [
      { name: name.replace(/(\.experts\.\d+\.)(w[123])\./, (_, at, w) => `${at}${EXPERT_NAMES[w]}.`) },
    ]),

  block(m, x, layer, config) {
    const at = `model.layers.${layer}`;
    const a = m.rmsNorm(x, `${at}.input_layernorm`, config.rmsNormEps); // (batch, seq, hidden)
    const [q, k, v] = m.linears(a, [`${at}.self_attn.q_proj`, `${at}.self_attn.k_proj`, `${at}.self_attn.v_proj`]);
    const attended = m.attention(q, k, v, { layer, ...config, window: config.windows?.[layer] });
    const h = m.add(x, m.linear(attended, `${at}.self_attn.o_proj`));
    const b = m.rmsNorm(h, `${at}.post_attention_layernorm`, config.rmsNormEps);
    return m.add(h, mixtureOfExperts(m, b, `${at}.block_sparse_moe`, config));
  },

  scalingGroups(layer, config) {
    const at = `model.layers.${layer}`;
    return [
      normToAttention(`${at}.input_layernorm`, `${at}.self_attn`),
      valueToOutput(`${at}.self_attn`, config),
      ...mixtureScaling(`${at}.post_attention_layernorm`, `${at}.block_sparse_moe`, config),
    ];
  },
};
