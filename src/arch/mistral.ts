/** Mistral 7B (Jiang et al. 2023, arXiv 2310.06825): Llama whose layers may all look back over a window only. */
import type { Architecture } from "./architecture.ts";
import { readWindows } from "./layer-types.ts";
import { type LlamaConfig, llama, readLlamaConfig } from "./llama.ts";

export const mistral: Architecture<LlamaConfig> = {
  ...llama,
  modelTypes: ["mistral"],

  readConfig(config) {
    const base = readLlamaConfig(config);
    const window = config.has("sliding_window") ? config.int("sliding_window") : undefined;
    config.expect("attention_bias", false);
    return { ...base, windows: readWindows(config, base.layers, window, () => true) };
  },
};
