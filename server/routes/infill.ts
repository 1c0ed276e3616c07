/** POST /infill: code between a prefix and a suffix, as llama.cpp's editors plugins ask for it. */
import { Hono } from "hono";
import { z } from "zod";
import type { Timings, Usage } from "../../src/runtime/engine.ts";
import { requireContext } from "../answer.ts";
import { type CompletionPart, complete } from "../complete.ts";
import { body, errorEvent, hold, holding, requestFacts, type ServerContext, streamOptions } from "../context.ts";
import { fimPrompt } from "../fim.ts";
import { refuse } from "../openai/errors.ts";
import { defined, samplingFields, samplingOptions } from "../openai/sampling.ts";
import { type SseEvent, sseResponse } from "../sse.ts";

/** llama.cpp's plugins send many fields of its own sampler; those that Nibble has are done, the rest has no effect. */
export const infillRequest = z.object({
  model: z.string().optional(),
  input_prefix: z.string(),
  input_suffix: z.string(),
  input_extra: z.array(z.object({ filename: z.string().optional(), text: z.string() })).optional(),
  prompt: z.string().optional(),
  n_predict: z.int().min(-1).max(1_000_000).optional(),
  max_tokens: z.int().min(1).max(1_000_000).optional(),
  stream: z.boolean().optional(),
  ...samplingFields,
});

const timings = z.object({
  prompt_n: z.int().min(0),
  prompt_ms: z.number().min(0),
  predicted_n: z.int().min(0),
  predicted_ms: z.number().min(0),
  predicted_per_second: z.number().min(0),
});

export const infillAnswer = z.object({
  content: z.string(),
  tokens: z.array(z.int().min(0)).optional(), // of a streamed answer
  stop: z.literal(true),
  model: z.string(),
  stop_type: z.enum(["eos", "limit", "word"]),
  stopping_word: z.string(),
  truncated: z.literal(false),
  tokens_predicted: z.int().min(0),
  tokens_evaluated: z.int().min(0),
  tokens_cached: z.int().min(0),
  timings: timings.optional(),
});

export function infill(context: ServerContext): Hono {
  return new Hono().post("/infill", async (c) => {
    const given = await body(c, context);
    const request = infillRequest.parse(
      Object.fromEntries(Object.entries(given).filter(([, value]) => value !== null)),
    );
    const held = await hold(c, context, request.model, 1);
    const { engine } = held.lease;
    let parts: AsyncGenerator<CompletionPart>;
    try {
      const before = request.input_prefix + (request.prompt ?? "");
      const fim = fimPrompt(engine.tokenizer, before, request.input_suffix, request.input_extra);
      if (!fim) throw refuse("model", "This model has no fill-in-the-middle tokens.", "unsupported_value");
      requireContext(engine, fim.prompt.ids, "prompt");
      const limit = request.n_predict !== undefined && request.n_predict >= 0 ? request.n_predict : request.max_tokens;
      const asked = { ...samplingOptions(request, engine.info.vocabSize), maxTokens: limit, signal: held.signal };
      parts = holding(held, complete(engine, fim.prompt, fim.options(defined(asked)), false));
    } catch (error) {
      held.end();
      throw error;
    }
    const facts = requestFacts(c);
    if (request.stream) {
      return sseResponse(events(parts, held.lease.id), streamOptions(c, context, held, errorEvent));
    }
    let content = "";
    for await (const part of parts) {
      content += part.text;
      if (part.usage) Object.assign(facts, part.usage);
      if (part.finish) return c.json({ content, ...lastFields(part, held.lease.id) });
    }
    throw new Error("the answer ended without its last part");
  });
}

async function* events(parts: AsyncIterable<CompletionPart>, model: string): AsyncGenerator<SseEvent> {
  for await (const part of parts) {
    const { text, tokens, finish } = part;
    const fields = finish ? lastFields(part, model) : { stop: false };
    yield { data: JSON.stringify({ content: text, tokens, ...fields }) };
  }
}

function lastFields({ finish, usage, timings, stopString }: CompletionPart, model: string) {
  return {
    stop: true,
    model,
    stop_type: finish === "length" ? "limit" : stopString === undefined ? "eos" : "word",
    stopping_word: stopString ?? "",
    truncated: false,
    tokens_predicted: usage?.completionTokens ?? 0,
    tokens_evaluated: usage?.promptTokens ?? 0,
    tokens_cached: usage?.cachedTokens ?? 0,
    timings: timingsOut(usage, timings),
  };
}

function timingsOut(usage: Usage | undefined, timings: Timings | undefined) {
  if (!usage || !timings) return undefined;
  const { prefillMs, decodeMs } = timings;
  return {
    prompt_n: usage.promptTokens - usage.cachedTokens,
    prompt_ms: prefillMs,
    predicted_n: usage.completionTokens,
    predicted_ms: decodeMs,
    predicted_per_second: decodeMs > 0 ? (usage.completionTokens / decodeMs) * 1000 : 0,
  };
}
