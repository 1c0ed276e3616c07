/** The registry: `model_type` -> architecture. Adding one is its file, a line here and a test. */
import type { Checkpoint } from "../checkpoint/checkpoint.ts";
import { NibbleError } from "../errors.ts";
import type { Architecture, DecoderConfig } from "./architecture.ts";
import { ConfigReader } from "./config.ts";
import { gemma2 } from "./gemma2.ts";
import { gemma3 } from "./gemma3.ts";
import { gptNeox } from "./gpt-neox.ts";
import { gpt2 } from "./gpt2.ts";
import { granite } from "./granite.ts";
import { lfm2 } from "./lfm2.ts";
import { llama } from "./llama.ts";
import { mistral } from "./mistral.ts";
import { mixtral } from "./mixtral.ts";
import { olmo2 } from "./olmo2.ts";
import { olmoe } from "./olmoe.ts";
import { phi } from "./phi.ts";
import { phi3 } from "./phi3.ts";
import { qwen2 } from "./qwen2.ts";
import { qwen2Moe } from "./qwen2-moe.ts";
import { qwen3 } from "./qwen3.ts";
import { qwen3Moe } from "./qwen3-moe.ts";
import { smollm3 } from "./smollm3.ts";
import { stablelm } from "./stablelm.ts";

/** Each file's config type is its own business: a config only ever meets the architecture that read it. */
const architectures = [
  llama,
  mistral,
  qwen2,
  qwen3,
  gemma2,
  gemma3,
  phi3,
  smollm3,
  olmo2,
  granite,
  stablelm,
  phi,
  gptNeox,
  gpt2,
  mixtral,
  olmoe,
  qwen2Moe,
  qwen3Moe,
  lfm2,
] as unknown as readonly Architecture[];

/** Every `model_type` that can be loaded. */
export const modelTypes: readonly string[] = architectures.flatMap((architecture) => architecture.modelTypes).sort();

/** An architecture with its config read: what the exporter and the quantizers work on. */
export interface Model<Config extends DecoderConfig = DecoderConfig> {
  readonly arch: Architecture<Config>;
  readonly config: Config;
  /** The checkpoint under the names that `arch.block` uses. */
  readonly checkpoint: Checkpoint;
}

/** Finds the architecture of a checkpoint and reads its config; errors: `unsupported`, `bad_config`. */
export function resolveModel(checkpoint: Checkpoint): Model {
  const { arch, config } = resolveConfig(checkpoint.config, checkpoint.name);
  return { arch, config, checkpoint: arch.view?.(checkpoint, config) ?? checkpoint };
}

/** The same from config.json alone. */
export function resolveConfig(
  json: Readonly<Record<string, unknown>>,
  where: string,
): { arch: Architecture; config: DecoderConfig } {
  const reader = new ConfigReader(json, where);
  const arch = architectures.find(({ modelTypes }) => modelTypes.includes(reader.modelType)) as
    | Architecture
    | undefined;
  if (!arch) {
    throw new NibbleError(
      "unsupported",
      `${where}: model_type ${JSON.stringify(json.model_type ?? null)} is not a family that Nibble computes; it knows ${modelTypes.join(", ")}.`,
      { param: "model_type" },
    );
  }
  const config = arch.readConfig(reader);
  reader.finish();
  return { arch, config };
}
