import * as ort from "onnxruntime-node";
import { describe, expect, test } from "vitest";
import { resolveModel } from "../../src/arch/index.ts";
import { floatWeights } from "../../src/arch/weights.ts";
import { blockGraph } from "../../src/export/graphs.ts";
import { fullKv } from "../../src/kv/full.ts";
import { plainAttention } from "../../src/kv/plain.ts";
import type { KvGraph } from "../../src/kv/policy.ts";
import { backward, differentiable } from "../../src/onnx/backward.ts";
import { toBytes } from "../../src/onnx/external-data.ts";
import { Graph, type Value } from "../../src/onnx/graph.ts";
import * as ops from "../../src/onnx/ops.ts";
import { openInMemory } from "../fixtures/open-in-memory.ts";
import { repoPath } from "../helpers.ts";

/** Deterministic values in (-1, 1). */
function noise(count: number, seed: number): Float32Array {
  let state = seed >>> 0;
  return Float32Array.from({ length: count }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return (state / 2 ** 31 - 1) * 0.9;
  });
}

type Feeds = Record<string, ort.Tensor>;

/**
 * Central differences of sum(outputs * seeds) in float32: error about h² from curvature plus 1e-7 / h from rounding, so
 * h = 1e-2 leaves some 1e-4 of a gradient's size.
 */
const STEP = 1e-2;
const RELATIVE_TOLERANCE = 5e-3;

async function compareWithDifferences(
  g: Graph,
  output: Value,
  wrt: readonly Value[],
  feeds: Feeds,
  samples: number,
  shape = output.shape.map(Number),
): Promise<void> {
  const seed = g.input("seed", "float32", output.shape);
  const gradients = backward(g, new Map([[output.name, seed]]), wrt);
  for (const [name, value] of gradients) g.output(value, `d/${name}`);
  const session = await ort.InferenceSession.create(await toBytes(g));
  const seedData = noise(
    shape.reduce((a, b) => a * b, 1),
    99,
  );
  const all = { ...feeds, seed: new ort.Tensor("float32", seedData, shape) };
  const results = await session.run(all);
  const objective = async (name: string, index: number, step: number) => {
    const data = (feeds[name].data as Float32Array).slice();
    data[index] += step;
    const y = (await session.run({ ...all, [name]: new ort.Tensor("float32", data, feeds[name].dims) }, [output.name]))[
      output.name
    ];
    return (y.data as Float32Array).reduce((sum, v, i) => sum + v * seedData[i], 0);
  };
  for (const { name } of wrt) {
    const gradient = results[`d/${name}`].data as Float32Array;
    expect(gradient.length).toBe(feeds[name].data.length);
    const scale = Math.max(...gradient.map(Math.abs));
    for (let sample = 0; sample < samples; sample++) {
      const index = Math.floor((sample * gradient.length) / samples);
      const difference = ((await objective(name, index, STEP)) - (await objective(name, index, -STEP))) / (2 * STEP);
      expect(Math.abs(difference - gradient[index]), `${name}[${index}]`).toBeLessThan(
        RELATIVE_TOLERANCE * scale + 1e-3,
      );
    }
  }
  await session.release();
}

function tensors(shapes: Record<string, readonly number[]>): Feeds {
  return Object.fromEntries(
    Object.entries(shapes).map(([name, shape], i) => [
      name,
      new ort.Tensor(
        "float32",
        noise(
          shape.reduce((a, b) => a * b, 1),
          i + 1,
        ),
        shape,
      ),
    ]),
  );
}

type Build = (g: Graph, x: (name: string) => Value) => Value;
const cases: readonly (readonly [string, Record<string, readonly number[]>, Build])[] = [
  ["Add", { a: [2, 3], b: [3] }, (g, x) => ops.add(g, x("a"), x("b"))],
  ["Sub", { a: [2, 3], b: [2, 1] }, (g, x) => ops.sub(g, x("a"), x("b"))],
  ["Mul", { a: [2, 3], b: [1, 3] }, (g, x) => ops.mul(g, x("a"), x("b"))],
  ["Div", { a: [2, 3], b: [2, 3] }, (g, x) => ops.div(g, x("a"), ops.add(g, ops.mul(g, x("b"), x("b")), g.scalar(1)))],
  ["Neg", { a: [4] }, (g, x) => ops.neg(g, x("a"))],
  ["Identity", { a: [4] }, (g, x) => ops.identity(g, x("a"))],
  ["Tanh", { a: [5] }, (g, x) => ops.tanh(g, x("a"))],
  ["Sigmoid", { a: [5] }, (g, x) => ops.sigmoid(g, x("a"))],
  ["Relu", { a: [5] }, (g, x) => ops.relu(g, ops.sub(g, x("a"), g.scalar(0.3)))],
  ["QuickGelu", { a: [7] }, (g, x) => ops.quickGelu(g, x("a"), 1.3)],
  ["Gelu", { a: [7] }, (g, x) => ops.gelu(g, x("a"), "none")],
  ["Gelu", { a: [7] }, (g, x) => ops.gelu(g, x("a"), "tanh")],
  ["Softmax", { a: [2, 5] }, (g, x) => ops.softmax(g, x("a"))],
  ["MatMul", { a: [2, 3, 4], b: [4, 5] }, (g, x) => ops.matMul(g, x("a"), x("b"))],
  ["MatMul", { a: [2, 3, 3, 4], b: [2, 1, 4, 5] }, (g, x) => ops.matMul(g, x("a"), x("b"))],
  ["FusedMatMul", { a: [2, 3, 4], b: [5, 4] }, (g, x) => ops.fusedMatMul(g, x("a"), x("b"), { transB: true })],
  [
    "SimplifiedLayerNormalization",
    { a: [2, 6], w: [6] },
    (g, x) => ops.simplifiedLayerNormalization(g, x("a"), x("w"), 1e-5),
  ],
  [
    "LayerNormalization",
    { a: [2, 6], w: [6], b: [6] },
    (g, x) => ops.layerNormalization(g, x("a"), x("w"), x("b"), 1e-5),
  ],
  ["Reshape", { a: [2, 6] }, (g, x) => ops.reshape(g, x("a"), [0, 2, 3], [2, 2, 3])],
  ["Transpose", { a: [2, 3, 4] }, (g, x) => ops.transpose(g, x("a"), [2, 0, 1])],
  ["Split", { a: [2, 6] }, (g, x) => ops.splitLast(g, x("a"), [2, 4])[1]],
  ["Concat", { a: [2, 3], b: [2, 2] }, (g, x) => ops.concat(g, [x("a"), x("b")], -1)],
  ["Concat", { a: [2, 3], b: [1, 3] }, (g, x) => ops.concat(g, [x("a"), x("b")], 0)],
  ["Pad", { a: [2, 5, 3] }, (g, x) => ops.shift(g, x("a"), 1, 2)],
  ["Gather", { a: [4, 3] }, (g, x) => ops.gather(g, x("a"), g.ints([3, 1]))],
  ["ScatterND", { a: [4, 3], b: [2, 3] }, (g, x) => ops.scatterRows(g, x("a"), g.ints([2, 0], [2, 1]), x("b"))],
  ["TopK", { a: [2, 5] }, (g, x) => ops.topK(g, x("a"), 2)[0]],
  ["Unsqueeze", { a: [2, 3] }, (g, x) => ops.unsqueeze(g, x("a"), 1)],
  ["Squeeze", { a: [2, 1, 3] }, (g, x) => ops.squeeze(g, x("a"), 1)],
  ["ReduceSum", { a: [2, 3] }, (g, x) => ops.reduceSum(g, x("a"), 1)],
  [
    "Where",
    { a: [2, 2], b: [2, 1] },
    (g, x) => ops.where(g, g.initializer("mask", "bool", [2, 2], Uint8Array.of(1, 0, 0, 1)), x("a"), x("b")),
  ],
  ["Cast", { a: [3] }, (g, x) => ops.mul(g, ops.cast(g, ops.cast(g, x("a"), "float64"), "float32"), x("a"))],
];

describe("backward rules equal central differences", () => {
  test.each(cases)("%s of %o", async (_, shapes, build) => {
    const g = new Graph("case");
    const values = new Map(Object.entries(shapes).map(([name, shape]) => [name, g.input(name, "float32", shape)]));
    const output = g.output(
      build(g, (name) => values.get(name)!),
      "y",
    );
    await compareWithDifferences(g, output, [...values.values()], tensors(shapes), 6);
  });

  test("every rule has a case", () => {
    expect([...differentiable].sort()).toEqual([...new Set(cases.map(([name]) => name))].sort());
  });
});

describe("a block of stories260K", () => {
  const open = async () => resolveModel(await openInMemory(repoPath("models", "stories260k")));

  test("attention from plain operators equals GroupQueryAttention", async () => {
    const model = await open();
    const common = { weights: floatWeights(model.checkpoint), maxPositions: 24 };
    const x = noise(24 * 64, 5);
    const run = async (kv: KvGraph) => {
      const { graph } = blockGraph(model, 1, { ...common, kv });
      const session = await ort.InferenceSession.create(await toBytes(graph));
      const feeds = {
        hidden_states: new ort.Tensor("float32", x, [1, 24, 64]),
        attention_mask: new ort.Tensor("int64", new BigInt64Array(24).fill(1n), [1, 24]),
      };
      return (await session.run(feeds)).output.data as Float32Array;
    };
    const [plain, fused] = [await run(plainAttention()), await run(fullKv({ cached: false }))];
    expect(Math.max(...plain.map((v, i) => Math.abs(v - fused[i])))).toBeLessThan(2e-5);
  });

  test("gradients of its output by every weight equal central differences", async () => {
    const model = await open();
    const { graph, builder, output, input } = blockGraph(model, 1, {
      weights: floatWeights(model.checkpoint),
      kv: plainAttention(),
      maxPositions: 12,
      fused: false,
      weightInputName: (tensor) => tensor,
    });
    const feeds: Feeds = {
      hidden_states: new ort.Tensor("float32", noise(12 * 64, 5), [1, 12, 64]),
      attention_mask: new ort.Tensor("int64", new BigInt64Array(12).fill(1n), [1, 12]),
    };
    for (const [name, { shape, load }] of builder.weightInputs)
      feeds[name] = new ort.Tensor("float32", await load(), shape);
    const weights = graph.inputs.filter(({ name }) => builder.weightInputs.has(name));
    expect(weights).toHaveLength(9);
    await compareWithDifferences(graph, output, [input, ...weights], feeds, 5, [1, 12, 64]);
  });

  test("an operator without a rule is refused by name", async () => {
    const model = await open();
    const { graph, output, input } = blockGraph(model, 0, {
      weights: floatWeights(model.checkpoint),
      kv: fullKv({ cached: false }),
      maxPositions: 12,
      fused: false,
    });
    const seed = graph.input("seed", "float32", output.shape);
    expect(() => backward(graph, new Map([[output.name, seed]]), [input])).toThrow(
      /GroupQueryAttention has no backward rule/,
    );
  });
});
