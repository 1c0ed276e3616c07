/** What quantizers share: which grids are allowed, and what calibration knows about a linear's inputs. */
import type { ScaleBits } from "../src/tensor/quantized.ts";

import type { TokenSample } from "./smoothquant.ts";

/** Which grids are allowed: value = (code - zero) * scale, one scale (and zero) per row and group of columns. */
export interface GridSpec {
  /** 2 to 8. */
  readonly bits: number;
  /** Columns that share a scale; a group never crosses a row's end, so the last one may be ragged. */
  readonly groupSize: number;
  /** Every zero is 2^(bits-1); else zeros are integers 0 .. 2^bits - 1. */
  readonly symmetric: boolean;
  /** The nearest scale that can be stored: quantizers round to what will be in the file. */
  readonly roundScale: RoundScale;
  /** Bits that a scale is stored in; below 16 the scales of a row share a factor (scale-grid.ts). Default 16. */
  readonly scaleBits?: ScaleBits;
}

export type RoundScale = (scale: number) => number;

/** A row-major float matrix; a row is one output feature, a column one input feature. */
export interface Matrix {
  readonly rows: number;
  readonly cols: number;
  readonly data: Float32Array;
}

/** What calibration knows about one linear's inputs. X (tokens, cols) come from the already quantized prefix. */
export interface InputStatistics {
  readonly tokens: number;
  /** (cols, cols) XᵀX / tokens, or its diagonal (cols) where that is all there is: inputs are taken as uncorrelated then. */
  readonly H: Moment;
  /** (cols) mean |X|, AWQ's measure of how much a channel carries. */
  readonly meanAbs?: ArrayLike<number>;
  /** Some of the inputs themselves, where rounding them is part of the loss. */
  readonly sample?: TokenSample;
  /**
   * (rows, cols) (Y_float - W X) Xᵀ / tokens, Y_float what the unquantized prefix would make of the same tokens here:
   * what earlier layers left undone and these inputs can make good.
   */
  readonly dYX?: Float32Array;
}

/** A second moment of activations: float32 products summed up in float32. */
export type Moment = Float32Array | Float64Array;

/** Scales as 32-bit floats. */
export const roundScaleToF32: RoundScale = Math.fround;

/** 2^42 + 1: Veltkamp's splitter that leaves a double 53 - 42 = 11 significant bits, as many as a float16 has. */
const F16_SPLITTER = 2 ** 42 + 1;
const F16_MAX = 65504;
/** Smallest normal float16; below it values are multiples of 2^-24. */
const F16_MIN_NORMAL = 2 ** -14;

/** Scales as 16-bit floats (IEEE 754 binary16), kept finite. */
export const roundScaleToF16: RoundScale = (scale) => {
  const magnitude = Math.abs(scale);
  if (magnitude < F16_MIN_NORMAL) return Math.round(scale * 2 ** 24) * 2 ** -24;
  if (magnitude >= F16_MAX) return Math.sign(scale) * F16_MAX;
  const split = scale * F16_SPLITTER;
  return split - (split - scale);
};
