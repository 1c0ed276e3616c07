/** SmolLM3 (Hugging Face 2025): Llama where every fourth layer has no rotary embedding (NoPE, arXiv 2501.18795). */
import type { Architecture } from "./architecture.ts";
import { readQwenWindows } from "./layer-types.ts";
import { type LlamaConfig, llama, readLlamaConfig } from "./llama.ts";

interface SmolLM3Config extends LlamaConfig {
  /** Layers that rotate. */
  readonly rotates: readonly boolean[];
  readonly windows: readonly (number | undefined)[];
}

export const smollm3: Architecture<SmolLM3Config> = {
  ...llama,
  modelTypes: ["smollm3"],

  readConfig(config) {
    config.ignore("attention_bias", "mlp_bias"); // a bias is there or not
    const base = readLlamaConfig(config, { tied: true, theta: 2_000_000 });
    const interval = config.int("no_rope_layer_interval", 4);
    const flags = config.numbers("no_rope_layers"); // despite its name, 1 says that the layer rotates
    if (flags && flags.length !== base.layers) {
      throw config.error("no_rope_layers", `has ${flags.length} entries for ${base.layers} layers`);
    }
    const rotates = Array.from({ length: base.layers }, (_, layer) =>
      flags ? flags[layer] !== 0 : (layer + 1) % interval !== 0,
    );
    return { ...base, rotates, windows: readQwenWindows(config, base.layers) };
  },

  block(m, x, layer, config) {
    const at = `model.layers.${layer}`;
    const a = m.rmsNorm(x, `${at}.input_layernorm`, config.rmsNormEps); // (batch, seq, hidden)
    const [q, k, v] = m.linears(a, [`${at}.self_attn.q_proj`, `${at}.self_attn.k_proj`, `${at}.self_attn.v_proj`]);
    const rope = config.rotates[layer] ? config.rope : undefined;
    const attended = m.attention(q, k, v, { layer, ...config, window: config.windows[layer], rope });
    const h = m.add(x, m.linear(attended, `${at}.self_attn.o_proj`));
    const b = m.rmsNorm(h, `${at}.post_attention_layernorm`, config.rmsNormEps);
    return m.add(h, m.gatedMlp(b, `${at}.mlp`, config.activation));
  },
};
