import * as ort from "onnxruntime-node";
import { beforeAll, describe, expect, test } from "vitest";
import { cacheStatistics, type LayerStatistics } from "../../src/eval/cache-statistics.ts";
import { attentionNodes } from "../../src/kv/attention-nodes.ts";
import { staticScalesOf, withInt4Cache } from "../../src/kv/int4.ts";
import { decodeRow, encodeRow, RECENT, SINKS, TwoTierCache } from "../../src/kv/int4-tiers.ts";
import { keyGains } from "../../src/kv/key-gains.ts";
import { headRotation, timesMatrix, transposed } from "../../src/kv/rotation.ts";
import { memoryFolder } from "../../src/memory-files.ts";
import { encodeModel, type ModelProto } from "../../src/onnx/proto.ts";
import { DecoderSession } from "../../src/runtime/session.ts";
import { TieredSession } from "../../src/runtime/tiered-session.ts";
import { f16ToF32, f32ToF16 } from "../../src/tensor/dtypes.ts";
import { normals, random } from "../quant/random.ts";
import { CONTEXT, difference, largest, openModel, storiesGraph, story } from "./stories.ts";

/** Rotation, centring and the merge of two softmaxes in float32, five layers deep; logits are around 10. */
const FLOAT_TOLERANCE = 2e-3;
/** A tail in float16, five layers deep: what differs in the last bit of a float32 may be another float16 or code. */
const HALF_TOLERANCE = 2e-2;

let graph: ModelProto;
let statistics: LayerStatistics[];

beforeAll(async () => {
  graph = await storiesGraph();
  const folder = memoryFolder("stories", new Map([["model.onnx", encodeModel(graph)]]));
  statistics = await cacheStatistics(ort, folder, "model.onnx", graph, [story]);
});

async function tiered(scales: "token" | "static"): Promise<TieredSession> {
  const made = withInt4Cache(graph, statistics, scales);
  return new TieredSession(ort, await openModel(made), "int4", staticScalesOf(made));
}

async function full(): Promise<DecoderSession> {
  return new DecoderSession(ort, await openModel(graph), "full", CONTEXT);
}

type Part = "key" | "value";
/** One token's row of a part (kvHeads * headDim) from what is cached in float to what the tiers hold, and back. */
interface Held {
  into(row: Float32Array, layer: number, part: Part, position: number): Float32Array;
  back(row: Float32Array, layer: number, part: Part, position: number): Float32Array;
}
/** A held row as the body keeps it; `at` is its place there. */
type Rounding = (row: Float32Array, layer: number, part: Part, at: number) => Float32Array;

/**
 * The plain reference: the float cache, in which every token's row has been replaced by what the tail keeps of it in
 * float16, and once it went to the body by what its codes mean. Both sessions see the same tokens in the same pieces;
 * resolves to the largest difference of a logit.
 */
async function againstReference(
  session: TieredSession,
  held: Held,
  round: Rounding,
  pieces: readonly number[],
): Promise<number> {
  const reference = await full();
  const replace = (position: number, kept: Rounding) => {
    const parts = reference.readTokens(0, position, 1) as Float32Array[];
    const values = parts.map((row, i) => {
      const [, name, part] = reference.shape.cache[i].past.split(".");
      const [layer, of] = [Number(name), part as Part];
      return held.back(kept(held.into(row, layer, of, position), layer, of, position - SINKS), layer, of, position);
    });
    reference.writeTokens(0, position, 1, values);
  };
  let worst = 0;
  let at = 0;
  let rounded = 0;
  for (const size of pieces) {
    const tokens = story.slice(at, at + size);
    const [ours, theirs] = [await session.append(0, at, tokens, "all"), await reference.append(0, at, tokens, "all")];
    for (const [i, row] of ours.entries()) worst = Math.max(worst, difference(row, theirs[i]));
    for (let t = at; t < at + size; t++) replace(t, (row) => f16ToF32(f32ToF16(row)));
    at += size;
    session.cache.settle(); // as the next step does
    for (; rounded < session.cache.bodyLength; rounded++) replace(SINKS + rounded, round);
  }
  expect(rounded).toBeGreaterThan(100);
  await reference.dispose();
  await session.dispose();
  return worst;
}

const PIECES = [40, 60, ...Array<number>(30).fill(1), 16, 16, 5, ...Array<number>(40).fill(1), 20];

/** The mean key of a layer as it is cached at a position. */
function meanKey(layer: number, position: number): Float32Array {
  const [{ headDim, rotaryDim }] = attentionNodes(graph, "test");
  const half = rotaryDim / 2;
  const mean = statistics[layer].key.unturnedMean!;
  const out = Float32Array.from(mean);
  for (let start = 0; start < mean.length; start += headDim) {
    for (let i = 0; i < half; i++) {
      const angle = i < 4 ? position * 10_000 ** (-i / 4) : 0; // a head of 8, padded to 16
      const [low, high] = [start + i, start + i + half];
      out[low] = mean[low] * Math.cos(angle) - mean[high] * Math.sin(angle);
      out[high] = mean[high] * Math.cos(angle) + mean[low] * Math.sin(angle);
    }
  }
  return out;
}

describe("the two-tier cache", () => {
  test("gives the tokens of the float cache while everything is in the tail", async () => {
    const [int4, float] = [await tiered("token"), await full()];
    const prompt = story.slice(0, 20);
    let tokens = [[...prompt], [...prompt]];
    for (let past = 0; past < SINKS + RECENT; past = tokens[0].length - 1) {
      const steps = [int4, float].map((session, i) => session.append(0, past, tokens[i].slice(past)));
      const [a, b] = (await Promise.all(steps)).map(([row]) => row);
      expect(difference(a, b)).toBeLessThan(HALF_TOLERANCE);
      tokens = tokens.map((seen, i) => [...seen, largest([a, b][i])]);
    }
    expect(int4.cache.bodyLength).toBe(0);
    expect(tokens[0]).toEqual(tokens[1]);
    await Promise.all([int4.dispose(), float.dispose()]);
  });

  test("equals the float cache with the body's tokens rounded, in pieces of any size", async () => {
    const [{ kvHeads, headDim }] = attentionNodes(graph, "test");
    const H = headRotation(headDim);
    const session = await tiered("token");
    const meanOf = (layer: number, part: Part, position: number) =>
      part === "key" ? meanKey(layer, position) : statistics[layer][part].mean;
    const none = new Float32Array(kvHeads * headDim).fill(1);
    const gainsOf = (layer: number, part: Part) => (part === "key" ? keyGains(statistics[layer].key, headDim) : none);
    const held: Held = {
      into: (row, layer, part, position) => {
        const [mean, gains] = [meanOf(layer, part, position), gainsOf(layer, part)];
        return timesMatrix(
          row.map((x, i) => (x - mean[i]) * gains[i]),
          H,
          headDim,
        );
      },
      back: (row, layer, part, position) => {
        const [mean, gains] = [meanOf(layer, part, position), gainsOf(layer, part)];
        return timesMatrix(row, transposed(H, headDim), headDim).map((x, i) => x / gains[i] + mean[i]);
      },
    };
    let [error, plainError] = [0, 0];
    // the codes that the session chose: choosing them again would flip ties
    const round: Rounding = (row, layer, part, at) => {
      const { cache } = session;
      const index = 2 * layer + Number(part === "value");
      const decoded = new Float32Array(row.length);
      for (let head = 0; head < kvHeads; head++) {
        const start = ((head * cache.bodyCapacity + at) * headDim) / 2;
        const scale = cache.scales[at * cache.scaleWidth + index * kvHeads + head];
        decoded.set(decodeRow(cache.codes[index].subarray(start, start + headDim / 2), scale), head * headDim);
        const ours = decoded.subarray(head * headDim, (head + 1) * headDim);
        const theirs = row.subarray(head * headDim, (head + 1) * headDim);
        error += squaredError(ours, theirs);
        plainError += squaredError(plainRounding(theirs), theirs);
      }
      return decoded;
    };
    expect(await againstReference(session, held, round, PIECES)).toBeLessThan(HALF_TOLERANCE);
    expect(error).toBeLessThan(plainError);
  });

  test("with static scales equals the float cache rounded per channel", async () => {
    const scales = staticScalesOf(withInt4Cache(graph, statistics, "static"))!;
    const held: Held = {
      into: (row, layer, part) => row.map((x, i) => x - statistics[layer][part].mean[i]),
      back: (row, layer, part) => row.map((x, i) => x + statistics[layer][part].mean[i]),
    };
    const round: Rounding = (row, layer, part) => {
      const scale = scales[2 * layer + Number(part === "value")];
      return row.map((x, i) => scale[i] * Math.max(-8, Math.min(7, Math.round(x / scale[i]))));
    };
    expect(await againstReference(await tiered("static"), held, round, PIECES)).toBeLessThan(HALF_TOLERANCE);
  });

  test("goes back over a wrong guess, and not into the body", async () => {
    const session = await tiered("token");
    await session.append(0, 0, story.slice(0, 100));
    const [before] = await session.append(0, 100, story.slice(100, 104), "all");
    const first = before.slice();
    const [again] = await session.append(0, 100, story.slice(100, 104), "all");
    expect(difference(first, again)).toBeLessThan(FLOAT_TOLERANCE);
    await expect(session.append(0, 20, story.slice(20, 22))).rejects.toMatchObject({ code: "engine" });
    await session.append(0, 0, story.slice(0, 3)); // a new text
    expect(session.cache.bodyLength).toBe(0);
    await session.dispose();
  });
});

/** Even steps up to the largest magnitude, without any search. */
function plainRounding(row: Float32Array): Float32Array {
  const step = row.reduce((most, x) => Math.max(most, Math.abs(x)), 0) / 7.5 || 1;
  return row.map((x) => step * Math.max(-8, Math.min(7, Math.round(x / step))));
}

function squaredError(a: Float32Array, b: Float32Array): number {
  return a.reduce((sum, x, i) => sum + (x - b[i]) ** 2, 0);
}

test("a row's codes are better than plain rounding to the largest magnitude", () => {
  const next = random(7);
  let [ours, plain, along] = [0, 0, 0];
  // scales are 4 % apart, so a single row may do a little worse than with one of its own
  for (let trial = 0; trial < 50; trial++) {
    const row = normals(64, next).map((x) => x * 10 ** ((trial % 4) - 2)); // the byte of the scale reaches that far
    const codes = new Uint8Array(32);
    const scale = encodeRow(row, codes);
    const size = squaredError(row, new Float32Array(64));
    const kept = decodeRow(codes, scale);
    const errors = [kept, plainRounding(row)].map((rounded) => squaredError(rounded, row) / size);
    along += kept.reduce((sum, x, i) => sum + x * (row[i] - x), 0) ** 2 / size ** 2;
    expect(errors[0]).toBeLessThan(1.1 * errors[1]);
    ours += errors[0];
    plain += errors[1];
  }
  expect(ours).toBeLessThan(0.9 * plain);
  expect(along / 50).toBeLessThan(0.006 ** 2); // lengths stay right: by chance 1 % would be wrong
});

test("rows without a scale of their own: zeros stay zeros, and what is too large for a byte keeps its sign", () => {
  for (const row of [new Float32Array(16), Float32Array.from({ length: 16 }, (_, i) => (i % 2 ? -5e4 : 5e4))]) {
    const codes = new Uint8Array(8);
    const kept = decodeRow(codes, encodeRow(row, codes));
    expect(Array.from(kept, Math.sign)).toEqual(Array.from(row, Math.sign));
  }
});

test.each([1, 8])("2,048 tokens of 64 channels take 4.5 bits a number, read %i at a time", (guesses) => {
  const parts = Array.from({ length: 2 }, () => ({ kvHeads: 3, headDim: 64 }));
  const cache = new TwoTierCache(parts);
  const read = (count: number) => {
    cache.reserve(count);
    cache.appended(count);
  };
  for (let i = 0; i < 15; i++) read(128); // a prompt in pieces
  while (cache.length < 2048) read(Math.min(guesses, 2048 - cache.length));
  const numbers = 2048 * 2 * 3 * 64;
  expect((8 * cache.bytes) / numbers).toBeLessThanOrEqual(4.5);
  expect(cache.bytes).toBe(TwoTierCache.bytesFor(parts, 2048, false));
});

test("a graph whose tail is float32, as they were made once, is refused by name", async () => {
  const session = await openModel(graph);
  const open = () => new TieredSession(ort, session, "model.kv-int4.onnx");
  expect(open).toThrow(/model\.kv-int4\.onnx: the tail .* is float32.*--kv int4/);
  await session.release();
});

test("the rotation is orthogonal for every head size that the kernel takes", () => {
  for (const size of [16, 48, 64, 80, 96, 128]) {
    const H = headRotation(size);
    const identity = timesMatrix(H, transposed(H, size), size);
    for (let i = 0; i < size * size; i++) expect(identity[i]).toBeCloseTo(i % (size + 1) === 0 ? 1 : 0, 5);
  }
});

test("models whose attention is no single softmax over all tokens are refused by name", () => {
  const windowed: ModelProto = {
    ...graph,
    graph: {
      ...graph.graph,
      node: graph.graph.node.map((node) =>
        node.opType === "GroupQueryAttention"
          ? {
              ...node,
              attribute: [
                ...node.attribute.filter(({ name }) => name !== "local_window_size"),
                { name: "local_window_size", type: 2, i: 64n },
              ],
            }
          : node,
      ),
    },
  };
  expect(() => withInt4Cache(windowed, statistics, "token")).toThrow(/looks back 64 tokens/);
});
