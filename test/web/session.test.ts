/** One sequence in the page's session, on graphs that are more than keys and values; run by onnxruntime-node here. */
import * as ort from "onnxruntime-node";
import { describe, expect, test } from "vitest";
import { ortProducts } from "../../quant/products.ts";
import { quantizeModel } from "../../quant/quantize.ts";
import { rtn } from "../../quant/recipes.ts";
import type { Model } from "../../src/arch/index.ts";
import { floatWeights } from "../../src/arch/weights.ts";
import { decoderGraph } from "../../src/export/graphs.ts";
import { attentionNodes } from "../../src/kv/attention-nodes.ts";
import { fullKv } from "../../src/kv/full.ts";
import { withInt8Cache } from "../../src/kv/int8.ts";
import { withNewRows } from "../../src/kv/new-rows.ts";
import { toBytes } from "../../src/onnx/external-data.ts";
import { decodeModel, type ModelProto } from "../../src/onnx/proto.ts";
import { WebSession } from "../../src/web/session.ts";
import { Decoder, floats, openModel, readGolden } from "../arch/golden-model.ts";
import { integerTwin } from "../browser/parity/twin.ts";
import { isMissing, sharedPath } from "../helpers.ts";
import { openModel as openGraph, storiesGraph, storiesModel, story } from "../kv/stories.ts";

const golden = (name: string) => sharedPath("golden", "models", name);

async function sessionOf(model: Model, recomputeAbove?: number): Promise<WebSession> {
  const weights = floatWeights(model.checkpoint);
  const graph = decoderGraph(model, { weights, kv: fullKv(), maxPositions: 128 });
  return new WebSession(ort, await ort.InferenceSession.create(await toBytes(graph)), recomputeAbove);
}

const likeliest = (row: Float32Array) => row.indexOf(row.reduce((best, x) => Math.max(best, x)));

async function greedy(session: WebSession, prompt: readonly number[], count: number): Promise<number[]> {
  const tokens = [...prompt];
  let next = tokens.slice(await session.resume(tokens));
  for (let i = 0; i < count; i++) {
    const token = likeliest(await session.step(next));
    tokens.push(token);
    next = [token];
  }
  return tokens.slice(prompt.length);
}

async function greedyFromScratch(model: Model, prompt: readonly number[], count: number): Promise<number[]> {
  const decoder = await Decoder.of(model);
  const tokens = [...prompt];
  for (let i = 0; i < count; i++) {
    const { logits } = await decoder.run([tokens], [tokens.map(() => 1)]);
    tokens.push(likeliest(floats(logits).subarray(-model.config.vocabSize)));
  }
  await decoder.dispose();
  return tokens.slice(prompt.length);
}

describe.each([
  ["lfm2", undefined],
  ["phi3-longrope", 32], // original_max_position_embeddings
  ["mistral", undefined],
])("%s (needs NIBBLE_SHARED)", (name, recomputeAbove) => {
  test.skipIf(isMissing(golden(name)))("prompts that share beginnings give what each gives from scratch", async () => {
    const model = await openModel(golden(name));
    const { inputIds } = await readGolden(golden(name));
    const session = await sessionOf(model, recomputeAbove);
    // grows, is cut back, grows beyond 32 while it speaks, is long at once, is short again
    for (const length of [10, 8, 24, 48, 20]) {
      const prompt = inputIds.slice(0, length);
      expect(await greedy(session, prompt, 12), `${length} tokens`).toEqual(await greedyFromScratch(model, prompt, 12));
    }
    await session.dispose();
  });
});

describe("a graph that gives only new rows", () => {
  /** Of every channel: keys and values of this model are below 6. */
  const int8 = (graph: ModelProto) =>
    withInt8Cache(
      graph,
      attentionNodes(graph, "test").map(({ kvHeads, headDim }) => {
        const one = new Float32Array(kvHeads * headDim).fill(0.05);
        return { key: one, value: one };
      }),
    );
  const variants: Record<string, (graph: ModelProto) => ModelProto> = {
    "float cache": (graph) => graph,
    "int8 cache": int8,
  };

  test.each(Object.entries(variants))(
    "says what the whole %s says, for prompts that share beginnings",
    async (_, of) => {
      const graph = of(await storiesGraph());
      const rows = withNewRows(graph)!;
      const whole = new WebSession(ort, await openGraph(graph));
      const ours = new WebSession(ort, await openGraph(rows), undefined, undefined, true);
      // grows over the buffer's steps, is cut back, grows again
      for (const length of [30, 8, 100, 40]) {
        const prompt = [...story.slice(0, length - 2), length, 7];
        expect(await greedy(ours, prompt, 12), `${length} tokens`).toEqual(await greedy(whole, prompt, 12));
      }
      const [taken, expected] = [await ours.takeRows(5, 20), await whole.takeRows(5, 20)];
      expect(taken).toEqual(expected);
      expect(ours.kvBytes).toBe(ours.kvBytesPerToken * 64);
      await Promise.all([ours.dispose(), whole.dispose()]);
    },
  );

  test("a twin's branches give them too, and a state of another kind is left alone", async () => {
    const model = await storiesModel();
    const products = ortProducts(ort);
    const { weights } = await quantizeModel(model, rtn(), [], { ort, products });
    const four = decodeModel(await toBytes(decoderGraph(model, { weights, kv: fullKv(), maxPositions: 128 })));
    await products.dispose();
    const twin = await integerTwin(four);
    const whole = new WebSession(ort, await openGraph(twin));
    const session = new WebSession(ort, await openGraph(withNewRows(twin)!), undefined, undefined, true);
    expect(await greedy(session, story.slice(0, 20), 20)).toEqual(await greedy(whole, story.slice(0, 20), 20));
    await Promise.all([session.dispose(), whole.dispose()]);
    const { graph } = four;
    const state = { ...graph.input.find(({ name }) => name.startsWith("past_"))!, name: "past_conv.0" };
    expect(withNewRows({ ...four, graph: { ...graph, input: [...graph.input, state] } })).toBeUndefined();
  });
});

test("a session is warmed up as far as its context reaches and no further", async () => {
  const model = await storiesModel();
  const session = await sessionOf(model); // its table of rotations has 128 rows: the operator refuses more
  let steps = 0;
  for await (const _ of session.warmUp(128)) steps++;
  expect(steps).toBe(1 + 128 - 16);
  expect(session.held).toEqual([]);
  await session.dispose();
  await model.checkpoint.dispose();
});
