/** A graph of two ways: which rows take which, and what stays outside of them. */
import * as ort from "onnxruntime-node";
import { expect, test } from "vitest";
import { byRows } from "../../src/onnx/by-rows.ts";
import { ConstantFolder } from "../../src/onnx/fold-constants.ts";
import { Graph, inlineGraphProto, modelHeader } from "../../src/onnx/graph.ts";
import * as ops from "../../src/onnx/ops.ts";
import { encodeModel, type ModelProto } from "../../src/onnx/proto.ts";

/** ids -> x = 10 ids -> y = 2 x -> z = y + x, and state = 5 y; constants are uint8 codes that a folder unpacks. */
function doubling(): ModelProto {
  const g = new Graph("doubling");
  const ids = g.input("input_ids", "int64", ["batch", "seq"]);
  const codes = (value: number) => {
    const code = g.initializer(`code/${value}`, "uint8", [], Uint8Array.of(value));
    return ops.cast(g, code, "float32");
  };
  const x = ops.mul(g, ops.cast(g, ids, "float32"), codes(10));
  g.scope = "differs";
  const y = ops.mul(g, x, codes(2));
  g.scope = "";
  g.output(ops.mul(g, y, codes(5)), "state");
  g.output(ops.add(g, y, x), "z");
  return { ...modelHeader, graph: inlineGraphProto(g) };
}

/** The same with y = x. */
function plain(model: ModelProto): ModelProto {
  const node = model.graph.node.map((one) =>
    one.name?.startsWith("differs/Mul") ? { ...one, opType: "Identity", input: [one.input[0]] } : one,
  );
  return { ...model, graph: { ...model.graph, node } };
}

async function run(model: ModelProto, batch: number, seq: number) {
  const session = await ort.InferenceSession.create(encodeModel(model));
  const ids = new ort.Tensor("int64", new BigInt64Array(batch * seq).fill(1n), [batch, seq]);
  const { z, state } = await session.run({ input_ids: ids });
  await session.release();
  return [z.data[0], state.data[0]];
}

const FEW = [30, 100];
const MANY = [20, 50];

test("32 tokens of one sequence take one way, fewer of them or a batch the other", async () => {
  const few = doubling();
  const both = byRows(few, plain(few));
  expect(await run(both, 1, 31)).toEqual(FEW);
  expect(await run(both, 1, 32)).toEqual(MANY);
  expect(await run(both, 2, 32)).toEqual(FEW);
});

test("what reads nothing that differs, and what nothing that differs reads, is there once", () => {
  const few = doubling();
  const { node } = byRows(few, plain(few)).graph;
  const isBranch = node.map(({ opType }) => opType === "If");
  expect(isBranch.filter(Boolean)).toHaveLength(1);
  const after = node.slice(isBranch.indexOf(true) + 1).map(({ opType }) => opType);
  expect(after).toEqual(["Mul", "Identity", "Add", "Identity"]);
  const inside = node[isBranch.indexOf(true)].attribute.map(({ g }) => g?.node.map(({ opType }) => opType));
  expect(inside).toEqual([["Identity"], ["Mul"]]);
});

test("two graphs of the same nodes stay one", () => {
  const few = doubling();
  expect(byRows(few, { ...few })).toBe(few);
});

test("constants and nodes that only a branch reads are kept when constants are unpacked", async () => {
  const few = doubling();
  const folder = new ConstantFolder(byRows(few, plain(few)), async ({ rawData }) => rawData ?? new Uint8Array());
  expect(folder.unpacked.size).toBe(3);
  const { model } = await folder.fold();
  expect(await run(model, 1, 31)).toEqual(FEW);
  expect(await run(model, 1, 32)).toEqual(MANY);
});
