/**
 * Gemma 2 (Gemma Team 2024, arXiv 2408.00118): norms before and after attention and MLP, gains stored minus 1, scores and
 * logits capped by tanh, every other layer looks back over a window only.
 */
import type { Architecture } from "./architecture.ts";
import type { ConfigReader } from "./config.ts";
import type { ConfigDefaults } from "./decoder-config.ts";
import { readWindows } from "./layer-types.ts";
import { type LlamaConfig, llama, readLlamaConfig } from "./llama.ts";
import { gatedMlpScaling, valueToOutput } from "./scaling.ts";

export interface GemmaConfig extends LlamaConfig {
  /** Of the scores: 1 / sqrt(query_pre_attn_scalar). */
  readonly scale: number;
  readonly attentionSoftcap?: number;
  readonly finalSoftcap?: number;
  readonly windows: readonly (number | undefined)[];
}

/** A norm multiplies by 1 + its weight. */
export const GEMMA_GAIN = { offset: 1 } as const;

/** What Gemma 2 and 3 share; `isSliding` is the rule of configs without `layer_types`. */
export function readGemmaConfig(
  config: ConfigReader,
  isSliding: (layer: number) => boolean,
  rope: Pick<ConfigDefaults, "theta" | "layerType"> = {},
): GemmaConfig {
  const base = readLlamaConfig(config, {
    ...rope,
    tied: true,
    headDim: 256,
    activationKey: "hidden_activation",
    activation: "gelu_pytorch_tanh",
  });
  config.ignore("attention_bias"); // a bias is there or not
  config.ignore("hidden_act"); // an older spelling that transformers does not read any more
  config.expect("use_bidirectional_attention", false); // EmbeddingGemma
  const optional = (key: string) => (config.has(key) ? config.number(key) : undefined);
  const attentionSoftcap = optional("attn_logit_softcapping");
  const finalSoftcap = optional("final_logit_softcapping");
  const window = config.int("sliding_window", 4096);
  return {
    ...base,
    scale: config.number("query_pre_attn_scalar", 256) ** -0.5,
    attentionSoftcap,
    finalSoftcap,
    windows: readWindows(config, base.layers, window, isSliding),
  };
}

export const gemma2: Architecture<GemmaConfig> = {
  ...llama,
  modelTypes: ["gemma2"],

  readConfig: (config) => readGemmaConfig(config, (layer) => layer % 2 === 0),

  embed: (m, ids, config) => m.scale(m.embedding(ids, "model.embed_tokens"), Math.sqrt(config.hiddenSize)),

  block(m, x, layer, config) {
    const at = `model.layers.${layer}`;
    const norm = (value: typeof x, name: string) => m.rmsNorm(value, `${at}.${name}`, config.rmsNormEps, GEMMA_GAIN);
    const a = norm(x, "input_layernorm"); // (batch, seq, hidden)
    const [q, k, v] = m.linears(a, [`${at}.self_attn.q_proj`, `${at}.self_attn.k_proj`, `${at}.self_attn.v_proj`]);
    const attended = m.attention(q, k, v, {
      layer,
      ...config,
      window: config.windows[layer],
      softcap: config.attentionSoftcap,
    });
    const h = m.add(x, norm(m.linear(attended, `${at}.self_attn.o_proj`), "post_attention_layernorm"));
    const b = norm(h, "pre_feedforward_layernorm");
    return m.add(h, norm(m.gatedMlp(b, `${at}.mlp`, config.activation), "post_feedforward_layernorm"));
  },

  finalNorm: (m, x, config) => m.rmsNorm(x, "model.norm", config.rmsNormEps, GEMMA_GAIN),

  head(m, x, config) {
    const logits = llama.head(m, x, config);
    return config.finalSoftcap === undefined ? logits : m.softcap(logits, config.finalSoftcap);
  },

  scalingGroups(layer, config) {
    const at = `model.layers.${layer}`;
    return [
      {
        from: { norm: `${at}.input_layernorm`, gainOffset: 1 },
        to: [`${at}.self_attn.q_proj`, `${at}.self_attn.k_proj`, `${at}.self_attn.v_proj`],
      },
      valueToOutput(`${at}.self_attn`, config),
      ...gatedMlpScaling(`${at}.pre_feedforward_layernorm`, `${at}.mlp`, GEMMA_GAIN.offset),
    ];
  },
};
