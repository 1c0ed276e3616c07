/** Phi-3, 3.5 and 4-mini (Abdin et al. 2024, arXiv 2404.14219): Llama stored with fused qkv and gate_up matrices. */
import type { Architecture } from "./architecture.ts";
import { readWindows } from "./layer-types.ts";
import { type LlamaConfig, llama, readLlamaConfig } from "./llama.ts";
import { viewCheckpoint } from "./view.ts";

export const phi3: Architecture<LlamaConfig> = {
  ...llama,
  modelTypes: ["phi3"],

  readConfig(config) {
    const base = readLlamaConfig(config);
    config.ignore("attention_bias", "mlp_bias", "lm_head_bias"); // a bias is there or not
    config.ignore("original_max_position_embeddings"); // longrope reads it
    config.expect("full_attn_mod", 1); // Phi-4-mini's own code, which transformers does not read
    config.expect("interpolate_factor", 1);
    const window = config.has("sliding_window") ? config.int("sliding_window") : undefined;
    return { ...base, windows: readWindows(config, base.layers, window, () => true) };
  },

  /** qkv_proj: rows of q, then k, then v; gate_up_proj: rows of gate, then up. */
  view(checkpoint, { heads, kvHeads, headDim }) {
    return viewCheckpoint(checkpoint, (name, shape) => {
      const [, at, fused, kind] = /^(.*\.)(qkv_proj|gate_up_proj)(\.weight|\.bias)$/.exec(name) ?? [];
      if (fused === "qkv_proj") {
        const [k, v] = [heads * headDim, (heads + kvHeads) * headDim];
        return [
          { name: `${at}q_proj${kind}`, rows: [[0, k]] },
          { name: `${at}k_proj${kind}`, rows: [[k, v]] },
          { name: `${at}v_proj${kind}`, rows: [[v, v + kvHeads * headDim]] },
        ];
      }
      if (fused === "gate_up_proj") {
        return [
          { name: `${at}gate_proj${kind}`, rows: [[0, shape[0] / 2]] },
          { name: `${at}up_proj${kind}`, rows: [[shape[0] / 2, shape[0]]] },
        ];
      }
      return [{ name }];
    });
  },
};
