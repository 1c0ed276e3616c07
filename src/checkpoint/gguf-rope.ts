/** Rotary scalings as GGUF stores them, as config.json's `rope_scaling`. */
import type { GgufMetadata } from "./gguf-metadata.ts";

type Config = Record<string, unknown>;

/** linear and yarn from the metadata; null where positions are not scaled. longrope comes from tensors. */
export function ropeScaling(metadata: GgufMetadata): Config | null {
  const old = metadata.number("rope.scale_linear", 1);
  const type = metadata.string("rope.scaling.type", old === 1 ? "none" : "linear");
  const factor = metadata.number("rope.scaling.factor", old);
  switch (type) {
    case "none":
      metadata.ignore("rope.scaling.original_context_length");
      return null;
    case "longrope":
      if (metadata.architecture === "phi3") return null; // its own row reads the factors
      throw metadata.error("rope.scaling.type", 'is "longrope", which Nibble reads for phi3 only');
    case "linear":
      return factor === 1 ? null : { rope_type: "linear", factor };
    case "yarn": {
      metadata.expect("rope.scaling.attn_factor", 1);
      metadata.expect("rope.scaling.yarn_ext_factor", 1, -1);
      const scaling: Config = {
        rope_type: "yarn",
        factor,
        original_max_position_embeddings: metadata.int("rope.scaling.original_context_length"),
      };
      const keys = { beta_fast: "yarn_beta_fast", beta_slow: "yarn_beta_slow", attention_factor: "yarn_attn_factor" };
      for (const [ours, key] of Object.entries(keys)) {
        const value = metadata.number(`rope.scaling.${key}`, 0);
        if (value !== 0) scaling[ours] = value;
      }
      return scaling;
    }
    default:
      throw metadata.error("rope.scaling.type", `is "${type}"; Nibble knows none, linear, yarn and longrope`);
  }
}

/** Original context lengths that the search below tries: 8192 is Llama 3's, the others are for models made like it. */
const ORIGINAL_LENGTHS = [8192, 4096, 16384, 2048, 32768, 1024, 512, 256, 128, 64, 32, 16];
/** The file's divisors are float32, computed from float32 frequencies. */
const FACTOR_TOLERANCE = 1e-4;

/**
 * Llama 3's scaling lies in a GGUF as one divisor per frequency (rope_freqs). Where these are llama3's with its usual
 * low and high factors, they are named so; any others are kept as they are (longrope with one set for all lengths).
 */
export function llama3Scaling(factors: readonly number[], config: Config): Config | null {
  if (factors.every((factor) => factor === 1)) return null;
  const factor = factors[factors.length - 1]; // the longest wavelength gets the whole factor
  for (const original of ORIGINAL_LENGTHS) {
    const wanted = llama3Divisors(factors.length, config.rope_theta as number, factor, original);
    if (!wanted.every((divisor, i) => Math.abs(divisor / factors[i] - 1) < FACTOR_TOLERANCE)) continue;
    return {
      rope_type: "llama3",
      factor,
      low_freq_factor: 1,
      high_freq_factor: 4,
      original_max_position_embeddings: original,
    };
  }
  return {
    rope_type: "longrope",
    short_factor: factors,
    long_factor: factors,
    attention_factor: 1,
    original_max_position_embeddings: config.max_position_embeddings,
  };
}

function llama3Divisors(count: number, theta: number, factor: number, original: number): number[] {
  return Array.from({ length: count }, (_, i) => {
    const wavelength = 2 * Math.PI * theta ** (i / count);
    if (wavelength < original / 4) return 1;
    if (wavelength > original) return factor;
    const smooth = (original / wavelength - 1) / (4 - 1);
    return 1 / ((1 - smooth) / factor + smooth);
  });
}
