/** The session that a graph's cache needs: in place, in two tiers, or growing by concatenation. */
import type { InferenceSession } from "onnxruntime-common";
import { attentionNodes, INPUT } from "../kv/attention-nodes.ts";
import type { EvictionPlan } from "../kv/eviction.ts";
import { staticScalesOf } from "../kv/int4.ts";
import type { Ort } from "../onnx/ort.ts";
import type { ModelProto } from "../onnx/proto.ts";
import { EvictingSession } from "./evicting-session.ts";
import { cachesInPlace, GrowingSession } from "./growing-session.ts";
import { DecoderSession } from "./session.ts";
import { TieredSession } from "./tiered-session.ts";

export type CacheSession = DecoderSession | GrowingSession | TieredSession | EvictingSession;

/** @param model what `session` was made of, by `withEviction` where there is such a plan; @param name for errors. */
export function openCache(
  ort: Ort,
  session: InferenceSession,
  model: ModelProto,
  name: string,
  contextLength: number,
  eviction?: EvictionPlan,
): CacheSession {
  if (eviction) {
    const layers = attentionNodes(model, `--kv-policy ${eviction.policy}`);
    const inner = new DecoderSession(ort, session, name, contextLength);
    return new EvictingSession(inner, layers, eviction, int8Scales(model, inner));
  }
  if (session.inputNames.includes("past_body_length")) {
    return new TieredSession(ort, session, name, staticScalesOf(model));
  }
  return cachesInPlace(model)
    ? new DecoderSession(ort, session, name, contextLength)
    : new GrowingSession(ort, session, name);
}

/** The static scales of an int8 cache, by cache part; undefined for any other. */
function int8Scales({ graph }: ModelProto, { shape }: DecoderSession): Float32Array[] | undefined {
  if (shape.kvFormat !== "int8") return undefined;
  const stored = new Map(graph.initializer.map(({ name, rawData }) => [name, rawData]));
  return shape.cache.map(({ past }) => {
    const node = graph.node.find(({ input }) => input.includes(past))!;
    const isKey = node.input[INPUT.pastKey] === past;
    const bytes = stored.get(node.input[isKey ? INPUT.keyScale : INPUT.valueScale]);
    return new Float32Array(Uint8Array.from(bytes ?? []).buffer);
  });
}
