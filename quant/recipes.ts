/** What to do with a model, as data: one method by name, or a preset that measurement chose (README, ablation table). */
import { NibbleError } from "../src/errors.ts";
import type { ScaleBits } from "../src/tensor/quantized.ts";
import type { LearnedRounding } from "./learned-rounding.ts";
import type { Plan, WeightFormat } from "./plan.ts";
import type { Pruning } from "./prune.ts";
import { checkSparsity } from "./sparsity.ts";
import type { Tuning } from "./tune.ts";

export interface HeadFormat {
  readonly bits: number;
  readonly groupSize: number | "row";
  readonly symmetric: boolean;
  readonly scaleBits?: ScaleBits;
}

export interface Recipe {
  /** The method or preset: what nibble.json and messages call it. */
  readonly name: string;
  readonly bits: number;
  /** Columns that share a scale, or "row". */
  readonly groupSize: number | "row";
  readonly symmetric: boolean;
  /** Bits that a scale is stored in: 16, or 6 or 8 with a factor a row. Default 16. */
  readonly scaleBits?: ScaleBits;
  /** How codes are chosen; "none" leaves the linears float (pruning alone), and bits are 16 then. */
  readonly rounding: "rtn" | "hqq" | "gptq" | "none";
  /** Search grids by squared error (weighted by the inputs, where calibrated) instead of taking the range. */
  readonly searchGrid: boolean;
  /** Per-channel factors, folded into what makes the input: AWQ's, or with `inputBits` SmoothQuant's. */
  readonly fold: boolean;
  /** Inputs are rounded too, at run time, one scale a token: products on integer kernels (src/arch/integer-layers.ts). */
  readonly inputBits?: 8;
  /** Gather no more of the inputs' second moment than its diagonal: enough to fold and to round to nearest. */
  readonly channelMoments?: true;
  /** GPTAQ's term, 0 to 1. */
  readonly asymmetry: number;
  /** Rounds of refitting scales to the codes and sweeping again. */
  readonly refits: number;
  /** GPTQ's λ as a fraction of mean diag(H). */
  readonly damping: number;
  /** Embedding and head; undefined leaves them float. */
  readonly head: HeadFormat | undefined;
  /** Learned rounding of each block after its codes were chosen; undefined = none. */
  readonly learned?: LearnedRounding;
  /** Formats of single matrices, in place of the ones above. */
  readonly plan?: Plan;
  /** Weights that become zero before anything is rounded, and stay zero. */
  readonly prune?: Pruning;
  /** Seed of the bases that the model is turned into before anything else (rotate.ts); undefined = none. */
  readonly rotation?: number;
  /** Training of scales and norm gains against the float model's logits at the end (tune.ts); undefined = none. */
  readonly tuning?: Tuning;
  /** Calibration windows at most; 0 = no calibration. */
  readonly windows: number;
}

/** Windows of text that a recipe uses. */
export function windowsOf({ windows, tuning }: Recipe): number {
  return Math.max(windows, tuning?.windows ?? 0);
}

export interface MethodOptions {
  readonly bits?: number;
  readonly groupSize?: number | "row";
  readonly symmetric?: boolean;
  /** 6, 8 or 16 (default). */
  readonly scaleBits?: ScaleBits;
  /** Bits of embedding and head; 16 leaves them float. Default 8; 4 in the presets default and best. */
  readonly headBits?: number;
  /** Prune first; calibrates even where the method itself needs no text. */
  readonly prune?: Pruning;
  /** Turn the model into random bases first. */
  readonly rotate?: boolean;
  /** Learn each block's rounding from the codes chosen for it; a number says in how many steps (default: 40). */
  readonly learn?: boolean | number;
  /** Tune scales and norm gains at the end; a number says in how many steps (default: 64). */
  readonly tune?: boolean | number;
}

/** One window a step, every window about once. */
const TUNING: Tuning = { windows: 64, steps: 64, batch: 1, rate: 0.001, seed: 1 };

/** Four windows a step; scales stay, since GPTQ's are fitted already. */
const LEARNING: LearnedRounding = { steps: 40, batch: 4, rate: 0.02, scaleRate: 0, seed: 1 };

/** The settings with another number of steps, where one is asked for. */
function inSteps<T extends { readonly steps: number }>(settings: T, asked: boolean | number, param: string): T {
  if (asked === true) return settings;
  const steps = Number(asked);
  if (!Number.isSafeInteger(steps) || steps < 1) {
    throw new NibbleError("bad_option", `${param} is ${asked}; it has to be a number of steps above 0.`, { param });
  }
  return { ...settings, steps };
}

/** Embedding and head share their scales by so many columns: at 4 bits and below smaller groups are worth their bytes (head.ts). */
const headGroupSize = (bits: number): number => (bits <= 4 ? 16 : 32);

const SCALE_BITS = [6, 8, 16];
const GROUP_SIZES = [16, 32, 64, 128, 256];
const DEFAULT_WINDOWS = 64;
/** Largest magnitudes and 8-bit rounding need less text than 4-bit codes do. */
const SMOOTHING_WINDOWS = 16;

/** Error `bad_option` for a format that nothing stores. */
export function checkFormat({ bits, groupSize, scaleBits }: WeightFormat): void {
  if (!Number.isInteger(bits) || bits < 2 || bits > 8) {
    throw new NibbleError("bad_option", `bits is ${bits}; codes take 2 to 8 bits.`, { param: "bits" });
  }
  if (groupSize !== "row" && !GROUP_SIZES.includes(groupSize)) {
    throw new NibbleError("bad_option", `group size is ${groupSize}; use ${GROUP_SIZES.join(", ")} or row.`, {
      param: "group-size",
    });
  }
  if (scaleBits !== undefined && !SCALE_BITS.includes(scaleBits)) {
    throw new NibbleError("bad_option", `scale bits is ${scaleBits}; use ${SCALE_BITS.join(", ")}.`, {
      param: "scale-bits",
    });
  }
}

function base(name: string, options: MethodOptions): Recipe {
  const { bits = 4, groupSize = 32, symmetric = false, headBits = 8, scaleBits, prune, rotate, learn, tune } = options;
  checkFormat({ bits, groupSize, symmetric, scaleBits });
  if (headBits !== 16 && (!Number.isInteger(headBits) || headBits < 2 || headBits > 8)) {
    throw new NibbleError("bad_option", `head bits is ${headBits}; use 2 to 8, or 16 for a float head.`, {
      param: "head-bits",
    });
  }
  if (prune) checkSparsity(prune.sparsity);
  return {
    name,
    bits,
    groupSize,
    symmetric,
    ...(scaleBits !== undefined && { scaleBits }),
    rounding: "rtn",
    searchGrid: false,
    fold: false,
    asymmetry: 0,
    refits: 0,
    damping: 0.01,
    head:
      headBits === 16
        ? undefined
        : {
            bits: headBits,
            groupSize: headGroupSize(headBits),
            symmetric,
            ...(scaleBits !== undefined && { scaleBits }),
          },
    ...(prune && { prune }),
    ...(rotate && { rotation: 1 }),
    ...(learn !== undefined && learn !== false && { learned: inSteps(LEARNING, learn, "learn") }),
    ...(tune !== undefined && tune !== false && { tuning: inSteps(TUNING, tune, "tune") }),
    windows: prune ? DEFAULT_WINDOWS : 0,
  };
}

/** Pruning alone: what is left stays float. */
export const prune = (pruning: Pruning): Recipe => ({
  ...base(pruning.method, { groupSize: "row", headBits: 16, prune: pruning }),
  bits: 16,
  rounding: "none",
});

/** Round to nearest; needs no data. */
export const rtn = (options: MethodOptions = {}): Recipe => base("rtn", options);

/** Half-quadratic quantization (Badri and Shaji 2023) behind a fold that the weights suggest; needs no data. */
export const hqq = (options: MethodOptions = {}): Recipe => ({
  ...base("hqq", options),
  rounding: "hqq",
  fold: true,
});

/** GPTQ with searched grids, columns by descending diag(H), groups contiguous. */
export const gptq = (options: MethodOptions = {}): Recipe => ({
  ...base("gptq", options),
  rounding: "gptq",
  searchGrid: true,
  windows: DEFAULT_WINDOWS,
});

/** AWQ: per-channel scales and searched (clipped) grids, then round to nearest. */
export const awq = (options: MethodOptions = {}): Recipe => ({
  ...base("awq", options),
  searchGrid: true,
  fold: true,
  windows: DEFAULT_WINDOWS,
});

/**
 * SmoothQuant: weights and inputs in 8 bits, for integer kernels; what smoothing leaves of the weights' rounding GPTQ makes
 * good. These kernels know no other format.
 */
export function smoothquant(options: MethodOptions = {}): Recipe {
  const { bits = 8, groupSize = "row", headBits = 8, prune } = options;
  for (const [flag, found, needed] of [
    ["bits", bits, 8],
    ["group-size", groupSize, "row"],
  ] as const) {
    if (found === needed) continue;
    throw new NibbleError("bad_option", `smoothquant: ${flag} is ${found}; integer products take ${needed}.`, {
      param: flag,
    });
  }
  const step = (["rotate", "learn", "tune"] as const).find((name) => options[name]);
  if (step) {
    throw new NibbleError("bad_option", `smoothquant goes without ${step}; leave it out.`, { param: step });
  }
  if (headBits !== 8 && headBits !== 16) {
    throw new NibbleError("bad_option", `smoothquant: head bits is ${headBits}; use 8, or 16 for a float head.`, {
      param: "head-bits",
    });
  }
  return {
    ...base("smoothquant", { bits, groupSize, symmetric: true, headBits, prune }),
    rounding: "gptq",
    fold: true,
    inputBits: 8,
    head: headBits === 8 ? { bits: 8, groupSize: "row", symmetric: true } : undefined,
    windows: SMOOTHING_WINDOWS,
  };
}
/** Of embedding and head in the presets that calibrate on enough text to choose them by GPTQ. */
const PRESET_HEAD_BITS = 4;

/** AWQ on what two windows tell of each channel: no products but the model's own. Pruning asks for more than that. */
const fast = (options: MethodOptions): Recipe => ({
  ...awq(options),
  name: "fast",
  ...(!options.prune && { channelMoments: true, windows: 2 }),
});
/**
 * AWQ's fold, then GPTQ aimed at the float prefix's outputs. SmolLM2, group 32, KL on 8 windows of wikitext-2: 0.057 with
 * 16 windows and 0.051 with 32 without the aim, 0.047 with 24 windows and it (0.0467 on 64 windows), for about the time
 * of 48 without. The text that calibrates is not the text that the model will meet: ten times the paper's damping takes its
 * correlations for less certain.
 */
const standard = (options: MethodOptions): Recipe => ({
  ...gptq({ ...options, headBits: options.headBits ?? PRESET_HEAD_BITS }),
  name: "default",
  fold: true,
  asymmetry: 0.5,
  damping: 0.1,
  windows: 30,
});
/** The default on more text. Learned rounding and tuning stay out: on SmolLM2 they made what was held back worse (README). */
const best = (options: MethodOptions): Recipe => ({ ...standard(options), name: "best", windows: DEFAULT_WINDOWS });

const presets = { fast, default: standard, best };
export type Preset = keyof typeof presets;
export const PRESETS = Object.keys(presets) as Preset[];

export function preset(name: Preset, options: MethodOptions = {}): Recipe {
  return presets[name](options);
}

const methods = { rtn, hqq, gptq, awq, smoothquant };
export type Method = keyof typeof methods;
export const METHODS = Object.keys(methods) as Method[];

export function method(name: Method, options: MethodOptions = {}): Recipe {
  return methods[name](options);
}
