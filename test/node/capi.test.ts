/** The C API by itself. */
import { expect, test } from "vitest";
import { capiOrt } from "../../src/node/capi.ts";
import { toBytes } from "../../src/onnx/external-data.ts";
import { Graph } from "../../src/onnx/graph.ts";
import { add } from "../../src/onnx/ops.ts";

async function doubling(): Promise<Uint8Array> {
  const g = new Graph("doubling");
  const x = g.input("x", "float32", [3]);
  g.output(add(g, x, x), "y");
  return toBytes(g);
}

test("tensors that are handed in again may hold other numbers", async () => {
  const ort = await capiOrt();
  const session = await ort.InferenceSession.create(await doubling(), { intraOpNumThreads: 1 });
  const x = new ort.Tensor("float32", Float32Array.of(1, 2, 3), [3]);
  const y = new ort.Tensor("float32", new Float32Array(3), [3]);
  for (let run = 0; run < 4; run++) {
    (x.data as Float32Array)[0] = run;
    await session.run({ x }, { y });
    expect([...(y.data as Float32Array)]).toEqual([2 * run, 4, 6]);
    const other = new ort.Tensor("float32", Float32Array.of(run, 0, 0), [3]);
    expect([...((await session.run({ x: other })).y.data as Float32Array)]).toEqual([2 * run, 0, 0]);
  }
  const both = await Promise.all([session.run({ x }), session.run({ x })]);
  expect(both.map(({ y: { data } }) => [...(data as Float32Array)])).toEqual([
    [6, 4, 6],
    [6, 4, 6],
  ]);
  await session.release();
  await expect(session.run({ x })).rejects.toThrow(/released/);
});

test("what waited on this thread comes before a run on it", async () => {
  const ort = await capiOrt();
  const session = await ort.InferenceSession.create(await doubling(), { intraOpNumThreads: 1 });
  const y = new ort.Tensor("float32", new Float32Array(3), [3]);
  const before = new Promise((resolve) => setImmediate(() => resolve([...(y.data as Float32Array)])));
  await session.run({ x: new ort.Tensor("float32", Float32Array.of(1, 2, 3), [3]) }, { y });
  expect([await before, [...(y.data as Float32Array)]]).toEqual([
    [0, 0, 0],
    [2, 4, 6],
  ]);
  await session.release();
});
