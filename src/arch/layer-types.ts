/** Which layers see only a window: `layer_types` of newer configs, or the rule that the family had before it. */
import type { ConfigReader } from "./config.ts";

/** Per layer: how many positions a query sees, its own included; undefined = all. */
export function readWindows(
  config: ConfigReader,
  layers: number,
  window: number | undefined,
  /** The family's rule where `layer_types` is absent. */
  isSliding: (layer: number) => boolean,
): readonly (number | undefined)[] {
  const types = readLayerTypes(config, layers, ["full_attention", "sliding_attention"]);
  return Array.from({ length: layers }, (_, layer) =>
    (types ? types[layer] === "sliding_attention" : isSliding(layer)) ? window : undefined,
  );
}

/** `layer_types`, checked: one of `known` for each layer; undefined where the key is absent. */
export function readLayerTypes(
  config: ConfigReader,
  layers: number,
  known: readonly string[],
): readonly string[] | undefined {
  const types = config.strings("layer_types");
  if (!types) return undefined;
  if (types.length !== layers) throw config.error("layer_types", `has ${types.length} entries for ${layers} layers`);
  const other = types.find((type) => !known.includes(type));
  if (other !== undefined) throw config.error("layer_types", `names "${other}"; Nibble knows ${known.join(", ")} here`);
  return types;
}

/** The keys of Qwen and SmolLM3: a window counts only with `use_sliding_window`, from layer `max_window_layers` on. */
export function readQwenWindows(config: ConfigReader, layers: number): readonly (number | undefined)[] {
  const given = config.has("sliding_window") ? config.int("sliding_window") : undefined;
  const from = config.has("max_window_layers") ? (config.value("max_window_layers") as number) : 28; // Qwen2Config's default
  const window = config.boolean("use_sliding_window", false) ? given : undefined;
  return readWindows(config, layers, window, (layer) => layer >= from);
}
