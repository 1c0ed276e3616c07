/**
 * One function per operator, named as in the ONNX and com.microsoft operator lists, each stating its output's shape.
 * https://onnx.ai/onnx/operators and ContribOperators.md of ONNX Runtime.
 */
import { type Dim, type ElementType, elementCode, float, type Graph, type Value } from "./graph.ts";

const microsoft = "com.microsoft" as const;

/** NumPy's rule; a symbol against a number other than 1 gives the number. */
export function broadcast(a: readonly Dim[], b: readonly Dim[]): Dim[] {
  const rank = Math.max(a.length, b.length);
  return Array.from({ length: rank }, (_, i) => {
    const left = a[a.length - rank + i] ?? 1;
    const right = b[b.length - rank + i] ?? 1;
    if (left === 1) return right;
    if (right === 1) return left;
    return typeof left === "number" ? left : right;
  });
}

function elementwise(opType: string) {
  return (g: Graph, a: Value, b: Value): Value =>
    g.node(opType, [a, b], [{ type: a.type, shape: broadcast(a.shape, b.shape) }])[0];
}

function unary(opType: string) {
  return (g: Graph, x: Value): Value => g.node(opType, [x], [{ type: x.type, shape: x.shape }])[0];
}

export const add = elementwise("Add");
export const sub = elementwise("Sub");
export const mul = elementwise("Mul");
export const div = elementwise("Div");
export const bitwiseAnd = elementwise("BitwiseAnd");
export const bitwiseOr = elementwise("BitwiseOr");

export const tanh = unary("Tanh");
export const sigmoid = unary("Sigmoid");
export const softplus = unary("Softplus");
export const relu = unary("Relu");
export const neg = unary("Neg");
export const sqrt = unary("Sqrt");
export const exp = unary("Exp");
export const abs = unary("Abs");
export const sign = unary("Sign");
export const erf = unary("Erf");
export const identity = unary("Identity");

export function bitShift(g: Graph, x: Value, by: Value, direction: "LEFT" | "RIGHT"): Value {
  return g.node("BitShift", [x, by], [{ type: x.type, shape: broadcast(x.shape, by.shape) }], {
    attributes: { direction },
  })[0];
}

/** Gelu-20: exact, or "tanh" (GPT-2's gelu_new, Gemma's gelu_pytorch_tanh). */
export function gelu(g: Graph, x: Value, approximate: "none" | "tanh"): Value {
  return g.node("Gelu", [x], [{ type: x.type, shape: x.shape }], { attributes: { approximate } })[0];
}

/** com.microsoft QuickGelu: x * sigmoid(alpha x); alpha 1 is SiLU in one node. */
export function quickGelu(g: Graph, x: Value, alpha: number): Value {
  return g.node("QuickGelu", [x], [{ type: x.type, shape: x.shape }], {
    domain: microsoft,
    attributes: { alpha: float(alpha) },
  })[0];
}

export function cast(g: Graph, x: Value, type: ElementType): Value {
  if (x.type === type) return x;
  return g.node("Cast", [x], [{ type, shape: x.shape }], { attributes: { to: elementCode(type) } })[0];
}

/** (..., m, k) x (..., k, n) */
export function matMul(g: Graph, a: Value, b: Value): Value {
  const batch = broadcast(a.shape.slice(0, -2), b.shape.slice(0, -2));
  const shape = [...batch, a.shape[a.shape.length - 2], b.shape[b.shape.length - 1]];
  return g.node("MatMul", [a, b], [{ type: a.type, shape }])[0];
}

/** com.microsoft FusedMatMul: alpha * op(a) x op(b), where op may swap the last two dimensions. */
export function fusedMatMul(
  g: Graph,
  a: Value,
  b: Value,
  { transA = false, transB = false, alpha = 1 }: { transA?: boolean; transB?: boolean; alpha?: number } = {},
): Value {
  const m = a.shape[a.shape.length - (transA ? 1 : 2)];
  const n = b.shape[b.shape.length - (transB ? 2 : 1)];
  const shape = [...broadcast(a.shape.slice(0, -2), b.shape.slice(0, -2)), m, n];
  return g.node("FusedMatMul", [a, b], [{ type: a.type, shape }], {
    domain: microsoft,
    attributes: { transA: Number(transA), transB: Number(transB), alpha: float(alpha) },
  })[0];
}

export interface MatMulNBitsSpec {
  readonly rows: number;
  readonly cols: number;
  readonly bits: number;
  readonly blockSize: number;
  /** 0 computes in the activations' type, 4 rounds activations to int8 (and is the fast path on CPUs). */
  readonly accuracyLevel: number;
}

/**
 * com.microsoft MatMulNBits: x (..., cols) times the transpose of a quantized matrix (rows, cols).
 *   codes (rows, blocks, blockSize * bits / 8) uint8, low bits first; scales (rows, blocks) in x's type;
 *   zeros (rows, ceil(blocks * bits / 8)) uint8 packed like the codes, default 2^(bits-1); bias (rows)
 */
export function matMulNBits(
  g: Graph,
  x: Value,
  codes: Value,
  scales: Value,
  zeros: Value | undefined,
  bias: Value | undefined,
  { rows, cols, bits, blockSize, accuracyLevel }: MatMulNBitsSpec,
): Value {
  return g.node(
    "MatMulNBits",
    [x, codes, scales, zeros, undefined, bias],
    [{ type: x.type, shape: [...x.shape.slice(0, -1), rows] }],
    {
      domain: microsoft,
      attributes: { N: rows, K: cols, bits, block_size: blockSize, accuracy_level: accuracyLevel || undefined },
    },
  )[0];
}

/** com.microsoft's name for RMSNorm over the last dimension: x / sqrt(mean(x^2) + epsilon) * gain. */
export function simplifiedLayerNormalization(g: Graph, x: Value, gain: Value, epsilon: number): Value {
  return g.node("SimplifiedLayerNormalization", [x, gain], [{ type: x.type, shape: x.shape }], {
    attributes: { axis: -1, epsilon: float(epsilon), stash_type: 1 },
  })[0];
}

export function layerNormalization(g: Graph, x: Value, gain: Value, bias: Value | undefined, epsilon: number): Value {
  return g.node("LayerNormalization", [x, gain, bias], [{ type: x.type, shape: x.shape }], {
    attributes: { axis: -1, epsilon: float(epsilon), stash_type: 1 },
  })[0];
}

export function softmax(g: Graph, x: Value, axis = -1): Value {
  return g.node("Softmax", [x], [{ type: x.type, shape: x.shape }], { attributes: { axis } })[0];
}

export function gather(g: Graph, data: Value, indices: Value, axis = 0): Value {
  const shape = [...data.shape.slice(0, axis), ...indices.shape, ...data.shape.slice(axis + 1)];
  return g.node("Gather", [data, indices], [{ type: data.type, shape }], { attributes: { axis } })[0];
}

/** `shape`: 0 keeps the dimension at that place, -1 is inferred; `result` names what comes out. */
export function reshape(g: Graph, x: Value, shape: readonly number[], result: readonly Dim[]): Value {
  return g.node("Reshape", [x, g.ints(shape)], [{ type: x.type, shape: result }])[0];
}

export function transpose(g: Graph, x: Value, perm: readonly number[]): Value {
  return g.node("Transpose", [x], [{ type: x.type, shape: perm.map((axis) => x.shape[axis]) }], {
    attributes: { perm },
  })[0];
}

export function concat(g: Graph, values: readonly Value[], axis: number): Value {
  const [first] = values;
  const at = axis < 0 ? first.shape.length + axis : axis;
  const sizes = values.map((value) => value.shape[at]);
  const joined = sizes.every((size) => typeof size === "number")
    ? sizes.reduce<number>((sum, size) => sum + (size as number), 0)
    : sizes.join("+");
  return g.node("Concat", values, [{ type: first.type, shape: first.shape.with(at, joined) }], {
    attributes: { axis: at },
  })[0];
}

/** Cuts the last dimension into pieces of the given sizes. */
export function splitLast(g: Graph, x: Value, sizes: readonly number[]): Value[] {
  const outer = x.shape.slice(0, -1);
  return g.node(
    "Split",
    [x, g.ints(sizes)],
    sizes.map((size) => ({ type: x.type, shape: [...outer, size] })),
    { attributes: { axis: x.shape.length - 1 } },
  );
}

/** An end for `slice` that is beyond every last row. */
export const LAST = 0x7fffffffffff;

/** x[start:end] along one axis; start and end are (1) int64 values. */
export function slice(g: Graph, x: Value, start: Value, end: Value, axis: number, size: Dim): Value {
  return g.node("Slice", [x, start, end, g.ints([axis])], [{ type: x.type, shape: x.shape.with(axis, size) }])[0];
}

/** Everything along the axis `by` places later: zeros come in at the front, as many rows drop out at the end. */
export function shift(g: Graph, x: Value, axis: number, by: number): Value {
  if (by === 0) return x;
  const pads = Array<number>(2 * x.shape.length)
    .fill(0)
    .with(axis, by);
  pads[x.shape.length + axis] = -by;
  return g.node("Pad", [x, g.ints(pads)], [{ type: x.type, shape: x.shape }])[0];
}

/** Rows of x (batch, rows, ...) at indices (batch, n), each sequence its own: (batch, n, ...). */
export function gatherRows(g: Graph, x: Value, indices: Value): Value {
  const shape = [x.shape[0], indices.shape[1], ...x.shape.slice(2)];
  return g.node("GatherND", [x, unsqueeze(g, indices, 2)], [{ type: x.type, shape }], {
    attributes: { batch_dims: 1 },
  })[0];
}

export function unsqueeze(g: Graph, x: Value, axis: number): Value {
  const at = axis < 0 ? x.shape.length + 1 + axis : axis;
  return g.node("Unsqueeze", [x, g.ints([at])], [{ type: x.type, shape: x.shape.toSpliced(at, 0, 1) }])[0];
}

export function squeeze(g: Graph, x: Value, axis: number): Value {
  const at = axis < 0 ? x.shape.length + axis : axis;
  return g.node("Squeeze", [x, g.ints([at])], [{ type: x.type, shape: x.shape.toSpliced(at, 1) }])[0];
}

export function reduceSum(g: Graph, x: Value, axis: number, keepDims = false): Value {
  const at = axis < 0 ? x.shape.length + axis : axis;
  const shape = keepDims ? x.shape.with(at, 1) : x.shape.toSpliced(at, 1);
  return g.node("ReduceSum", [x, g.ints([at])], [{ type: x.type, shape }], {
    attributes: { keepdims: Number(keepDims) },
  })[0];
}

/** Mean over one axis, which stays with size 1. */
export function reduceMean(g: Graph, x: Value, axis: number): Value {
  const at = axis < 0 ? x.shape.length + axis : axis;
  return g.node("ReduceMean", [x, g.ints([at])], [{ type: x.type, shape: x.shape.with(at, 1) }])[0];
}

/** The elements of x in the shape of `like`. */
export function reshapeLike(g: Graph, x: Value, like: Value): Value {
  const [shape] = g.node("Shape", [like], [{ type: "int64", shape: [like.shape.length] }]);
  return g.node("Reshape", [x, shape], [{ type: x.type, shape: like.shape }])[0];
}

export function where(g: Graph, condition: Value, a: Value, b: Value): Value {
  const shape = broadcast(condition.shape, broadcast(a.shape, b.shape));
  return g.node("Where", [condition, a, b], [{ type: a.type, shape }])[0];
}

export function equal(g: Graph, a: Value, b: Value): Value {
  return g.node("Equal", [a, b], [{ type: "bool", shape: broadcast(a.shape, b.shape) }])[0];
}

/** The k greatest along the last dimension, in descending order: [values, indices]. */
export function topK(g: Graph, x: Value, k: number): [Value, Value] {
  const shape = x.shape.with(-1, k);
  return g.node(
    "TopK",
    [x, g.ints([k])],
    [
      { type: x.type, shape },
      { type: "int64", shape },
    ],
  ) as [Value, Value];
}

/** Coordinates of everything that is not zero or false: (rank, count), `count` names how many there are. */
export function nonZero(g: Graph, x: Value, count: string): Value {
  return g.node("NonZero", [x], [{ type: "int64", shape: [x.shape.length, count] }])[0];
}

/** `data` with its rows at `rows` (n, 1), no two alike, replaced by `updates` (n, ...). */
export function scatterRows(g: Graph, data: Value, rows: Value, updates: Value): Value {
  return g.node("ScatterND", [data, rows, updates], [{ type: data.type, shape: data.shape }])[0];
}

/** `data` with `updates` at `indices` along the last dimension, no two alike in a row. */
export function scatterLast(g: Graph, data: Value, indices: Value, updates: Value): Value {
  return g.node("ScatterElements", [data, indices, updates], [{ type: data.type, shape: data.shape }], {
    attributes: { axis: data.shape.length - 1 },
  })[0];
}

/** The size of one dimension as int64 (1). */
export function shapeOf(g: Graph, x: Value, axis: number): Value {
  return g.node("Shape", [x], [{ type: "int64", shape: [1] }], { attributes: { start: axis, end: axis + 1 } })[0];
}

export interface RotaryEmbeddingSpec {
  readonly heads: number;
  /** Channels that are rotated; 0 = all. */
  readonly rotaryDim: number;
  readonly interleaved: boolean;
}

/** com.microsoft RotaryEmbedding on (batch, seq, heads * headDim); cos and sin are (positions, rotaryDim / 2). */
export function rotaryEmbedding(
  g: Graph,
  x: Value,
  positions: Value,
  cos: Value,
  sin: Value,
  { heads, rotaryDim, interleaved }: RotaryEmbeddingSpec,
): Value {
  return g.node("RotaryEmbedding", [x, positions, cos, sin], [{ type: x.type, shape: x.shape }], {
    domain: microsoft,
    attributes: {
      interleaved: Number(interleaved),
      num_heads: rotaryDim ? heads : undefined,
      rotary_embedding_dim: rotaryDim || undefined,
    },
  })[0];
}

export interface GroupQueryAttentionSpec {
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly scale: number;
  readonly rotaryInterleaved?: boolean;
  /** How many positions a query sees, itself included; undefined = all. */
  readonly window?: number;
  readonly softcap?: number;
}

export interface GroupQueryAttentionInputs {
  /** (batch, seq, heads * headDim), or q, k and v of all heads side by side when `key` is left out. */
  readonly query: Value;
  readonly key?: Value;
  readonly value?: Value;
  /** (batch, kvHeads, past, headDim) */
  readonly pastKey?: Value;
  readonly pastValue?: Value;
  /** int32 (batch): tokens of each sequence so far, the new ones included, minus 1. */
  readonly seqlensK: Value;
  /** int32 scalar: the longest of them, not minus 1. */
  readonly totalSequenceLength: Value;
  /** (positions, rotaryDim / 2); given = rotate inside. */
  readonly cos?: Value;
  readonly sin?: Value;
}

/** com.microsoft GroupQueryAttention: causal attention with its cache; returns [output, presentKey, presentValue]. */
export function groupQueryAttention(
  g: Graph,
  inputs: GroupQueryAttentionInputs,
  { heads, kvHeads, headDim, scale, rotaryInterleaved = false, window, softcap }: GroupQueryAttentionSpec,
  presentNames: readonly [string, string] | undefined,
): [Value, Value, Value] {
  const { query, key, value, pastKey, pastValue, seqlensK, totalSequenceLength, cos, sin } = inputs;
  const [batch, seq] = query.shape;
  const cacheType = pastKey?.type ?? query.type;
  const cacheShape = [batch, kvHeads, "total_sequence_length", pastKey?.shape[3] ?? headDim];
  return g.node(
    "GroupQueryAttention",
    [query, key, value, pastKey, pastValue, seqlensK, totalSequenceLength, cos, sin],
    [
      { type: query.type, shape: [batch, seq, heads * headDim] },
      { type: cacheType, shape: cacheShape, name: presentNames?.[0] },
      { type: cacheType, shape: cacheShape, name: presentNames?.[1] },
    ],
    {
      domain: microsoft,
      attributes: {
        num_heads: heads,
        kv_num_heads: kvHeads,
        scale: float(scale),
        do_rotary: Number(cos !== undefined),
        rotary_interleaved: Number(rotaryInterleaved),
        local_window_size: window,
        softcap: softcap === undefined ? undefined : float(softcap),
      },
    },
  ) as [Value, Value, Value];
}
