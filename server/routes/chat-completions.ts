/** POST /v1/chat/completions */
import { Hono } from "hono";
import type { FinalUsage } from "../answer.ts";
import { body, errorEvent, responseHead, type ServerContext, streamOptions } from "../context.ts";
import { byChoice, type RunningAnswers, startAnswers } from "../generate.ts";
import { type ChatRequest, parseChatRequest, toChatJob } from "../openai/chat-request.ts";
import {
  addUsage,
  collect,
  firstChunk,
  type ResponseHead,
  toChunk,
  toCompletion,
  usageChunk,
  withoutUsage,
} from "../openai/chat-response.ts";
import { type SseEvent, sseResponse } from "../sse.ts";

export function chatCompletions(context: ServerContext): Hono {
  return new Hono().post("/v1/chat/completions", async (c) => {
    const request = parseChatRequest(await body(c, context));
    const count = request.n ?? 1;
    const running = await startAnswers(c, context, request.model, count, (engine) => toChatJob(request, engine));
    const head = responseHead("chatcmpl-", running.held.lease.id);
    if (!request.stream) {
      const lists = await byChoice(running.events, count);
      const answers = lists.map(collect);
      return c.json(toCompletion(head, answers, running.engine.tokenizer, request.logprobs ?? false));
    }
    return sseResponse(chunks(running, head, request), streamOptions(c, context, running.held, errorEvent));
  });
}

async function* chunks(running: RunningAnswers, head: ResponseHead, request: ChatRequest): AsyncGenerator<SseEvent> {
  const { tokenizer } = running.engine;
  const started = new Set<number>();
  const usages: FinalUsage[] = [];
  const includeUsage = request.stream_options?.include_usage ?? false;
  const sent = (made: object): SseEvent => json(includeUsage ? withoutUsage(made) : made);
  for await (const { index, item } of running.events) {
    if (!started.has(index)) yield sent(firstChunk(head, index));
    started.add(index);
    if (item.kind === "finish") usages.push(item.usage);
    yield sent(toChunk(head, index, item, tokenizer));
  }
  if (includeUsage) yield json(usageChunk(head, addUsage(usages)));
  yield { data: "[DONE]" };
}

const json = (value: unknown): SseEvent => ({ data: JSON.stringify(value) });
