/**
 * Which family can do what with its cache beyond appending float keys and values to it. Everything is possible unless a
 * line here says why not.
 */
import { NibbleError } from "../errors.ts";
import { resolveConfig } from "./index.ts";

/**
 * speculation: several guessed tokens are computed at once and the wrong ones are cut off again.
 * prefix cache: what another request computed for the same beginning of a text is reused.
 * batching: sequences of different lengths are computed together.
 * int8 cache: keys and values are kept as int8 inside GroupQueryAttention.
 */
export type CacheFeature = "speculation" | "prefix cache" | "batching" | "int8 cache";

/** Families that keep something besides keys and values, and why that rules a feature out. */
const EXCEPTIONS: Readonly<Record<string, Readonly<Partial<Record<CacheFeature, string>>>>> = {
  lfm2: {
    speculation: "its convolutions keep their last inputs only, which cannot be cut back to an earlier token",
    "prefix cache": "the state of its convolutions in the middle of a text is not kept",
    "int8 cache": "most of its layers have a state of a few values instead of keys and values",
  },
  gemma2: {
    "int8 cache": "its scores are capped outside the attention operator, which reads a float cache there",
  },
};

const ROTARY_SWITCH = (above: number) =>
  `it rotates by other frequencies once a text is longer than ${above} tokens (longrope), and all keys with it`;

export interface Capabilities {
  readonly modelType: string;
  /** Why a feature is ruled out; a feature that is not here is possible. */
  readonly without: Readonly<Partial<Record<CacheFeature, string>>>;
  /** A text that grows beyond so many tokens has to be computed again from its start (longrope). */
  readonly recomputeAbove?: number;
}

/** From config.json; a model_type that Nibble does not know (another exporter's folder) is taken to be ordinary. */
export function capabilitiesOf(config: Readonly<Record<string, unknown>>, contextLength: number): Capabilities {
  const modelType = String(config.model_type ?? "");
  const without = EXCEPTIONS[modelType] ?? {};
  const above = rotarySwitchOf(config);
  if (above === undefined || contextLength <= above) return { modelType, without };
  const reason = ROTARY_SWITCH(above);
  return {
    modelType,
    without: { ...without, speculation: reason, "prefix cache": reason, batching: reason },
    recomputeAbove: above,
  };
}

function rotarySwitchOf(json: Readonly<Record<string, unknown>>): number | undefined {
  if (!/longrope|"su"/.test(JSON.stringify([json.rope_scaling, json.rope_parameters]))) return undefined;
  try {
    const { config } = resolveConfig(json, "config.json");
    return "rope" in config ? (config.rope as { long?: { above: number } }).long?.above : undefined;
  } catch {
    return undefined; // an unknown family's config: nothing is known of its frequencies either
  }
}

/** Error `unsupported` with the reason, where the user asked for a feature that this model cannot have. */
export function requireFeature(capabilities: Capabilities, feature: CacheFeature, param: string): void {
  const reason = capabilities.without[feature];
  if (!reason) return;
  throw new NibbleError("unsupported", `${capabilities.modelType} goes without ${feature}: ${reason}.`, { param });
}
