/**
 * How far the providers may differ, operator by operator: the greatest difference of any output, relative to the greatest
 * value of that output where that is above 1. An operator without a line here fails the gate.
 */

/** Moves, compares, counts or computes on whole numbers. */
const EXACT = 0;
/** One rounding: a shader may contract, reorder or divide by way of a reciprocal. */
const ROUNDING = 2e-7;
/** Approximations of exp, tanh and erf differ between libraries. */
const TRANSCENDENTAL = 2e-6;
/** Sums of some hundred products in another order. */
const SUMS = 2e-6;

export interface Parity {
  readonly tolerance: number;
  /** Cases (by their keys) that a provider does not run, as its own error says. */
  readonly refused?: readonly { readonly on: "wasm" | "webgpu"; readonly match: RegExp; readonly because: string }[];
}

const all = (tolerance: number, names: string): Record<string, Parity> =>
  Object.fromEntries(names.split(" ").map((name) => [name, { tolerance }]));

export const PARITY: Readonly<Record<string, Parity>> = {
  ...all(EXACT, "And Cast Concat Equal Gather GatherND Greater Identity Less LessOrEqual Max Min Neg NonZero Range"),
  ...all(EXACT, "Relu Reshape ScatterND Shape Slice Split Squeeze TopK Transpose Unsqueeze Where"),
  ...all(EXACT, "Abs BitShift BitwiseAnd BitwiseOr QuantizeLinear"),
  ...all(ROUNDING, "Add Sub Mul Div ReduceMax DequantizeLinear"),
  ...all(TRANSCENDENTAL, "Gelu QuickGelu Sigmoid Softmax Tanh RotaryEmbedding"),
  ...all(SUMS, "LayerNormalization SimplifiedLayerNormalization SkipSimplifiedLayerNormalization ReduceSum"),
  ...all(SUMS, "MatMul MatMulNBits MatMulIntegerToFloat DynamicQuantizeMatMul"),
  GroupQueryAttention: {
    tolerance: SUMS,
    refused: [{ on: "webgpu", match: /kv_cache_bit_width=8/, because: "its kernel takes no int8 cache, at run time" }],
  },
};

/** In ops.ts for other graphs than exported ones. */
export const NOT_EXPORTED: Readonly<Record<string, string>> = {
  ...Object.fromEntries(
    "Sqrt Exp Log Sign Erf ReduceMean ScatterElements Softplus"
      .split(" ")
      .map((name) => [name, "gradients (backward.ts) and measures (eval/)"]),
  ),
  FusedMatMul: "gradients, and calibration graphs whose weights are inputs",
  Pad: "the short convolution of a calibration graph, which keeps no state",
};
