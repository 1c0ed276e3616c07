/** Qwen2 and 2.5 (Yang et al. 2024, arXiv 2407.10671): Llama with biases on q, k and v, and windows in later layers. */
import type { Architecture } from "./architecture.ts";
import { readQwenWindows } from "./layer-types.ts";
import { type LlamaConfig, llama, readLlamaConfig } from "./llama.ts";

export const qwen2: Architecture<LlamaConfig> = {
  ...llama,
  modelTypes: ["qwen2"],

  readConfig(config) {
    const base = readLlamaConfig(config);
    config.expect("use_mrope", false); // rotary over image coordinates
    return { ...base, windows: readQwenWindows(config, base.layers) };
  },
};
