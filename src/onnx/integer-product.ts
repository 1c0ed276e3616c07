/**
 * Products on integer kernels, from operators that every CPU provider has:
 *
 *   W (rows, cols)     int8 with one scale per row, stored (cols, rows) as the kernels want it
 *   x (.., cols)       per token: m = max|x|, u = round(127 x / m) + 128 as uint8
 *   y (.., rows)       (u - 128) W, times the row's scale, times m / 127
 *
 * One scale per token: the stock DynamicQuantizeLinear takes one per tensor and costs ten times the drift. uint8 by int8:
 * int8 by int8 has no fast kernel in WASM.
 */
import type { Dim, Graph, Value } from "./graph.ts";
import * as ops from "./ops.ts";
import type { AttributeProto, ModelProto, NodeProto } from "./proto.ts";

const INT8_MAX = 127;
const UINT8_ZERO = 128;
/** A token of zeros has no scale; this one keeps its codes at zero. */
const SMALLEST_MAX = 1e-20;
/** A second plane holds what the first one's rounding left, at most half a step, in as many steps again. */
const PLANE_STEPS = 2 * INT8_MAX;
/**
 * A head is cut into products of so many columns. The kernel copies strips of its matrix at every call, and in a
 * matrix of 49,152 columns every row of a strip lies on another page: 12 ms a token on SmolLM2, 4 in parts.
 */
const PART_ROWS = 1536;
/** Matrices up to so many rows stay whole. */
const WHOLE_ROWS = 8192;

/** [start, end) of the parts that a matrix is multiplied in. */
export function productParts(rows: number): readonly (readonly [number, number])[] {
  const step = rows > WHOLE_ROWS ? PART_ROWS : rows;
  return Array.from({ length: Math.ceil(rows / step) }, (_, i) => [i * step, Math.min(rows, (i + 1) * step)]);
}

/** 1: codes of 8 bits. 2: two such planes, 15 bits in all, multiplied in one call as twice as many tokens. */
export type Planes = 1 | 2;

/** Operators whose results have outliers in every token: a gated product, an activation; and a head's last rows. */
const ROUGH = new Set(["Mul", "Gelu", "QuickGelu", "Relu", "Slice"]);

/**
 * How finely the inputs of a product are rounded, by the operator that made them. SmolLM2 (8-bit weights, KL on 4 windows
 * of wikitext-2): one plane everywhere adds 0.0162, two planes in front of down projections and head leave 0.004 of that
 * and cost a tenth of the products. The file that `default` writes, 16 windows: 0.1014 at accuracy level 0, its twin 0.1059.
 */
export function planesAfter(opType: string | undefined): Planes {
  return opType !== undefined && ROUGH.has(opType) ? 2 : 1;
}

/** Activations as integers; every product that reads them shares these. */
export interface RoundedTokens {
  /** (planes * batch, .., cols) uint8 */
  readonly codes: Value;
  /** (batch, .., 1) the greatest magnitude of each token */
  readonly bounds: Value;
  readonly planes: Planes;
  /** Along which planes are stacked. */
  readonly axis: number;
  /** (1) int64: x's size along the axis that planes are stacked on, where it may be 0. */
  readonly size?: Value;
}

export interface RoundingOptions {
  readonly planes?: Planes;
  /** Along which planes are stacked: 0, the batch. */
  readonly axis?: number;
  /** x can have no rows: ONNX Runtime 1.30 reduces (0, cols) to itself, not to (0, 1), so that is cut. */
  readonly mayBeEmpty?: boolean;
}

/** x (batch, .., cols) float32 */
export function roundTokens(
  g: Graph,
  x: Value,
  { planes = 1, axis = 0, mayBeEmpty = false }: RoundingOptions = {},
): RoundedTokens {
  const single = x.shape.with(-1, 1);
  const [reduced] = g.node("ReduceMax", [ops.abs(g, x), g.ints([-1])], [{ type: x.type, shape: single }], {
    attributes: { keepdims: 1 },
  });
  const max = mayBeEmpty ? ops.slice(g, reduced, g.ints([0]), g.ints([1]), -1, 1) : reduced;
  const [bounds] = g.node("Max", [max, g.scalar(SMALLEST_MAX)], [{ type: x.type, shape: single }]);
  const share = ops.div(g, x, bounds);
  const zero = zeroOf(g);
  const quantize = (value: Value, step: number) =>
    g.node("QuantizeLinear", [value, g.scalar(step), zero], [{ type: "uint8", shape: x.shape }])[0];
  const first = quantize(share, 1 / INT8_MAX);
  if (planes === 1) return { codes: first, bounds, planes, axis };
  const [held] = g.node("DequantizeLinear", [first, g.scalar(1 / INT8_MAX), zero], [{ type: x.type, shape: x.shape }]);
  const rest = quantize(ops.sub(g, share, held), 1 / INT8_MAX / PLANE_STEPS);
  const size = mayBeEmpty ? ops.shapeOf(g, first, axis) : undefined;
  return { codes: ops.concat(g, [first, rest], axis), bounds, planes, axis, size };
}

/** A matrix or a part of one. */
export interface IntegerPart {
  /** (cols, rows) int8 */
  readonly weight: Value;
  /** (rows) float32 */
  readonly rowScales: Value;
}

/** (batch, .., rows) float32; the parts' rows one after the other. */
export function integerProduct(g: Graph, rounded: RoundedTokens, parts: readonly IntegerPart[], bias?: Value): Value {
  const { bounds, planes, axis, size } = rounded;
  let product = multiply(g, rounded, parts);
  if (planes === 2) {
    const [first, rest] = halves(g, product, bounds.shape.with(-1, product.shape.at(-1)!), axis, size);
    product = ops.add(g, first, ops.mul(g, rest, g.scalar(1 / PLANE_STEPS)));
  }
  // tokens' scales are not one number: they follow the product
  const scaled = ops.mul(g, product, bounds);
  return bias ? ops.add(g, scaled, bias) : scaled;
}

/**
 * The same of one token, x (1, 1, cols), where a scale a tensor is a scale a token: the stock operator does it in one node
 * instead of seven. An input that wants two planes gets them as two tokens, added up by a product with their scales.
 */
export function oneTokenProduct(
  g: Graph,
  x: Value,
  planes: Planes,
  parts: readonly IntegerPart[],
  bias?: Value,
): Value {
  if (planes === 2) {
    const rounded = roundTokens(g, x, { planes, axis: x.shape.length - 2 });
    const shares = g.initializer("const/float32/planes", "float32", [2], Float32Array.of(1, 1 / PLANE_STEPS));
    const scales = ops.mul(g, rounded.bounds, shares); // (1, 1, 2)
    const product = ops.matMul(g, scales, multiply(g, rounded, parts));
    return bias ? ops.add(g, product, bias) : product;
  }
  const products = parts.map(
    ({ weight, rowScales }) =>
      g.node(
        "DynamicQuantizeMatMul",
        [x, weight, rowScales, undefined, parts.length === 1 ? bias : undefined],
        [{ type: "float32", shape: x.shape.with(-1, weight.shape[1]) }],
        { domain: "com.microsoft" },
      )[0],
  );
  const product = joined(g, products);
  return bias && parts.length > 1 ? ops.add(g, product, bias) : product;
}

/** Codes times weights, without the tokens' own scales. */
function multiply(g: Graph, { codes }: RoundedTokens, parts: readonly IntegerPart[]): Value {
  const step = g.scalar(1 / INT8_MAX);
  return joined(
    g,
    parts.map(
      ({ weight, rowScales }) =>
        g.node(
          "MatMulIntegerToFloat",
          [codes, weight, step, rowScales, zeroOf(g)],
          [{ type: "float32", shape: codes.shape.with(-1, weight.shape[1]) }],
          { domain: "com.microsoft" },
        )[0],
    ),
  );
}

function joined(g: Graph, products: readonly Value[]): Value {
  return products.length > 1 ? ops.concat(g, products, -1) : products[0];
}

/** Both planes of a product. ONNX Runtime 1.30 does not split nothing into two, but slices it. */
function halves(
  g: Graph,
  product: Value,
  shape: readonly Dim[],
  axis: number,
  size: Value | undefined,
): readonly Value[] {
  if (size) {
    const end = ops.add(g, size, size);
    return [
      ops.slice(g, product, g.ints([0]), size, axis, shape[axis]),
      ops.slice(g, product, size, end, axis, shape[axis]),
    ];
  }
  const plane = { type: product.type, shape };
  return g.node("Split", [product], [plane, plane], { attributes: { axis, num_outputs: 2 } });
}

function zeroOf(g: Graph): Value {
  return g.initializer(`const/uint8/${UINT8_ZERO}`, "uint8", [], Uint8Array.of(UINT8_ZERO));
}

/**
 * The same graph with activations left as they are: for telling what rounding them costs from errors in the graph.
 * Codes become the numbers that they were rounded from, and integer products float ones of the same weights.
 */
export function withFloatActivations(model: ModelProto): ModelProto {
  const { graph } = model;
  const makers = new Map(graph.node.flatMap((node) => node.output.map((name) => [name, node] as const)));
  const changed = new Map<NodeProto, NodeProto[]>();
  const unrounded = new Set<string>();
  const step = (opType: string, input: string[], output: string): NodeProto => ({
    opType,
    name: `${output}/${opType}`,
    input,
    output: [output],
    attribute: opType === "Cast" ? [TO_FLOAT] : [],
  });
  const unround = (codes: string) => {
    const node = makers.get(codes);
    if (!node || unrounded.has(codes)) return;
    if (node.opType === "Concat") for (const input of node.input) unround(input);
    if (node.opType !== "QuantizeLinear") return;
    unrounded.add(codes);
    const [x, scale, zero] = node.input;
    changed.set(node, [
      step("Cast", [zero], `${codes}/zero`),
      step("Div", [x, scale], `${codes}/steps`),
      step("Add", [`${codes}/steps`, `${codes}/zero`], codes),
    ]);
  };
  for (const node of graph.node) {
    if (node.opType !== "MatMulIntegerToFloat") continue;
    const [codes, weight, tokenScale, rowScales, zero] = node.input;
    const [y] = node.output;
    unround(codes);
    changed.set(node, [
      step("Cast", [weight], `${y}/weight`),
      step("Cast", [zero], `${y}/zero`),
      step("Sub", [codes, `${y}/zero`], `${y}/centred`),
      step("MatMul", [`${y}/centred`, `${y}/weight`], `${y}/sums`),
      step("Mul", [`${y}/sums`, tokenScale], `${y}/scaled`),
      step("Mul", [`${y}/scaled`, rowScales], y),
    ]);
  }
  for (const node of graph.node) {
    const [codes, scale] = node.input;
    if (node.opType !== "DequantizeLinear" || !unrounded.has(codes)) continue;
    const [y] = node.output;
    changed.set(node, [step("Sub", [codes, `${codes}/zero`], `${y}/centred`), step("Mul", [`${y}/centred`, scale], y)]);
  }
  return { ...model, graph: { ...graph, node: graph.node.flatMap((node) => changed.get(node) ?? [node]) } };
}

const FLOAT = 1;
const TO_FLOAT: AttributeProto = { name: "to", type: 2, i: BigInt(FLOAT) };
