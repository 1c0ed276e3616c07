/** Graphs of caches in tiers, with what they are fed while a text is read: their inputs are more than tokens and a past. */
import * as ort from "onnxruntime-node";
import { cacheStatistics } from "../../../src/eval/cache-statistics.ts";
import { staticScalesOf, withInt4Cache } from "../../../src/kv/int4.ts";
import { memoryFolder } from "../../../src/memory-files.ts";
import { encodeModel, type ModelProto } from "../../../src/onnx/proto.ts";
import { TieredSession } from "../../../src/runtime/tiered-session.ts";
import { storiesGraph, story } from "../../kv/stories.ts";
import type { Feeds } from "./cases.ts";

/** Beyond sinks and tail, so that the body holds something. */
const PROMPT = 100;

/** stories260K with its 4-bit caches: a graph, and the feeds of a prompt's second piece and of a step after it. */
export async function* tieredGraphs(): AsyncGenerator<{ model: ModelProto; runs: readonly Feeds[] }> {
  const graph = await storiesGraph();
  const folder = memoryFolder("stories", new Map([["model.onnx", encodeModel(graph)]]));
  const statistics = await cacheStatistics(ort, folder, "model.onnx", graph, [story]);
  for (const scales of ["token", "static"] as const) {
    const model = withInt4Cache(graph, statistics, scales);
    const inner = await ort.InferenceSession.create(encodeModel(model));
    const runs: Feeds[] = [];
    const recording = new Proxy(inner, {
      get(target, key) {
        if (key === "run") {
          return (feeds: Feeds, fetches: ort.InferenceSession.FetchesType) => {
            runs.push(copied(feeds));
            return inner.run(feeds, fetches);
          };
        }
        const value = Reflect.get(target, key);
        return typeof value === "function" ? value.bind(target) : value;
      },
    });
    const session = new TieredSession(ort, recording, "int4", staticScalesOf(model));
    await session.append(0, 0, story.slice(0, PROMPT), "last");
    await session.append(0, PROMPT, story.slice(PROMPT, PROMPT + 7), "last");
    await session.append(0, PROMPT + 7, story.slice(PROMPT + 7, PROMPT + 8), "last");
    await session.dispose();
    yield { model, runs: runs.slice(-2) };
  }
}

/** The caches are written in place by the next run. */
function copied(feeds: Feeds): Feeds {
  return Object.fromEntries(
    Object.entries(feeds).map(([name, { type, data, dims }]) => {
      return [name, new ort.Tensor(type, (data as Float32Array).slice() as never, [...dims])];
    }),
  );
}
