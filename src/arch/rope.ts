/**
 * Rotary position embeddings (RoFormer, arXiv 2104.09864) with the scalings that config.json can name: linear, llama3,
 * yarn (arXiv 2309.00071) and longrope (arXiv 2402.13753). Both layouts are read: `rope_theta` + `rope_scaling`, and
 * transformers 5's `rope_parameters`. Arithmetic is rounded to float32 where transformers rounds.
 */
import type { ConfigReader } from "./config.ts";

export interface Rope {
  /** Channels of each head that are rotated, the first ones; even. */
  readonly rotaryDim: number;
  /** (rotaryDim / 2) radians a position */
  readonly frequencies: Float32Array;
  /** Multiplies cos and sin (yarn, longrope). */
  readonly attentionFactor: number;
  /** longrope: other frequencies once a sequence is longer than `above` tokens. */
  readonly long?: { readonly frequencies: Float32Array; readonly above: number };
}

interface RopeParameters {
  readonly theta: number;
  readonly type: string;
  readonly partial: number;
  number(key: string, fallback?: number): number;
  numbers(key: string): readonly number[];
  boolean(key: string, fallback: boolean): boolean;
}

export interface RopeOptions {
  readonly headDim: number;
  /** Where the config leaves it out; transformers' default is 10000. */
  readonly theta?: number;
  readonly thetaKey?: string;
  /** GPT-NeoX: rotary_pct */
  readonly partialKey?: string;
  /** Share of the head that is rotated where the config leaves it out. */
  readonly partial?: number;
  readonly maxPositions: number;
  /** transformers 5 keeps one set per layer type in `rope_parameters`: "full_attention", "sliding_attention". */
  readonly layerType?: string;
  /** false: this set has no scaling even if `rope_scaling` is there (Gemma 3's local layers). */
  readonly scaled?: boolean;
}

/** Reads every rope key of the config and returns the frequencies. */
export function readRope(config: ConfigReader, options: RopeOptions): Rope {
  const parameters = readParameters(config, options);
  const rotaryDim = Math.floor(options.headDim * parameters.partial);
  const base = baseFrequencies(parameters.theta, rotaryDim);
  switch (parameters.type) {
    case "default":
      return { rotaryDim, frequencies: base, attentionFactor: 1 };
    case "linear":
      return { rotaryDim, frequencies: base.map((f) => f / parameters.number("factor")), attentionFactor: 1 };
    case "llama3":
      return { rotaryDim, frequencies: llama3(base, parameters), attentionFactor: 1 };
    case "yarn":
      return yarn(rotaryDim, base, parameters, options.maxPositions);
    case "longrope":
    case "su":
      return longrope(config, rotaryDim, base, parameters, options.maxPositions);
    case "dynamic":
      throw config.error(
        "rope_scaling",
        'asks for "dynamic" scaling, whose frequencies change with the length of the text and so contradict keys already in a cache; set rope_scaling to null (text up to max_position_embeddings) or use linear, llama3, yarn or longrope',
      );
    default:
      throw config.error(
        "rope_scaling",
        `asks for "${parameters.type}"; Nibble knows default, linear, llama3, yarn and longrope`,
      );
  }
}

/** theta^(-2i/rotaryDim) in float32, as transformers computes it. */
function baseFrequencies(theta: number, rotaryDim: number): Float32Array {
  return Float32Array.from(
    { length: rotaryDim / 2 },
    (_, i) => 1 / Math.fround(theta ** Math.fround((2 * i) / rotaryDim)),
  );
}

function readParameters(config: ConfigReader, options: RopeOptions): RopeParameters {
  const { thetaKey = "rope_theta", partialKey = "partial_rotary_factor", layerType } = options;
  const whole = config.value("rope_parameters") as Record<string, unknown> | undefined;
  const modern = (layerType && whole?.[layerType] ? whole[layerType] : whole) as Record<string, unknown> | undefined;
  const classic = config.value("rope_scaling") as Record<string, unknown> | undefined;
  const given = modern ?? (options.scaled === false ? undefined : classic) ?? {};
  const known = new Set(["rope_theta", "partial_rotary_factor", "rope_type", "type"]);
  const theta = (modern?.rope_theta as number | undefined) ?? config.number(thetaKey, options.theta ?? 10000);
  const partial =
    (modern?.partial_rotary_factor as number | undefined) ?? config.number(partialKey, options.partial ?? 1);
  config.ignore(thetaKey, partialKey);
  const type = String(given.rope_type ?? given.type ?? "default");
  const number = (key: string, fallback?: number): number => {
    known.add(key);
    const value = given[key] ?? fallback;
    if (typeof value !== "number" || !Number.isFinite(value)) {
      throw config.error(
        "rope_scaling",
        `of type ${type} needs a number "${key}", found ${JSON.stringify(given[key])}`,
      );
    }
    return value;
  };
  const numbers = (key: string): readonly number[] => {
    known.add(key);
    const value = given[key];
    if (!Array.isArray(value) || !value.every((n) => typeof n === "number")) {
      throw config.error("rope_scaling", `of type ${type} needs an array "${key}", found ${JSON.stringify(value)}`);
    }
    return value;
  };
  const boolean = (key: string, fallback: boolean): boolean => {
    known.add(key);
    return (given[key] as boolean | undefined) ?? fallback;
  };
  const allowed = new Set([
    ...known,
    ...["factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale"],
    ...[
      "mscale_all_dim",
      "truncate",
      "low_freq_factor",
      "high_freq_factor",
      "short_factor",
      "long_factor",
      "finetuned",
    ],
  ]);
  const unknown = Object.keys(given).filter((key) => !allowed.has(key) && given[key] !== null);
  if (unknown.length > 0)
    throw config.error("rope_scaling", `has keys that Nibble does not know: ${unknown.join(", ")}`);
  return { theta, type, partial, number, numbers, boolean };
}

/** Llama 3.1: long wavelengths divided by the factor, short ones kept, a ramp between. */
function llama3(base: Float32Array, parameters: RopeParameters): Float32Array {
  const factor = parameters.number("factor");
  const low = parameters.number("low_freq_factor");
  const high = parameters.number("high_freq_factor");
  const original = parameters.number("original_max_position_embeddings");
  return base.map((frequency) => {
    const wavelength = (2 * Math.PI) / frequency;
    if (wavelength > original / low) return frequency / factor;
    if (wavelength < original / high) return frequency;
    const smooth = (original / wavelength - low) / (high - low);
    return ((1 - smooth) * frequency) / factor + smooth * frequency;
  });
}

/** YaRN, section 3.2: interpolate low frequencies, keep high ones, and cool the attention by 0.1 ln(factor) + 1. */
function yarn(rotaryDim: number, base: Float32Array, parameters: RopeParameters, maxPositions: number): Rope {
  const original = parameters.number("original_max_position_embeddings", maxPositions);
  const factor = parameters.number("factor", maxPositions / original);
  const theta = parameters.theta;
  const correctionDim = (rotations: number) =>
    (rotaryDim * Math.log(original / (rotations * 2 * Math.PI))) / (2 * Math.log(theta));
  const truncate = parameters.boolean("truncate", true);
  const lowDim = correctionDim(parameters.number("beta_fast", 32));
  const highDim = correctionDim(parameters.number("beta_slow", 1));
  const low = Math.max(truncate ? Math.floor(lowDim) : lowDim, 0);
  let high = Math.min(truncate ? Math.ceil(highDim) : highDim, rotaryDim - 1);
  if (high === low) high += 0.001;
  const frequencies = base.map((frequency, i) => {
    const ramp = Math.min(1, Math.max(0, (i - low) / (high - low)));
    return (frequency / factor) * ramp + frequency * (1 - ramp);
  });
  const mscale = (scale: number, m: number) => (scale <= 1 ? 1 : 0.1 * m * Math.log(scale) + 1);
  const m = parameters.number("mscale", 0);
  const mAll = parameters.number("mscale_all_dim", 0);
  const inferred = m && mAll ? mscale(factor, m) / mscale(factor, mAll) : mscale(factor, 1);
  return { rotaryDim, frequencies, attentionFactor: parameters.number("attention_factor", inferred) };
}

/** LongRoPE as Phi-3 uses it: a divisor per frequency, one set for short and one for long texts. */
function longrope(
  config: ConfigReader,
  rotaryDim: number,
  base: Float32Array,
  parameters: RopeParameters,
  maxPositions: number,
): Rope {
  const topLevel = config.value("original_max_position_embeddings") as number | undefined;
  const original = topLevel ?? parameters.number("original_max_position_embeddings", maxPositions);
  const factor = topLevel ? maxPositions / original : parameters.number("factor", maxPositions / original);
  const divided = (key: string) => {
    const factors = parameters.numbers(key);
    if (factors.length !== base.length) {
      throw config.error(
        "rope_scaling",
        `has ${factors.length} entries in "${key}" where half the rotary size is ${base.length}`,
      );
    }
    return base.map((frequency, i) => frequency / factors[i]);
  };
  const inferred = factor <= 1 ? 1 : Math.sqrt(1 + Math.log(factor) / Math.log(original));
  return {
    rotaryDim,
    frequencies: divided("short_factor"),
    attentionFactor: parameters.number("attention_factor", inferred),
    long: { frequencies: divided("long_factor"), above: original },
  };
}

/** cos and sin of positions 0 .. positions-1, each (positions, rotaryDim / 2). */
export function rotaryTable(
  frequencies: Float32Array,
  attentionFactor: number,
  positions: number,
): { cos: Float32Array; sin: Float32Array } {
  const half = frequencies.length;
  const cos = new Float32Array(positions * half);
  const sin = new Float32Array(positions * half);
  for (let position = 0; position < positions; position++) {
    for (let i = 0; i < half; i++) {
      const angle = Math.fround(position * frequencies[i]);
      cos[position * half + i] = Math.cos(angle) * attentionFactor;
      sin[position * half + i] = Math.sin(angle) * attentionFactor;
    }
  }
  return { cos, sin };
}
