/** Events of an answer as Anthropic's stream: a message of content blocks, one open at a time. */
import type { AnswerEvent } from "../answer.ts";
import type { SseEvent } from "../sse.ts";
import { messagesUsage, stopReason } from "./messages.ts";

type BlockKind = "text" | "thinking" | "tool_use";

export async function* messageEvents(
  events: AsyncIterable<AnswerEvent>,
  head: { readonly id: string; readonly model: string; readonly promptTokens: number },
): AsyncGenerator<SseEvent> {
  const { id, model, promptTokens } = head;
  const usage = messagesUsage({ promptTokens, cachedTokens: 0, completionTokens: 0 });
  let started = false;
  let open: BlockKind | undefined;
  let index = -1;

  const named = (type: string, fields: object): SseEvent => ({
    event: type,
    data: JSON.stringify({ type, ...fields }),
  });
  const close = (): SseEvent[] => {
    if (!open) return [];
    open = undefined;
    return [named("content_block_stop", { index })];
  };
  const start = (kind: BlockKind, block: object): SseEvent[] => {
    const events = close();
    open = kind;
    index++;
    return [...events, named("content_block_start", { index, content_block: { type: kind, ...block } })];
  };
  const delta = (fields: object): SseEvent => named("content_block_delta", { index, delta: fields });

  for await (const event of events) {
    if (!started) {
      started = true;
      const message = {
        id,
        type: "message",
        role: "assistant",
        model,
        content: [],
        stop_reason: null,
        stop_sequence: null,
      };
      yield named("message_start", { message: { ...message, usage } });
      yield named("ping", {});
    }
    switch (event.kind) {
      case "reasoning":
        if (open !== "thinking") yield* start("thinking", { thinking: "", signature: "" });
        yield delta({ type: "thinking_delta", thinking: event.text });
        break;
      case "text":
        if (open !== "text") yield* start("text", { text: "", citations: null });
        yield delta({ type: "text_delta", text: event.text });
        break;
      case "tool_call":
        yield* start("tool_use", { id: event.id, name: event.name, input: {} });
        break;
      case "arguments":
        yield delta({ type: "input_json_delta", partial_json: event.text });
        break;
      case "finish":
        if (index < 0) yield* start("text", { text: "", citations: null });
        yield* close();
        yield named("message_delta", {
          delta: { stop_reason: stopReason({ finish: event }), stop_sequence: event.stopString ?? null },
          usage: messagesUsage(event.usage),
        });
        yield named("message_stop", {});
    }
  }
}
