import * as ort from "onnxruntime-node";
import { beforeAll, expect, test } from "vitest";
import { measureCache } from "../../src/eval/cache-drift.ts";
import { cacheStatistics, type LayerStatistics } from "../../src/eval/cache-statistics.ts";
import { type RotaryTable, rotaryTables } from "../../src/eval/rotary-tables.ts";
import { SimulatedCache, type SimulatedKv, simulatedGraph } from "../../src/eval/simulated-cache.ts";
import { attentionNodes } from "../../src/kv/attention-nodes.ts";
import { withInt4Cache } from "../../src/kv/int4.ts";
import { RECENT, SINKS } from "../../src/kv/int4-tiers.ts";
import { headRotation, timesMatrix, transposed } from "../../src/kv/rotation.ts";
import { memoryFolder } from "../../src/memory-files.ts";
import { encodeModel, type ModelProto } from "../../src/onnx/proto.ts";
import { DecoderSession } from "../../src/runtime/session.ts";
import { TieredSession } from "../../src/runtime/tiered-session.ts";
import { f16ToF32, f32ToF16 } from "../../src/tensor/dtypes.ts";
import { CONTEXT, difference, openModel, storiesGraph, story } from "../kv/stories.ts";

let graph: ModelProto;
let statistics: LayerStatistics[];
let tables: readonly (RotaryTable | undefined)[];

beforeAll(async () => {
  graph = await storiesGraph();
  const folder = memoryFolder("stories", new Map([["model.onnx", encodeModel(graph)]]));
  statistics = await cacheStatistics(ort, folder, "model.onnx", graph, [story]);
  tables = await rotaryTables(folder, "model.onnx", graph, attentionNodes(graph, "test"));
});

async function full(changed = graph): Promise<DecoderSession> {
  return new DecoderSession(ort, await openModel(changed), "full", CONTEXT);
}

async function simulated(kv: SimulatedKv): Promise<{ inner: DecoderSession; cache: SimulatedCache }> {
  const inner = await full(simulatedGraph(kv, graph));
  return { inner, cache: new SimulatedCache(kv, inner, attentionNodes(graph, "test"), statistics, tables) };
}

/** Of each token from `start` on, squared error of all layers' keys and values over their squares. */
function lossByToken(ours: DecoderSession, theirs: DecoderSession, start: number, count: number): number[] {
  return Array.from({ length: count }, (_, i) => {
    const [a, b] = [ours, theirs].map((session) => session.readTokens(0, start + i, 1) as Float32Array[]);
    const sum = (of: (part: number, at: number) => number) =>
      b.reduce((total, rows, part) => total + rows.reduce((inPart, _, at) => inPart + of(part, at), 0), 0);
    return sum((part, at) => (a[part][at] - b[part][at]) ** 2) / sum((part, at) => b[part][at] ** 2);
  });
}

test("first and recent tokens stay what they were, all between them lose about what their bits say", async () => {
  const [float, two, three] = [await full(), await simulated("int2"), await simulated("int3")];
  const count = 100;
  const expected = await float.append(0, 0, story.slice(0, count));
  for (const { inner, cache } of [two, three]) {
    const [logits] = await cache.append(0, 0, story.slice(0, count));
    expect(difference(logits, expected[0])).toBe(0); // a text's first piece is read before anything is rounded
    const loss = lossByToken(inner, float, 0, count);
    for (const at of loss.keys()) {
      expect(loss[at] > 0, `token ${at}`).toBe(at >= SINKS && at < count - RECENT);
    }
  }
  const mean = (inner: DecoderSession) =>
    lossByToken(inner, float, SINKS, count - SINKS - RECENT).reduce((sum, x) => sum + x, 0) / (count - SINKS - RECENT);
  // of normal numbers 2 bits lose 0.1175 of the variance and 3 bits 0.0345 (Max 1960); a mean that is taken off saves some
  expect(mean(two.inner)).toBeLessThan(0.1175);
  expect(mean(three.inner)).toBeLessThan(0.0345);
  expect(mean(two.inner) / mean(three.inner)).toBeGreaterThan(2);
  for (const session of [float, two.cache, three.cache]) await session.dispose();
});

test("a mean that turns with the position is taken off as it stands there: such keys lose nothing", async () => {
  const [float, { inner, cache }] = [await full(), await simulated("int2")];
  const tokens = story.slice(0, 80);
  for (const session of [float, inner]) await session.append(0, 0, tokens);
  const position = 20;
  const means = float.shape.cache.map(({ past, headDim }) => {
    const [, layer, part] = past.split(".");
    const of = statistics[Number(layer)][part as "key" | "value"];
    if (part === "value") return of.mean;
    const mean = of.unturnedMean!;
    return mean.map((x, at) => {
      const [channel, half] = [at % headDim, headDim / 2];
      const pair = channel % half;
      const angle = pair < 4 ? position * 10_000 ** (-pair / 4) : 0; // a head of 8, padded to 16
      return channel < half
        ? x * Math.cos(angle) - mean[at + half] * Math.sin(angle)
        : x * Math.cos(angle) + mean[at - half] * Math.sin(angle);
    });
  });
  inner.writeTokens(0, position, 1, means);
  await cache.append(0, 80, story.slice(80, 81));
  for (const [i, row] of inner.readTokens(0, position, 1).entries()) {
    expect(difference(row as Float32Array, means[i]), float.shape.cache[i].past).toBeLessThan(1e-5);
  }
  await Promise.all([float.dispose(), cache.dispose()]);
});

/** llama.cpp's quantize_row_q4_0_ref and dequantize_row_q4_0, on one block. */
function throughQ4(block: Float32Array): Float32Array {
  const largest = block.reduce((most, x) => (Math.abs(x) > Math.abs(most) ? x : most), 0);
  const d = largest / -8;
  const inverse = d ? 1 / d : 0;
  const kept = f16ToF32(f32ToF16(Float32Array.of(d)))[0];
  return block.map((x) => kept * (Math.min(15, Math.trunc(x * inverse + 8.5)) - 8));
}

test("q4_0 is llama.cpp's, and what is read of it does not depend on the size of pieces", async () => {
  const [float, once, single] = [await full(), await simulated("q4_0"), await simulated("q4_0")];
  const tokens = story.slice(0, 24);
  const unrounded = await float.append(0, 0, tokens, "all");
  const logits = await once.cache.append(0, 0, tokens, "all");
  let [pieces, rounding] = [0, 0];
  for (const [i, token] of tokens.entries()) {
    const [row] = await single.cache.append(0, i, [token]);
    pieces += difference(row, logits[i]);
    rounding += difference(unrounded[i], logits[i]);
  }
  expect(pieces).toBeLessThan(0.05 * rounding); // a tie may fall the other way
  // the first layer's are what the float cache has, rounded
  const [exact, ours] = [float, once.inner].map((session) => session.readTokens(0, 0, tokens.length) as Float32Array[]);
  const { headDim } = float.shape.cache[0];
  const H = headRotation(headDim);
  for (const part of [0, 1]) {
    const turned = timesMatrix(exact[part], H, headDim);
    const rounded = new Float32Array(turned.length);
    for (let at = 0; at < turned.length; at += headDim) rounded.set(throughQ4(turned.subarray(at, at + headDim)), at);
    const expected = timesMatrix(rounded, transposed(H, headDim), headDim);
    const apart = ours[part].map((x, at) => Number(Math.abs(x - expected[at]) > 1e-4));
    expect(apart.reduce((sum, x) => sum + x, 0) / apart.length).toBeLessThan(0.01);
    expect(difference(exact[part], expected)).toBeGreaterThan(0.05);
  }
  for (const session of [float, once.cache, single.cache]) await session.dispose();
});

test("fewer bits drift further, and the real int4 cache less than llama.cpp's q4_0 would", async () => {
  const reference = await full();
  const windows = [story.slice(0, 256)];
  const measured = new Map<string, number>();
  for (const kv of ["int2", "int3", "q4_0"] as const) {
    const { cache } = await simulated(kv);
    const { drift, kvBytes } = await measureCache(ort, reference, cache, windows, { withCopy: false });
    measured.set(kv, drift.kl.mean);
    if (kv === "q4_0") expect(kvBytes).toBe((statistics.length * 2 * 4 * 255 * (16 * 4 + 16)) / 8); // all but the last
    await cache.dispose();
  }
  const int4 = new TieredSession(ort, await openModel(withInt4Cache(graph, statistics, "token")), "int4");
  const { drift } = await measureCache(ort, reference, int4, windows, { withCopy: false });
  measured.set("int4", drift.kl.mean);
  const kl = (kv: string) => measured.get(kv)!;
  expect(kl("int2")).toBeGreaterThan(2 * kl("int3"));
  expect(kl("int3")).toBeGreaterThan(2 * kl("int4"));
  expect(kl("q4_0")).toBeGreaterThan(2 * kl("int4"));
  await Promise.all([reference.dispose(), int4.dispose()]);
});
