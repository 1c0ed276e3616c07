/** POST /v1/responses */
import { Hono } from "hono";
import { body, type ServerContext, streamOptions } from "../context.ts";
import { type RunningAnswers, startAnswers } from "../generate.ts";
import { ItemMemory } from "../openai/item-memory.ts";
import { ResponseBuilder, type ResponseEvent } from "../openai/responses-events.ts";
import { parseResponsesRequest, responsesJob } from "../openai/responses-request.ts";
import { type SseEvent, sseResponse } from "../sse.ts";

export function responses(context: ServerContext): Hono {
  const items = new ItemMemory();
  return new Hono().post("/v1/responses", async (c) => {
    const given = parseResponsesRequest(await body(c, context));
    const request = { ...given, input: items.resolve(given.input) };
    const running = await startAnswers(c, context, request.model, 1, (engine) => responsesJob(request, engine));
    const { held, engine, promptTokens } = running;
    const builder = new ResponseBuilder(held.lease.id, request, engine.tokenizer, promptTokens);
    const done = (): void => {
      if (request.store !== false) items.keep(builder.response().output);
    };
    if (!request.stream) {
      for await (const { item } of running.events) builder.step(item);
      done();
      return c.json(builder.response());
    }
    const options = streamOptions(c, context, held, (error) => named(builder.fail(error)));
    return sseResponse(events(running, builder, done), options);
  });
}

const named = (event: ResponseEvent): SseEvent => ({ event: event.type, data: JSON.stringify(event) });

async function* events(running: RunningAnswers, builder: ResponseBuilder, done: () => void): AsyncGenerator<SseEvent> {
  let begun = false;
  for await (const { item } of running.events) {
    if (!begun) yield* builder.begin().map(named);
    begun = true;
    const next = builder.step(item).map(named);
    if (item.kind === "finish") done(); // before the client can answer
    yield* next;
  }
}
