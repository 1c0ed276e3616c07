import * as ort from "onnxruntime-node";
import { beforeAll, describe, expect, test } from "vitest";
import { attentionNodes } from "../../src/kv/attention-nodes.ts";
import {
  BETWEEN,
  EVICTION_POLICIES,
  type EvictionPolicy,
  evictionPlan,
  evictionPolicy,
  FIRST,
  keptTokens,
  NEWEST,
  type ScoreContext,
} from "../../src/kv/eviction.ts";
import { withEviction } from "../../src/kv/eviction-graph.ts";
import type { ModelProto } from "../../src/onnx/proto.ts";
import { turnMoments } from "../../src/runtime/evicting-session.ts";
import { type CacheSession, openCache } from "../../src/runtime/open-cache.ts";
import { DecoderSession } from "../../src/runtime/session.ts";
import { normals, random } from "../quant/random.ts";
import { CONTEXT, difference, largest, openModel, storiesGraph, story } from "./stories.ts";

/** The same sums over other rows of keys, in float32. */
const FLOAT_TOLERANCE = 1e-3;
const BUDGET = 64;

let graph: ModelProto;

beforeAll(async () => {
  graph = await storiesGraph();
});

type Name = EvictionPolicy["name"];
const NAMES: readonly Name[] = EVICTION_POLICIES.map(({ name }) => name);

async function evicting(policy: Name, budget: number): Promise<CacheSession & { kept(row: number): Kept }> {
  const changed = withEviction(graph, evictionPolicy(policy));
  const plan = evictionPlan(policy, budget, CONTEXT);
  return openCache(ort, await openModel(changed), changed, policy, CONTEXT, plan) as never;
}

/** Positions by layer and KV head. */
type Kept = readonly (readonly (readonly number[])[])[];

/** One run over the whole text, in which a query sees what was kept when it came, and what came with it before it. */
async function maskedLogits(
  tokens: readonly number[],
  seen: (query: number) => Kept,
  pieceStart: (query: number) => number,
) {
  const nodes = attentionNodes(graph, "test");
  const length = tokens.length;
  const node = graph.graph.node.map((original) => {
    const found = nodes.find((attention) => attention.node === original);
    if (!found) return original;
    const input = [...original.input];
    while (input.length < 10) input.push("");
    input[10] = `bias.${found.layer}`;
    return { ...original, input };
  });
  const dim = (size: number) => ({ dimValue: BigInt(size) });
  const biases = nodes.map(({ layer, heads }) => ({
    name: `bias.${layer}`,
    type: { tensorType: { elemType: 1, shape: { dim: [1, heads, length, length].map(dim) } } },
  }));
  const masked = { ...graph, graph: { ...graph.graph, node, input: [...graph.graph.input, ...biases] } };
  const session = await openModel(masked);
  const feeds: Record<string, ort.Tensor> = {
    input_ids: new ort.Tensor("int64", BigInt64Array.from(tokens, BigInt), [1, length]),
    attention_mask: new ort.Tensor("int64", new BigInt64Array(length).fill(1n), [1, length]),
    num_logits_to_keep: new ort.Tensor("int64", BigInt64Array.of(0n), []),
  };
  for (const { layer, heads, kvHeads, headDim, node: attention } of nodes) {
    const bias = new Float32Array(heads * length * length).fill(-1e30);
    for (let head = 0; head < heads; head++) {
      for (let query = 0; query < length; query++) {
        const at = (head * length + query) * length;
        for (const key of seen(query)[layer][Math.floor((head * kvHeads) / heads)]) bias[at + key] = 0;
        bias.fill(0, at + pieceStart(query), at + query + 1);
      }
    }
    feeds[`bias.${layer}`] = new ort.Tensor("float32", bias, [1, heads, length, length]);
    for (const place of [3, 4]) {
      feeds[attention.input[place]] = new ort.Tensor("float32", new Float32Array(0), [1, kvHeads, 0, headDim]);
    }
  }
  const { logits } = await session.run(feeds, ["logits"]);
  await session.release();
  return logits.data as Float32Array;
}

describe.each(NAMES)("%s", (name) => {
  test("with nothing to drop gives the float cache's tokens", async () => {
    const [ours, full] = [
      await evicting(name, 256),
      new DecoderSession(ort, await openModel(graph), "full", CONTEXT) as CacheSession,
    ];
    const tokens = [[...story.slice(0, 30)], [...story.slice(0, 30)]];
    for (let past = 0; past < 150; past = tokens[0].length - 1) {
      for (const [i, session] of [ours, full].entries()) {
        const [row] = await session.append(0, past, tokens[i].slice(past));
        tokens[i].push(largest(row));
      }
    }
    expect(tokens[0]).toEqual(tokens[1]);
    await Promise.all([ours.dispose(), full.dispose()]);
  });

  test("equals masked attention over the whole text, whatever was dropped when", async () => {
    const session = await evicting(name, BUDGET);
    const pieces = [140, ...Array<number>(70).fill(1), 7, ...Array<number>(30).fill(1)];
    const starts: number[] = [];
    const seen: Kept[] = [];
    const ours: Float32Array[] = [];
    let at = 0;
    for (const size of pieces) {
      const before: Kept =
        at === 0
          ? attentionNodes(graph, "test").map(({ kvHeads }) => Array(kvHeads).fill([]))
          : structuredClone(session.kept(0));
      for (let i = 0; i < size; i++) {
        starts.push(at);
        seen.push(before);
      }
      const rows = await session.append(0, at, story.slice(at, at + size), "all");
      ours.push(...rows.map((row) => row.slice()));
      at += size;
    }
    const theirs = await maskedLogits(
      story.slice(0, at),
      (query) => seen[query],
      (query) => starts[query],
    );
    const vocab = theirs.length / at;
    const worst = ours.map((row, i) => difference(row, theirs.subarray(i * vocab, (i + 1) * vocab)));
    expect(Math.max(...worst)).toBeLessThan(FLOAT_TOLERANCE);
    for (const head of session.kept(0).flat()) {
      expect(head.length).toBeLessThan(BUDGET + BETWEEN);
      expect(head.slice(0, FIRST)).toEqual([0, 1, 2, 3]);
      const newest = Array.from({ length: NEWEST }, (_, i) => at - NEWEST + i);
      expect(head.slice(-NEWEST)).toEqual(newest);
      expect(head).toEqual([...head].sort((a, b) => a - b));
    }
    await session.dispose();
  });

  test("rows of a batch each give what they give alone, at a memory that does not grow", async () => {
    const alone: Float32Array[] = [];
    const texts = [story.slice(0, 150), story.slice(40, 250)];
    for (const text of texts) {
      const session = await evicting(name, BUDGET);
      await session.append(0, 0, text.slice(0, 120));
      let last = new Float32Array();
      for (let i = 120; i < text.length; i++) last = (await session.append(0, i, [text[i]]))[0].slice();
      alone.push(last);
      await session.dispose();
    }
    const session = await evicting(name, BUDGET);
    await session.append(0, 0, texts[0].slice(0, 120));
    await session.append(1, 0, texts[1].slice(0, 120));
    let bytes = 0;
    for (let i = 120; i < 150; i++) {
      const rows = await session.decode([i, i], [texts[0][i], texts[1][i]]);
      if (i === 149) expect(difference(rows[0], alone[0])).toBeLessThan(FLOAT_TOLERANCE);
    }
    bytes = session.kvBytesAllocated;
    session.moveRow(1, 0);
    let last = new Float32Array();
    for (let i = 150; i < texts[1].length; i++) last = (await session.decode([i], [texts[1][i]]))[0].slice();
    expect(difference(last, alone[1])).toBeLessThan(FLOAT_TOLERANCE);
    expect(session.kvBytesAllocated).toBe(bytes);
    await session.dispose();
  });
});

const HEADS = 4;
const KV_HEADS = 2;
const DIM = 8;
const TOKENS = 50;

function context(budget: number): ScoreContext & { keys: Float32Array; values: Float32Array } {
  const next = random(3);
  const draw = (count: number) => normals(count, next);
  return {
    ...{ heads: HEADS, kvHeads: KV_HEADS, tokens: TOKENS, headDim: DIM, scale: 0.3, budget },
    attention: draw(KV_HEADS * TOKENS).map(Math.abs),
    queryMean: draw(HEADS * DIM),
    queryVariance: draw(HEADS * DIM).map((x) => x * x),
    keys: draw(KV_HEADS * TOKENS * DIM),
    values: draw(KV_HEADS * TOKENS * DIM),
  };
}

describe("scores", () => {
  const row = (x: Float32Array, head: number, t: number) => [
    ...x.subarray((head * TOKENS + t) * DIM, (head * TOKENS + t + 1) * DIM),
  ];
  const dot = (a: readonly number[], b: readonly number[]) => a.reduce((sum, x, i) => sum + x * b[i], 0);

  test("keydiff is minus the cosine to the mean direction of the keys", () => {
    const c = context(40);
    const scores = evictionPolicy("keydiff").score(c.keys, c.values, c);
    for (let head = 0; head < KV_HEADS; head++) {
      const units = Array.from({ length: TOKENS }, (_, t) => {
        const key = row(c.keys, head, t);
        return key.map((x) => x / Math.sqrt(dot(key, key)));
      });
      const anchor = units[0].map((_, i) => units.reduce((sum, unit) => sum + unit[i], 0));
      for (const [t, unit] of units.entries()) expect(scores[head * TOKENS + t]).toBeCloseTo(-dot(unit, anchor), 4);
    }
  });

  test("expected is the mean over queries drawn from the distribution, times the value's length", () => {
    const c = context(40);
    const scores = evictionPolicy("expected").score(c.keys, c.values, c);
    for (let head = 0; head < KV_HEADS; head++) {
      const group = [2 * head, 2 * head + 1].map((query) => {
        const weights = Array.from({ length: TOKENS }, (_, t) => {
          const key = row(c.keys, head, t).map((x) => x * c.scale);
          const mean = dot(key, [...c.queryMean.subarray(query * DIM, (query + 1) * DIM)]);
          const variance = dot(
            key.map((x) => x * x),
            [...c.queryVariance.subarray(query * DIM, (query + 1) * DIM)],
          );
          return Math.exp(mean + variance / 2);
        });
        const sum = weights.reduce((a, b) => a + b);
        return weights.map((x) => x / sum);
      });
      for (let t = 0; t < TOKENS; t++) {
        const value = row(c.values, head, t);
        const mean = (group[0][t] + group[1][t]) / 2;
        expect(scores[head * TOKENS + t]).toBeCloseTo(mean * Math.sqrt(dot(value, value)), 5);
      }
    }
  });

  test("h2o keeps the newer half and the heaviest of the rest; snapkv keeps neighbours of a match", () => {
    const c = context(40);
    const heavy = evictionPolicy("h2o").score(c.keys, c.values, c);
    expect(heavy.subarray(TOKENS - 20, TOKENS).every((x) => x === Number.POSITIVE_INFINITY)).toBe(true);
    expect([...heavy.subarray(0, TOKENS - 20)]).toEqual([...c.attention.subarray(0, TOKENS - 20)]);
    const attention = new Float32Array(KV_HEADS * TOKENS);
    attention[20] = 1;
    const near = evictionPolicy("snapkv").score(c.keys, c.values, { ...c, attention });
    const marked = [...near].flatMap((x, i) => (x > 0 ? [i] : []));
    expect(marked).toEqual([17, 18, 19, 20, 21, 22, 23]);
  });

  test("the first and the newest stay, and the best scored between them", () => {
    const scores = new Float32Array(100);
    scores[50] = 2;
    scores[30] = 1;
    const kept = [...keptTokens(scores, FIRST + NEWEST + 2)];
    expect(kept).toEqual([0, 1, 2, 3, 30, 50, ...Array.from({ length: NEWEST }, (_, i) => 68 + i)]);
    expect(keptTokens(scores, 200)).toHaveLength(100);
  });

  test("moments turn as the queries themselves do", () => {
    const mean = Float32Array.of(1, 2, 3, 4);
    const variance = Float32Array.of(1, 0.5, 2, 4);
    turnMoments(mean, variance, 4, 4, Float32Array.of(0, 0.6), Float32Array.of(1, 0.8));
    // pairs (0, 2) by 90 degrees, (1, 3) by cos 0.6, sin 0.8
    expect([...mean].map((x) => Math.round(x * 1e4) / 1e4)).toEqual([-3, 0.6 * 2 - 0.8 * 4, 1, 0.8 * 2 + 0.6 * 4]);
    expect([...variance].map((x) => Math.round(x * 1e4) / 1e4)).toEqual([
      2,
      0.36 * 0.5 + 0.64 * 4,
      1,
      0.64 * 0.5 + 0.36 * 4,
    ]);
  });
});

test("the graph's attention is the softmax's: each query's weights sum to 1, and none goes to keys after it", async () => {
  const session = await openModel(withEviction(graph, evictionPolicy("h2o")));
  const length = 20;
  const nodes = attentionNodes(graph, "test");
  const feeds: Record<string, ort.Tensor> = {
    input_ids: new ort.Tensor("int64", BigInt64Array.from(story.slice(0, length), BigInt), [1, length]),
    attention_mask: new ort.Tensor("int64", new BigInt64Array(length).fill(1n), [1, length]),
    position_ids: new ort.Tensor(
      "int64",
      BigInt64Array.from({ length }, (_, i) => BigInt(i)),
      [1, length],
    ),
    num_logits_to_keep: new ort.Tensor("int64", BigInt64Array.of(1n), []),
  };
  for (const { node, kvHeads, headDim } of nodes) {
    for (const name of node.input.slice(3, 5)) {
      feeds[name] = new ort.Tensor("float32", new Float32Array(0), [1, kvHeads, 0, headDim]);
    }
  }
  const results = await session.run(feeds);
  for (const { layer, heads, kvHeads } of nodes) {
    const attention = results[`attention.${layer}`].data as Float32Array;
    for (let head = 0; head < kvHeads; head++) {
      const row = attention.subarray(head * length, (head + 1) * length);
      expect(row.reduce((sum, x) => sum + x, 0)).toBeCloseTo((length * heads) / kvHeads, 3);
      // the last key is seen by the last query alone
      expect(row[length - 1]).toBeLessThanOrEqual(heads / kvHeads);
    }
  }
  await session.release();
});

test("a budget that cannot hold what always stays is refused", () => {
  expect(() => evictionPlan("h2o", 32, CONTEXT)).toThrow(/64 to 512/);
});
