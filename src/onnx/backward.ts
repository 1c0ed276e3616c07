/**
 * Reverse-mode differentiation of a graph: one backward rule per operator of ops.ts, stated with the same operators, so
 * that gradients run wherever the forward graph runs. Fused attention has no rule: build the graph with
 * `src/kv/plain.ts` and without `fuse`.
 */
import { NibbleError } from "../errors.ts";
import type { Graph, Node, Value } from "./graph.ts";
import * as ops from "./ops.ts";

interface Context {
  readonly g: Graph;
  readonly node: Node;
  /** undefined where an input is left out. */
  readonly inputs: readonly (Value | undefined)[];
  readonly outputs: readonly Value[];
  /** dL/d(output), undefined where nothing depends on that output. */
  readonly gradients: readonly (Value | undefined)[];
  /** Whether input i leads to something that is asked for. */
  wanted(i: number): boolean;
}

/** dL/d(input) for each input that is wanted. */
type Rule = (context: Context) => (Value | undefined)[];

const first = ({ gradients }: Context): Value => gradients[0]!;

const rules: Readonly<Record<string, Rule>> = {
  Identity: (c) => [first(c)],
  Neg: (c) => [ops.neg(c.g, first(c))],

  Add: (c) => c.inputs.map((input) => unbroadcast(c.g, first(c), input!)),

  Sub(c) {
    const [a, b] = c.inputs as Value[];
    return [unbroadcast(c.g, first(c), a), c.wanted(1) ? unbroadcast(c.g, ops.neg(c.g, first(c)), b) : undefined];
  },

  Mul(c) {
    const [a, b] = c.inputs as Value[];
    return [
      c.wanted(0) ? unbroadcast(c.g, ops.mul(c.g, first(c), b), a) : undefined,
      c.wanted(1) ? unbroadcast(c.g, ops.mul(c.g, first(c), a), b) : undefined,
    ];
  },

  Div(c) {
    const [a, b] = c.inputs as Value[];
    const overB = ops.div(c.g, first(c), b);
    return [
      c.wanted(0) ? unbroadcast(c.g, overB, a) : undefined,
      c.wanted(1) ? unbroadcast(c.g, ops.neg(c.g, ops.mul(c.g, overB, c.outputs[0])), b) : undefined,
    ];
  },

  Tanh(c) {
    const one = c.g.scalar(1);
    return [ops.mul(c.g, first(c), ops.sub(c.g, one, ops.mul(c.g, c.outputs[0], c.outputs[0])))];
  },

  Sigmoid(c) {
    const [y] = c.outputs;
    return [ops.mul(c.g, first(c), ops.mul(c.g, y, ops.sub(c.g, c.g.scalar(1), y)))];
  },

  Relu: (c) => [ops.mul(c.g, first(c), ops.sign(c.g, c.outputs[0]))],

  /** y = x s, s = sigmoid(alpha x): dy/dx = s + alpha y (1 - s) */
  QuickGelu({ g, node, inputs, outputs, gradients }) {
    const alpha = (node.attributes.alpha as { float: number }).float;
    const s = ops.sigmoid(g, ops.mul(g, inputs[0]!, g.scalar(alpha)));
    const rest = ops.mul(g, ops.mul(g, outputs[0], ops.sub(g, g.scalar(1), s)), g.scalar(alpha));
    return [ops.mul(g, gradients[0]!, ops.add(g, s, rest))];
  },

  Gelu({ g, node, inputs, gradients }) {
    const x = inputs[0]!;
    const slope = node.attributes.approximate === "tanh" ? tanhGeluSlope(g, x) : exactGeluSlope(g, x);
    return [ops.mul(g, gradients[0]!, slope)];
  },

  /** dx = y (dy - sum(dy y)) */
  Softmax({ g, node, outputs, gradients }) {
    const axis = node.attributes.axis as number;
    const [y] = outputs;
    const weighted = ops.mul(g, gradients[0]!, y);
    return [ops.sub(g, weighted, ops.mul(g, y, ops.reduceSum(g, weighted, axis, true)))];
  },

  MatMul(c) {
    const { g } = c;
    const [a, b] = c.inputs as Value[];
    const dY = first(c);
    const dA = () => unbroadcast(g, ops.fusedMatMul(g, dY, b, { transB: true }), a);
    const dB = () =>
      b.shape.length === 2 ? rowsProduct(g, a, dY) : unbroadcast(g, ops.fusedMatMul(g, a, dY, { transA: true }), b);
    return [c.wanted(0) ? dA() : undefined, c.wanted(1) ? dB() : undefined];
  },

  /** Only as linear layers use it: Y = X Wᵀ with W (outFeatures, inFeatures), or a batched X Wᵀ of equal batches. */
  FusedMatMul(c) {
    const { g, node } = c;
    const [x, w] = c.inputs as Value[];
    const { transA, transB, alpha } = node.attributes as { transA: number; transB: number; alpha: { float: number } };
    if (transA || !transB || alpha.float !== 1) throw unsupported(node, "with transA, without transB or with alpha");
    const dY = first(c);
    const dX = () => unbroadcast(g, ops.matMul(g, dY, w), x);
    const dW = () =>
      w.shape.length === 2 ? rowsProduct(g, dY, x) : unbroadcast(g, ops.fusedMatMul(g, dY, x, { transA: true }), w);
    return [c.wanted(0) ? dX() : undefined, c.wanted(1) ? dW() : undefined];
  },

  /** y = x r w, r = 1 / sqrt(mean(x²) + ε): dx = r (u - x r² mean(u x)), u = dy w; dw = sum(dy x r) */
  SimplifiedLayerNormalization(c) {
    const { g, node } = c;
    const [x, w] = c.inputs as Value[];
    const dY = first(c);
    const r = inverseRoot(g, ops.reduceMean(g, ops.mul(g, x, x), -1), node);
    const normed = ops.mul(g, x, r);
    const dX = () => {
      const u = ops.mul(g, dY, w);
      const along = ops.reduceMean(g, ops.mul(g, u, normed), -1);
      return ops.mul(g, r, ops.sub(g, u, ops.mul(g, normed, along)));
    };
    return [c.wanted(0) ? dX() : undefined, c.wanted(1) ? unbroadcast(g, ops.mul(g, dY, normed), w) : undefined];
  },

  /** y = n w + b, n = (x - mean) r: dx = r (u - mean(u) - n mean(u n)), u = dy w */
  LayerNormalization(c) {
    const { g, node } = c;
    const [x, w, b] = c.inputs as Value[];
    const dY = first(c);
    const centred = ops.sub(g, x, ops.reduceMean(g, x, -1));
    const r = inverseRoot(g, ops.reduceMean(g, ops.mul(g, centred, centred), -1), node);
    const n = ops.mul(g, centred, r);
    const dX = () => {
      const u = ops.mul(g, dY, w);
      const along = ops.mul(g, n, ops.reduceMean(g, ops.mul(g, u, n), -1));
      return ops.mul(g, r, ops.sub(g, ops.sub(g, u, ops.reduceMean(g, u, -1)), along));
    };
    return [
      c.wanted(0) ? dX() : undefined,
      c.wanted(1) ? unbroadcast(g, ops.mul(g, dY, n), w) : undefined,
      b && c.wanted(2) ? unbroadcast(g, dY, b) : undefined,
    ];
  },

  Reshape: (c) => [ops.reshapeLike(c.g, first(c), c.inputs[0]!)],
  Unsqueeze: (c) => [ops.reshapeLike(c.g, first(c), c.inputs[0]!)],
  Squeeze: (c) => [ops.reshapeLike(c.g, first(c), c.inputs[0]!)],

  Transpose(c) {
    const perm = c.node.attributes.perm as readonly number[];
    return [
      ops.transpose(
        c.g,
        first(c),
        perm.map((_, i) => perm.indexOf(i)),
      ),
    ];
  },

  Split({ g, node, outputs, gradients }) {
    const parts = outputs.map((output, i) => gradients[i] ?? ops.mul(g, output, g.scalar(0)));
    return [ops.concat(g, parts, node.attributes.axis as number)];
  },

  Concat(c) {
    const { g } = c;
    const inputs = c.inputs as Value[];
    const axis = c.node.attributes.axis as number;
    const sizes = ops.concat(
      g,
      inputs.map((input) => ops.shapeOf(g, input, axis)),
      0,
    );
    const parts = inputs.map(({ type, shape }) => ({ type, shape }));
    return g.node("Split", [first(c), sizes], parts, { attributes: { axis } });
  },

  Pad(c) {
    const [x, pads] = c.inputs as Value[];
    return [c.g.node("Pad", [first(c), ops.neg(c.g, pads)], [{ type: x.type, shape: x.shape }])[0]];
  },

  /** Rows of a matrix, no two alike. */
  Gather(c) {
    const { g } = c;
    const [x, indices] = c.inputs as Value[];
    if (c.node.attributes.axis || indices.shape.length !== 1) throw unsupported(c.node, "of anything but rows");
    return [ops.scatterRows(g, ops.mul(g, x, g.scalar(0)), ops.unsqueeze(g, indices, 1), first(c))];
  },

  ScatterND(c) {
    const { g } = c;
    const [, rows, updates] = c.inputs as Value[];
    const zeros = ops.mul(g, updates, g.scalar(0));
    return [
      c.wanted(0) ? ops.scatterRows(g, first(c), rows, zeros) : undefined,
      undefined,
      c.wanted(2) ? ops.gather(g, first(c), ops.squeeze(g, rows, 1)) : undefined,
    ];
  },

  TopK(c) {
    const { g } = c;
    const [x] = c.inputs as Value[];
    return [ops.scatterLast(g, ops.mul(g, x, g.scalar(0)), c.outputs[1], first(c))];
  },

  Where(c) {
    const { g } = c;
    const [condition, a, b] = c.inputs as Value[];
    const zero = g.scalar(0);
    return [
      undefined,
      c.wanted(1) ? unbroadcast(g, ops.where(g, condition, first(c), zero), a) : undefined,
      c.wanted(2) ? unbroadcast(g, ops.where(g, condition, zero, first(c)), b) : undefined,
    ];
  },

  ReduceSum(c) {
    const [x] = c.inputs as Value[];
    const [axis] = axesOf(c);
    const kept = c.node.attributes.keepdims ? first(c) : ops.unsqueeze(c.g, first(c), axis);
    return [ops.add(c.g, ops.mul(c.g, x, c.g.scalar(0)), kept)];
  },

  Cast: (c) => [ops.cast(c.g, first(c), c.inputs[0]!.type)],
};

/** Operators that gradients can pass through. */
export const differentiable: ReadonlySet<string> = new Set(Object.keys(rules));

/**
 * Appends the backward pass to `g`.
 *   seeds   dL/d(value) by the value's name, of the value's shape
 *   wrt     values (graph inputs, initializers or results) whose gradients are wanted
 * Returns the gradients by name; a value that no seed depends on is missing. Errors: `unsupported` names an operator
 * without a rule.
 */
export function backward(g: Graph, seeds: ReadonlyMap<string, Value>, wrt: readonly Value[]): Map<string, Value> {
  const forward = [...g.nodes];
  const active = reachedFrom(g, forward, wrt);
  const gradients = new Map<string, Value>(seeds);
  const scope = g.scope;
  g.scope = "backward";
  for (const node of forward.toReversed()) {
    if (!node.outputs.some((output) => gradients.has(output) && active.has(output))) continue;
    const rule = rules[node.opType];
    if (!rule) throw unsupported(node, "");
    const inputs = node.inputs.map((name) => (name ? valueNamed(g, name) : undefined));
    const results = rule({
      g,
      node,
      inputs,
      outputs: node.outputs.map((name) => valueNamed(g, name)),
      gradients: node.outputs.map((name) => gradients.get(name)),
      wanted: (i) => active.has(node.inputs[i]),
    });
    for (const [i, gradient] of results.entries()) {
      const name = node.inputs[i];
      if (!gradient || !active.has(name)) continue;
      const sum = gradients.get(name);
      gradients.set(name, sum ? ops.add(g, sum, gradient) : gradient);
    }
  }
  g.scope = scope;
  return new Map(wrt.flatMap(({ name }) => (gradients.has(name) ? [[name, gradients.get(name)!]] : [])));
}

/** Names of float values that depend on `from`; shapes, positions and masks carry no gradient. */
function reachedFrom(g: Graph, nodes: readonly Node[], from: readonly Value[]): Set<string> {
  const reached = new Set(from.map(({ name }) => name));
  for (const node of nodes) {
    if (!node.inputs.some((input) => reached.has(input))) continue;
    for (const output of node.outputs) {
      if (output && valueNamed(g, output).type.startsWith("float")) reached.add(output);
    }
  }
  return reached;
}

function valueNamed(g: Graph, name: string): Value {
  const value = g.values.get(name) ?? g.initializers.get(name) ?? g.inputs.find((input) => input.name === name);
  if (!value) throw new NibbleError("engine", `backward: no value is called ${name}.`);
  return value;
}

function unsupported(node: Node, how: string): NibbleError {
  return new NibbleError(
    "unsupported",
    `${node.name}: operator ${node.opType}${how && ` ${how}`} has no backward rule, so methods that need gradients cannot be used on this family; gptq and awq can.`,
  );
}

/** Sums a gradient over the dimensions along which `like` was repeated. */
function unbroadcast(g: Graph, gradient: Value, like: Value): Value {
  let result = gradient;
  while (result.shape.length > like.shape.length) result = ops.reduceSum(g, result, 0);
  for (const [axis, size] of like.shape.entries()) {
    if (size === 1 && result.shape[axis] !== 1) result = ops.reduceSum(g, result, axis, true);
  }
  return result;
}

/** aᵀ b over all leading dimensions: (..., m) and (..., n) -> (m, n) */
function rowsProduct(g: Graph, a: Value, b: Value): Value {
  const rows = (x: Value) => ops.reshape(g, x, [-1, x.shape.at(-1) as number], ["rows", x.shape.at(-1)!]);
  return ops.fusedMatMul(g, rows(a), rows(b), { transA: true });
}

function inverseRoot(g: Graph, meanSquare: Value, node: Node): Value {
  const { float } = node.attributes.epsilon as { float: number };
  return ops.div(g, g.scalar(1), ops.sqrt(g, ops.add(g, meanSquare, g.scalar(float))));
}

function axesOf({ g, node }: Context): readonly number[] {
  const { data } = g.initializers.get(node.inputs[1])!;
  const bytes = data as Uint8Array;
  return Array.from(new BigInt64Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 8), Number);
}

/** d/dx of x Φ(x): Φ(x) + x φ(x) */
function exactGeluSlope(g: Graph, x: Value): Value {
  const phi = ops.mul(g, ops.add(g, ops.erf(g, ops.mul(g, x, g.scalar(Math.SQRT1_2))), g.scalar(1)), g.scalar(0.5));
  const density = ops.mul(
    g,
    ops.exp(g, ops.mul(g, ops.mul(g, x, x), g.scalar(-0.5))),
    g.scalar(1 / Math.sqrt(2 * Math.PI)),
  );
  return ops.add(g, phi, ops.mul(g, x, density));
}

/** d/dx of x (1 + t) / 2 with t = tanh(c (x + 0.044715 x³)): (1 + t) / 2 + x (1 - t²) c (1 + 0.134145 x²) / 2 */
function tanhGeluSlope(g: Graph, x: Value): Value {
  const c = Math.sqrt(2 / Math.PI);
  const square = ops.mul(g, x, x);
  const inner = ops.mul(g, x, ops.add(g, ops.mul(g, square, g.scalar(0.044715 * c)), g.scalar(c)));
  const t = ops.tanh(g, inner);
  const steep = ops.add(g, ops.mul(g, square, g.scalar(3 * 0.044715 * c)), g.scalar(c));
  const rest = ops.mul(g, ops.mul(g, x, ops.sub(g, g.scalar(1), ops.mul(g, t, t))), steep);
  return ops.mul(g, ops.add(g, ops.add(g, t, g.scalar(1)), rest), g.scalar(0.5));
}
