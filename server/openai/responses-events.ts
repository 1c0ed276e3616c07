/** An answer as a Response object that grows, and the stream events that tell of each step. */
import type { GeneratedToken } from "../../src/runtime/engine.ts";
import type { Tokenizer } from "../../src/tokenizer/tokenizer.ts";
import type { AnswerEvent, FinalUsage } from "../answer.ts";
import { makeId, unixSeconds } from "../context.ts";
import { logprobsOut } from "./chat-response.ts";
import { toHttpError } from "./errors.ts";
import type { ResponsesRequest } from "./responses-request.ts";

type Item =
  | { type: "message"; id: string; role: "assistant"; status: string; content: TextPart[] }
  | { type: "reasoning"; id: string; status: string; summary: []; content: { type: "reasoning_text"; text: string }[] }
  | { type: "function_call"; id: string; call_id: string; name: string; arguments: string; status: string };

interface TextPart {
  type: "output_text";
  text: string;
  annotations: [];
  logprobs: unknown[];
}

export interface ResponseEvent {
  readonly type: string;
  readonly sequence_number: number;
}

export class ResponseBuilder {
  private readonly output: Item[] = [];
  private sequence = 0;
  private status = "in_progress";
  private incomplete: { reason: string } | null = null;
  private error: { code: string; message: string } | null = null;
  private usage: FinalUsage | undefined;
  private readonly id = makeId("resp_");
  private readonly created = unixSeconds();

  constructor(
    private readonly model: string,
    private readonly request: ResponsesRequest,
    private readonly tokenizer: Tokenizer,
    private readonly promptTokens: number,
  ) {}

  /** The object as it stands. */
  response() {
    const { request, usage } = this;
    return {
      id: this.id,
      object: "response",
      created_at: this.created,
      status: this.status,
      background: false,
      error: this.error,
      incomplete_details: this.incomplete,
      instructions: request.instructions ?? null,
      max_output_tokens: request.max_output_tokens ?? null,
      max_tool_calls: null,
      metadata: this.request.metadata ?? {},
      model: this.model,
      output: structuredClone(this.output),
      parallel_tool_calls: request.parallel_tool_calls ?? true,
      previous_response_id: null,
      reasoning: { effort: request.reasoning?.effort ?? null, summary: null },
      service_tier: "default",
      store: false,
      temperature: request.temperature ?? 1,
      text: { format: request.text?.format ?? { type: "text" }, verbosity: "medium" },
      tool_choice: request.tool_choice ?? "auto",
      tools: request.tools ?? [],
      top_logprobs: request.top_logprobs ?? 0,
      top_p: request.top_p ?? 1,
      truncation: "disabled",
      usage: usage
        ? {
            input_tokens: usage.promptTokens,
            input_tokens_details: { cached_tokens: usage.cachedTokens },
            output_tokens: usage.completionTokens,
            output_tokens_details: { reasoning_tokens: usage.reasoningTokens },
            total_tokens: usage.promptTokens + usage.completionTokens,
          }
        : null,
    };
  }

  private event(type: string, fields: object): ResponseEvent {
    return { type, sequence_number: this.sequence++, ...fields };
  }

  begin(): ResponseEvent[] {
    return [
      this.event("response.created", { response: this.response() }),
      this.event("response.in_progress", { response: this.response() }),
    ];
  }

  /** One event of the answer. */
  step(event: AnswerEvent): ResponseEvent[] {
    switch (event.kind) {
      case "text":
        return this.text(event.text, event.logprobs);
      case "reasoning":
        return this.reasoning(event.text);
      case "tool_call": {
        const { id: call_id, name } = event;
        const id = makeId("fc_");
        return this.open({ type: "function_call", id, call_id, name, arguments: "", status: "in_progress" });
      }
      case "arguments": {
        const item = this.output.at(-1);
        if (item?.type !== "function_call") throw new Error("arguments without their call");
        item.arguments += event.text;
        return [this.event("response.function_call_arguments.delta", { ...this.place(item), delta: event.text })];
      }
      case "finish": {
        const events = this.closeLast(event.reason === "length" ? "incomplete" : "completed");
        this.usage = event.usage;
        this.status = event.reason === "length" ? "incomplete" : "completed";
        this.incomplete = event.reason === "length" ? { reason: "max_output_tokens" } : null;
        return [...events, this.event(`response.${this.status}`, { response: this.response() })];
      }
    }
  }

  /** The answer ended with an error after its stream had begun. */
  fail(error: unknown): ResponseEvent {
    const { message } = toHttpError(error).body.error;
    this.status = "failed";
    this.error = { code: "server_error", message };
    this.usage ??= { promptTokens: this.promptTokens, cachedTokens: 0, completionTokens: 0, reasoningTokens: 0 };
    return this.event("response.failed", { response: this.response() });
  }

  private place(item: Item): { item_id: string; output_index: number } {
    return { item_id: item.id, output_index: this.output.indexOf(item) };
  }

  private open(item: Item): ResponseEvent[] {
    const before = this.closeLast("completed");
    this.output.push(item);
    const added = this.event("response.output_item.added", {
      output_index: this.output.length - 1,
      item: structuredClone(item),
    });
    return [...before, added];
  }

  private closeLast(status: string): ResponseEvent[] {
    const item = this.output.at(-1);
    if (item?.status !== "in_progress") return [];
    const at = this.place(item);
    const events: ResponseEvent[] = [];
    item.status = status;
    if (item.type === "message") {
      const [part] = item.content;
      const { text, logprobs } = part;
      events.push(this.event("response.output_text.done", { ...at, content_index: 0, text, logprobs }));
      events.push(this.event("response.content_part.done", { ...at, content_index: 0, part: { ...part } }));
    } else if (item.type === "reasoning") {
      const [part] = item.content;
      events.push(this.event("response.reasoning_text.done", { ...at, content_index: 0, text: part.text }));
      events.push(this.event("response.content_part.done", { ...at, content_index: 0, part: { ...part } }));
    } else {
      const { name, arguments: args } = item;
      events.push(this.event("response.function_call_arguments.done", { ...at, name, arguments: args }));
    }
    events.push(
      this.event("response.output_item.done", { output_index: at.output_index, item: structuredClone(item) }),
    );
    return events;
  }

  private text(delta: string, logprobs: readonly GeneratedToken[] | undefined): ResponseEvent[] {
    const events: ResponseEvent[] = [];
    let item = this.output.at(-1);
    if (item?.type !== "message") {
      const part: TextPart = { type: "output_text", text: "", annotations: [], logprobs: [] };
      const fresh: Item = {
        type: "message",
        id: makeId("msg_"),
        role: "assistant",
        status: "in_progress",
        content: [],
      };
      events.push(...this.open(fresh));
      fresh.content.push(part);
      const shown = structuredClone(part);
      events.push(this.event("response.content_part.added", { ...this.place(fresh), content_index: 0, part: shown }));
      item = fresh;
    }
    const [part] = item.content;
    const scores = logprobsOut(this.tokenizer, logprobs, delta)?.content ?? [];
    part.text += delta;
    part.logprobs.push(...scores);
    const at = { ...this.place(item), content_index: 0 };
    return [...events, this.event("response.output_text.delta", { ...at, delta, logprobs: scores })];
  }

  private reasoning(delta: string): ResponseEvent[] {
    const events: ResponseEvent[] = [];
    let item = this.output.at(-1);
    if (item?.type !== "reasoning") {
      const fresh: Item = { type: "reasoning", id: makeId("rs_"), status: "in_progress", summary: [], content: [] };
      events.push(...this.open(fresh));
      const part = { type: "reasoning_text" as const, text: "" };
      fresh.content.push(part);
      const at = { ...this.place(fresh), content_index: 0 };
      events.push(this.event("response.content_part.added", { ...at, part: { ...part } }));
      item = fresh;
    }
    item.content[0].text += delta;
    return [...events, this.event("response.reasoning_text.delta", { ...this.place(item), content_index: 0, delta })];
  }
}
