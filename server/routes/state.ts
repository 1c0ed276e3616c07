/** GET /props, /slots and /metrics: what runs, for people and for monitoring. */
import { Hono } from "hono";
import { z } from "zod";
import { version } from "../../src/version.ts";
import type { ServerContext } from "../context.ts";
import { ApiError } from "../openai/errors.ts";

const count = z.int().min(0);

export const propsAnswer = z.object({
  build_info: z.string(),
  total_slots: count,
  model_alias: z.string().nullable(),
  chat_template: z.string(),
  default_generation_settings: z.object({ n_ctx: count }),
  modalities: z.object({ vision: z.boolean(), audio: z.boolean() }),
  models: z.array(
    z.looseObject({
      id: z.string(),
      state: z.enum(["unloaded", "loading", "ready", "failed"]),
      active: count,
      size_bytes: count,
    }),
  ),
});

export const slotsAnswer = z.array(
  z.object({ id: count, model: z.string(), n_ctx: count, is_processing: z.boolean(), waiting: count }),
);

export function state({ registry, metrics }: ServerContext): Hono {
  return new Hono()
    .get("/props", (c) => {
      const loaded = registry.list();
      const ready = loaded.find(({ engine }) => engine);
      const first = ready?.engine;
      return c.json({
        build_info: `nibble ${version}`,
        total_slots: first?.info.maxBatch ?? 0,
        model_alias: ready?.id ?? null,
        chat_template: first?.tokenizer.chatTemplate ?? "",
        default_generation_settings: { n_ctx: first?.info.contextLength ?? 0 },
        modalities: { vision: false, audio: false },
        models: loaded.map(({ id, state: now, active, sizeBytes, engine }) => ({
          id,
          state: now,
          active,
          size_bytes: sizeBytes,
          ...(engine ? engineProps(engine.info) : {}),
        })),
      });
    })
    .get("/slots", (c) =>
      c.json(
        registry.list().flatMap(({ id, engine }) => {
          if (!engine) return [];
          const { running, waiting } = engine.stats();
          return Array.from({ length: engine.info.maxBatch }, (_, slot) => ({
            id: slot,
            model: id,
            n_ctx: engine.info.contextLength,
            is_processing: slot < running,
            waiting: slot === 0 ? waiting : 0,
          }));
        }),
      ),
    )
    .get("/metrics", async (c) => {
      if (!metrics) throw new ApiError(404, "unknown_url", "This server keeps no metrics.", { code: "not_found" });
      const { contentType, body } = await metrics.text();
      return c.body(body, 200, { "Content-Type": contentType });
    });
}

function engineProps({ modelType, file, contextLength, vocabSize, binding, kv, memory, maxBatch }: EngineFacts) {
  return {
    model_type: modelType,
    file,
    context_length: contextLength,
    vocab_size: vocabSize,
    binding,
    kv,
    max_batch: maxBatch,
    weight_bytes: memory.weightBytes,
    kv_bytes_per_token: memory.kvBytesPerToken,
    kv_bytes_allocated: memory.kvBytesAllocated,
  };
}

type EngineFacts = NonNullable<ReturnType<ServerContext["registry"]["list"]>[number]["engine"]>["info"];
