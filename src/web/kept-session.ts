/**
 * Caches that are more than keys and values fed back as they come (int4 in two tiers, policies that forget), in a page on
 * WASM: the same sessions as in Node. onnxruntime-web writes into no tensor that it is given, so what a run gives is
 * copied to where those sessions expect it.
 */
import type { InferenceSession, Tensor } from "onnxruntime-common";
import { type EvictionPlan, evictionPolicy } from "../kv/eviction.ts";
import { withEviction } from "../kv/eviction-graph.ts";
import type { Ort } from "../onnx/ort.ts";
import type { ModelProto } from "../onnx/proto.ts";
import { type CacheSession, openCache } from "../runtime/open-cache.ts";
import { type PageCache, PREFILL_CHUNK } from "./session.ts";

/** The graph that gives out what such a policy looks at. */
export function forgetting(model: ModelProto, { policy }: EvictionPlan): ModelProto {
  return withEviction(model, evictionPolicy(policy));
}

/** @param model what `session` was made of */
export function openKept(
  ort: Ort,
  session: InferenceSession,
  model: ModelProto,
  name: string,
  contextLength: number,
  eviction: EvictionPlan | undefined,
): PageCache {
  return new KeptSession(openCache(ort, copying(session), model, name, contextLength, eviction));
}

/** A session whose `run` fills the tensors of its fetches. */
export function copying(session: InferenceSession): InferenceSession {
  const run = async (feeds: InferenceSession.FeedsType, fetches: Readonly<Record<string, Tensor | null>>) => {
    const results = await session.run(feeds, Object.keys(fetches));
    const given: Record<string, Tensor> = {};
    for (const [name, wanted] of Object.entries(fetches)) {
      const result = results[name] as Tensor;
      given[name] = wanted ?? result;
      if (!wanted) continue;
      (wanted.data as Float32Array).set(result.data as Float32Array);
      result.dispose();
    }
    return given;
  };
  return new Proxy(session, {
    get(target, key) {
      if (key === "run") return run;
      const value = Reflect.get(target, key);
      return typeof value === "function" ? value.bind(target) : value;
    },
  });
}

class KeptSession implements PageCache {
  /** What the model saw, forgotten tokens included. */
  private tokens: number[] = [];

  constructor(private readonly cache: CacheSession) {}

  get kvBytesPerToken(): number {
    return this.cache.shape.kvBytesPerToken;
  }

  get kvBytes(): number {
    return this.cache.kvBytesAllocated;
  }

  get kvFormat(): string {
    return this.cache.shape.kvFormat;
  }

  /** Goes on from all of what was seen, or starts over: nothing comes back out of a body or from what was dropped. */
  async resume(prompt: readonly number[]): Promise<number> {
    const { tokens } = this;
    if (tokens.length < prompt.length && tokens.every((token, i) => token === prompt[i])) return tokens.length;
    this.clear();
    return 0;
  }

  async step(tokens: readonly number[], signal?: AbortSignal): Promise<Float32Array> {
    for (let start = 0; ; start += PREFILL_CHUNK) {
      signal?.throwIfAborted();
      const chunk = tokens.slice(start, start + PREFILL_CHUNK);
      const logits = await this.cache.append(0, this.tokens.length, chunk, "last");
      this.tokens.push(...chunk);
      if (start + PREFILL_CHUNK >= tokens.length) return logits[logits.length - 1];
    }
  }

  clear(): void {
    this.tokens = [];
    this.cache.shrink(0, 0);
  }

  async dispose(): Promise<void> {
    await this.cache.dispose();
  }
}
