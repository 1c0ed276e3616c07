/** POST /v1/messages and /v1/messages/count_tokens: Anthropic's shape */
import { Hono } from "hono";
import { type AnswerEvent, renderPrompt } from "../answer.ts";
import { messageEvents } from "../anthropic/events.ts";
import { messagesJob, parseMessagesRequest, toMessage } from "../anthropic/messages.ts";
import { body, makeId, type ServerContext, streamOptions } from "../context.ts";
import { errorBody } from "../error-shape.ts";
import { byChoice, startAnswers } from "../generate.ts";
import { collect } from "../openai/chat-response.ts";
import { toHttpError } from "../openai/errors.ts";
import { sseResponse } from "../sse.ts";

export function messages(context: ServerContext): Hono {
  return new Hono()
    .post("/v1/messages", async (c) => {
      const request = parseMessagesRequest(await body(c, context));
      const running = await startAnswers(c, context, request.model, 1, (engine) => messagesJob(request, engine));
      const head = { id: makeId("msg_"), model: running.held.lease.id, promptTokens: running.promptTokens };
      if (!request.stream) {
        const [events] = await byChoice(running.events, 1);
        return c.json(toMessage(head.id, head.model, collect(events)));
      }
      const describeError = (error: unknown) => ({
        event: "error",
        data: JSON.stringify(errorBody(c.req.path, toHttpError(error))),
      });
      const options = streamOptions(c, context, running.held, describeError);
      return sseResponse(messageEvents(items(running.events), head), options);
    })
    .post("/v1/messages/count_tokens", async (c) => {
      const request = parseMessagesRequest(await body(c, context), true);
      const lease = await context.registry.use(request.model);
      try {
        const { ids } = renderPrompt(lease.engine.tokenizer, messagesJob(request, lease.engine));
        return c.json({ input_tokens: ids.length });
      } finally {
        lease.release();
      }
    });
}

async function* items(events: AsyncIterable<{ item: AnswerEvent }>): AsyncGenerator<AnswerEvent> {
  for await (const { item } of events) yield item;
}
