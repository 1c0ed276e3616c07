/** The session that a graph's cache needs: in place, in two tiers, or growing by concatenation. */
import type { InferenceSession } from "onnxruntime-common";
import { staticScalesOf } from "../kv/int4.ts";
import type { Ort } from "../onnx/ort.ts";
import type { ModelProto } from "../onnx/proto.ts";
import { cachesInPlace, GrowingSession } from "./growing-session.ts";
import { DecoderSession } from "./session.ts";
import { TieredSession } from "./tiered-session.ts";

export type CacheSession = DecoderSession | GrowingSession | TieredSession;

/** @param model what `session` was made of; @param name for errors. */
export function openCache(
  ort: Ort,
  session: InferenceSession,
  model: ModelProto,
  name: string,
  contextLength: number,
): CacheSession {
  if (session.inputNames.includes("past_body_length")) {
    return new TieredSession(ort, session, name, staticScalesOf(model));
  }
  return cachesInPlace(model)
    ? new DecoderSession(ort, session, name, contextLength)
    : new GrowingSession(ort, session, name);
}
