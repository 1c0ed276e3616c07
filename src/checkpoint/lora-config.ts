/** adapter_config.json of PEFT (LoraConfig): what changes the arithmetic is understood or refused by name. */
import { NibbleError } from "../errors.ts";
import type { JsonObject } from "./json.ts";

export interface LoraConfig {
  /** What B·A is multiplied by for a module: alpha / r, or alpha / sqrt(r) with rsLoRA. */
  scaling(module: string): number;
  rank(module: string): number;
  readonly useDora: boolean;
  /** Weights are stored (in, out), as GPT-2's Conv1D does. */
  readonly fanInFanOut: boolean;
  /** An adapted embedding stays tied to the head. */
  readonly keepsTying: boolean;
}

/** Keys that say how the adapter was trained or where it goes; the tensors' names say the same. */
const WITHOUT_EFFECT = new Set([
  "auto_mapping",
  "base_model_name_or_path",
  "bias", // biases that were trained are in the file
  "eva_config",
  "exclude_modules",
  "inference_mode",
  "layers_pattern",
  "layers_to_transform",
  "loftq_config",
  "lora_dropout",
  "megatron_config",
  "megatron_core",
  "modules_to_save",
  "peft_type",
  "peft_version",
  "qalora_group_size",
  "revision",
  "runtime_config",
  "target_modules",
  "task_type",
]);

/** Starts that take something out of the base weights, so that the adapter fits no published checkpoint. */
const CHANGES_BASE = /^(pissa|olora|loftq|corda|lora_ga)/;

export function readLoraConfig(json: JsonObject, where: string): LoraConfig {
  const error = (key: string, found: string, code: "bad_config" | "unsupported" = "bad_config") =>
    new NibbleError(code, `${where}: adapter_config.json's "${key}" ${found}.`, { param: key });
  if (json.peft_type !== "LORA") {
    throw error(
      "peft_type",
      `is ${JSON.stringify(json.peft_type)}; Nibble merges LORA (with rsLoRA and DoRA)`,
      "unsupported",
    );
  }
  const number = (key: string): number => {
    const value = json[key];
    if (typeof value === "number" && Number.isFinite(value) && value > 0) return value;
    throw error(key, `is ${JSON.stringify(value)}; it has to be a number above 0`);
  };
  const r = number("r");
  const alpha = number("lora_alpha");
  const pattern = (key: string): [RegExp, number][] =>
    Object.entries((json[key] as Record<string, number> | undefined) ?? {}).map(([name, value]) => {
      if (typeof value !== "number" || !(value > 0)) throw error(key, `gives ${JSON.stringify(value)} for "${name}"`);
      // PEFT: a key is a regular expression for the end of a module's path (get_pattern_key)
      return [new RegExp(`^(.*\\.)?(${name})$`), value];
    });
  const ranks = pattern("rank_pattern");
  const alphas = pattern("alpha_pattern");
  const find = (patterns: [RegExp, number][], module: string) => patterns.find(([regex]) => regex.test(module))?.[1];
  const rank = (module: string) => find(ranks, module) ?? r;

  const known = [
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "fan_in_fan_out",
    "init_lora_weights",
    "ensure_weight_tying",
  ];
  if (typeof json.init_lora_weights === "string" && CHANGES_BASE.test(json.init_lora_weights)) {
    throw error(
      "init_lora_weights",
      `is "${json.init_lora_weights}", which changes the base weights too; convert the adapter to plain LoRA with PEFT first`,
      "unsupported",
    );
  }
  for (const [key, value] of Object.entries(json)) {
    const empty = value === null || value === false || (typeof value === "object" && Object.keys(value).length === 0);
    if (known.includes(key) || WITHOUT_EFFECT.has(key) || empty) continue;
    throw error(
      key,
      `is ${JSON.stringify(value)}, which Nibble does not know; it may change the merged weights`,
      "unsupported",
    );
  }
  return {
    rank,
    scaling: (module) => {
      const scaled = find(alphas, module) ?? alpha;
      return scaled / (json.use_rslora === true ? Math.sqrt(rank(module)) : rank(module));
    },
    useDora: json.use_dora === true,
    fanInFanOut: json.fan_in_fan_out === true,
    keepsTying: json.ensure_weight_tying === true,
  };
}
