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
/** Means over hundreds of positions of a rotary table, which a shader adds up one by one. */
const MEANS = 1e-5;
/** A softmax between two such sums, over what 4-bit codes mean too. */
const ATTENTION = 5e-6;

export interface Parity {
  readonly tolerance: number;
  /** Cases (by their keys) that a provider does not run, as its own error says. */
  readonly refused?: readonly { readonly on: "wasm" | "webgpu"; readonly match: RegExp; readonly because: string }[];
}

const all = (tolerance: number, names: string): Record<string, Parity> =>
  Object.fromEntries(names.split(" ").map((name) => [name, { tolerance }]));

export const PARITY: Readonly<Record<string, Parity>> = {
  ...all(EXACT, "And Concat Equal Gather GatherND Greater Identity Less LessOrEqual Max Min Neg NonZero Range"),
  ...all(EXACT, "Relu Reshape ScatterND Shape Slice Split Squeeze TopK Transpose Unsqueeze Where"),
  ...all(EXACT, "Abs BitShift BitwiseAnd BitwiseOr Expand QuantizeLinear"),
  ...all(ROUNDING, "Add Sub Mul Div ReduceMax DequantizeLinear"),
  ...all(TRANSCENDENTAL, "Exp Gelu QuickGelu ReduceLogSumExp Sigmoid Softmax Softplus Tanh RotaryEmbedding"),
  ...all(SUMS, "LayerNormalization SimplifiedLayerNormalization SkipSimplifiedLayerNormalization ReduceSum"),
  ...all(SUMS, "MatMul MatMulNBits MatMulIntegerToFloat DynamicQuantizeMatMul"),
  ReduceMean: { tolerance: MEANS },
  Cast: {
    tolerance: EXACT,
    refused: [
      { on: "webgpu", match: /^Cast float(16|32) /, because: "float16 needs shader-f16, which SwiftShader lacks" },
    ],
  },
  GroupQueryAttention: {
    tolerance: ATTENTION,
    refused: [
      {
        on: "webgpu",
        match: /kv_cache_bit_width=/,
        because: "its kernel takes float caches only, as it says at run time",
      },
      { on: "webgpu", match: /qk_output=/, because: "it gives no weights, which --kv-policy and int4 ask for" },
    ],
  },
};

/** In ops.ts for other graphs than exported ones. */
export const NOT_EXPORTED: Readonly<Record<string, string>> = {
  ...Object.fromEntries(
    "Sqrt Sign Erf ScatterElements".split(" ").map((name) => [name, "gradients (backward.ts) and measures (eval/)"]),
  ),
  FusedMatMul: "gradients, and calibration graphs whose weights are inputs",
  Pad: "the short convolution of a calibration graph, which keeps no state",
};
