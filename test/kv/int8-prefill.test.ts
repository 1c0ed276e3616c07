/** Prompts over an int8 cache: the float way and the operator's own give the same logits and the same codes. */
import * as ort from "onnxruntime-node";
import { expect, test } from "vitest";
import { floatWeights } from "../../src/arch/weights.ts";
import { decoderGraph } from "../../src/export/graphs.ts";
import { attentionNodes } from "../../src/kv/attention-nodes.ts";
import { fullKv } from "../../src/kv/full.ts";
import { withInt8Cache } from "../../src/kv/int8.ts";
import { withFloatPrefill } from "../../src/kv/int8-prefill.ts";
import { byRows } from "../../src/onnx/by-rows.ts";
import { toBytes } from "../../src/onnx/external-data.ts";
import { decodeModel, encodeModel, type ModelProto } from "../../src/onnx/proto.ts";
import { DecoderSession } from "../../src/runtime/session.ts";
import { openModel } from "../arch/golden-model.ts";
import { goldenModels } from "../helpers.ts";
import { random } from "../quant/random.ts";
import { difference, storiesGraph, storiesModel, story } from "./stories.ts";

const CONTEXT = 128;
/** Sums of float32 in another order: a value between two codes may get the other one, and moves what comes after it. */
const CODES_THAT_DIFFER = 3e-3;
/** A prompt in two long pieces, a short one, and single tokens. */
const PIECES = [40, 33, 5, 1, 1];

const folders = goldenModels();

/** `float` with int8 caches of one scale, coarse enough that some values pass its end; undefined where a family has none. */
function coarse(float: ModelProto): ModelProto | undefined {
  try {
    const width = ({ kvHeads, headDim }: { kvHeads: number; headDim: number }) => kvHeads * headDim;
    const scales = attentionNodes(float, "test").map((node) => ({
      key: new Float32Array(width(node)).fill(0.02),
      value: new Float32Array(width(node)).fill(0.004),
    }));
    return withInt8Cache(float, scales);
  } catch {
    return undefined;
  }
}

async function run(model: ModelProto, ids: readonly number[]) {
  const session = new DecoderSession(ort, await ort.InferenceSession.create(encodeModel(model)), "test", CONTEXT);
  const logits: Float32Array[] = [];
  let at = 0;
  for (const size of PIECES) {
    const rows = await session.append(0, at, ids.slice(at, at + size), "all");
    logits.push(...rows.map((row) => Float32Array.from(row)));
    at += size;
  }
  const codes = session.readTokens(0, 0, at).map((part) => Int8Array.from(part));
  await session.dispose();
  return { logits, codes };
}

async function compare(float: ModelProto, ids: readonly number[]): Promise<number> {
  const int8 = coarse(float);
  if (!int8) return 0;
  const many = withFloatPrefill(int8);
  const both = byRows(int8, many);
  const layers = int8.graph.node.filter((node) => !many.graph.node.includes(node)).length;
  if (layers === 0) {
    expect(both).toEqual(int8);
    return 0;
  }
  const [expected, given, exact] = [await run(int8, ids), await run(both, ids), await run(float, ids)];
  const worst = (a: Float32Array[], b: Float32Array[]) => Math.max(...a.map((row, i) => difference(row, b[i])));
  // far nearer to each other than to the float cache
  expect(worst(given.logits, expected.logits)).toBeLessThan(0.1 * worst(given.logits, exact.logits));
  expect(given.codes.slice(0, 2)).toEqual(expected.codes.slice(0, 2)); // before the first attention all is the same
  const steps = given.codes.flatMap((part, i) => [...part].map((code, at) => Math.abs(code - expected.codes[i][at])));
  expect(Math.max(...steps.map((step) => Math.min(step, 2)))).toBeLessThan(2);
  expect(steps.filter((step) => step > 0).length).toBeLessThan(CODES_THAT_DIFFER * steps.length);
  return layers;
}

test("stories260K, whose heads are padded", async () => {
  expect(await compare(await storiesGraph(), story)).toBe(5);
});

test("a graph in float16 is left as it is: its operators take no scales of float32", async () => {
  const model = await storiesModel();
  const weights = floatWeights(model.checkpoint);
  const graph = decoderGraph(model, { weights, kv: fullKv(), maxPositions: CONTEXT, activations: "float16" });
  const int8 = coarse(decodeModel(await toBytes(graph)));
  expect(int8).toBeDefined();
  expect(withFloatPrefill(int8 as ModelProto)).toBe(int8);
  await model.checkpoint.dispose();
});

test.each([...folders])("%s", async (name, folder) => {
  const model = await openModel(folder);
  const weights = floatWeights(model.checkpoint);
  const graph = decoderGraph(model, { weights, kv: fullKv(), maxPositions: CONTEXT, fuseLinears: true });
  const draw = random(7);
  const ids = Array.from({ length: CONTEXT }, () => Math.floor(draw() * model.config.vocabSize));
  const layers = await compare(decodeModel(await toBytes(graph)), ids);
  if (layers === 0) console.warn(`${name}: no layer with an int8 cache of its own`);
  await model.checkpoint.dispose();
});
