/** Events of an answer as chat completion chunks, and as one chat completion. */
import type { GeneratedToken, Usage } from "../../src/runtime/engine.ts";
import type { Tokenizer } from "../../src/tokenizer/tokenizer.ts";
import { type AnswerEvent, describeToken, type FinalUsage } from "../answer.ts";

/** What every chunk of one response repeats. */
export interface ResponseHead {
  readonly id: string;
  /** Unix seconds. */
  readonly created: number;
  readonly model: string;
  readonly system_fingerprint: string;
}

export interface ToolCallOut {
  readonly id: string;
  readonly type: "function";
  readonly function: { readonly name: string; readonly arguments: string };
}

export function usageOut(usage: Usage & { readonly reasoningTokens?: number }) {
  return {
    prompt_tokens: usage.promptTokens,
    completion_tokens: usage.completionTokens,
    total_tokens: usage.promptTokens + usage.completionTokens,
    prompt_tokens_details: { cached_tokens: usage.cachedTokens, audio_tokens: 0 },
    completion_tokens_details: {
      reasoning_tokens: usage.reasoningTokens ?? 0,
      audio_tokens: 0,
      accepted_prediction_tokens: 0,
      rejected_prediction_tokens: 0,
    },
  };
}

/** Several answers to one prompt: the prompt counts once. */
export function addUsage(all: readonly FinalUsage[]): FinalUsage {
  return all.reduce((sum, next) => ({
    promptTokens: sum.promptTokens,
    cachedTokens: Math.max(sum.cachedTokens, next.cachedTokens),
    completionTokens: sum.completionTokens + next.completionTokens,
    reasoningTokens: sum.reasoningTokens + next.reasoningTokens,
  }));
}

/**
 * Tokens put together are the text: a character of several tokens stands at the last of them, and the space that a
 * tokenizer drops before the first word is not there.
 */
export function logprobsOut(tokenizer: Tokenizer, logprobs: readonly GeneratedToken[] | undefined, text?: string) {
  if (!logprobs) return null;
  const texts = tokenTexts(tokenizer, logprobs);
  if (text !== undefined && texts[0]?.startsWith(" ") && texts.join("") === ` ${text}`) texts[0] = texts[0].slice(1);
  const content = logprobs.map((token, i) => ({
    ...describeToken(tokenizer, token),
    token: texts[i],
    top_logprobs: token.top.map((other) => describeToken(tokenizer, other)),
  }));
  return { content, refusal: null };
}

function tokenTexts(tokenizer: Tokenizer, tokens: readonly GeneratedToken[]): string[] {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  return tokens.map(({ id }, i) => decoder.decode(tokenizer.tokenBytes(id), { stream: i < tokens.length - 1 }));
}

function chunk(
  head: ResponseHead,
  index: number,
  delta: object,
  finish: string | null = null,
  logprobs: unknown = null,
) {
  const { id, created, model, system_fingerprint } = head;
  return {
    id,
    object: "chat.completion.chunk",
    created,
    model,
    system_fingerprint,
    choices: [{ index, delta, logprobs, finish_reason: finish }],
  };
}

export function firstChunk(head: ResponseHead, index: number) {
  return chunk(head, index, { role: "assistant", content: null });
}

/** Where usage was asked for, every chunk has the field, and the last one a value. */
export function withoutUsage<T extends object>(made: T): T & { usage: null } {
  return { ...made, usage: null };
}

export function usageChunk(head: ResponseHead, usage: FinalUsage) {
  const { id, created, model, system_fingerprint } = head;
  return {
    id,
    object: "chat.completion.chunk",
    created,
    model,
    system_fingerprint,
    choices: [],
    usage: usageOut(usage),
  };
}

/** One event of one choice. */
export function toChunk(head: ResponseHead, index: number, event: AnswerEvent, tokenizer: Tokenizer) {
  switch (event.kind) {
    case "text":
      return chunk(head, index, { content: event.text }, null, logprobsOut(tokenizer, event.logprobs, event.text));
    case "reasoning":
      return chunk(head, index, { reasoning_content: event.text });
    case "tool_call": {
      const { id, name } = event;
      const call = { index: event.index, id, type: "function", function: { name, arguments: "" } };
      return chunk(head, index, { tool_calls: [call] });
    }
    case "arguments":
      return chunk(head, index, { tool_calls: [{ index: event.index, function: { arguments: event.text } }] });
    case "finish":
      return chunk(head, index, {}, event.reason);
  }
}

export type FinishEvent = Extract<AnswerEvent, { readonly kind: "finish" }>;

/** An answer put together from its events. */
export interface WholeAnswer {
  readonly text: string;
  readonly reasoning: string;
  readonly toolCalls: readonly ToolCallOut[];
  readonly logprobs: readonly GeneratedToken[] | undefined;
  readonly finish: FinishEvent;
}

export function collect(events: readonly AnswerEvent[]): WholeAnswer {
  let text = "";
  let reasoning = "";
  let logprobs: GeneratedToken[] | undefined;
  const calls: { id: string; name: string; arguments: string }[] = [];
  for (const event of events) {
    if (event.kind === "text") {
      text += event.text;
      if (event.logprobs) (logprobs ??= []).push(...event.logprobs);
    } else if (event.kind === "reasoning") reasoning += event.text;
    else if (event.kind === "tool_call") calls[event.index] = { id: event.id, name: event.name, arguments: "" };
    else if (event.kind === "arguments") calls[event.index].arguments += event.text;
    else if (event.kind === "finish") {
      const toolCalls = calls.map(({ id, name, arguments: args }) => ({
        id,
        type: "function" as const,
        function: { name, arguments: args },
      }));
      return { text, reasoning, toolCalls, logprobs, finish: event };
    }
  }
  throw new Error("the answer ended without its last event");
}

export function toCompletion(
  head: ResponseHead,
  answers: readonly WholeAnswer[],
  tokenizer: Tokenizer,
  logprobs: boolean,
) {
  const { id, created, model, system_fingerprint } = head;
  return {
    id,
    object: "chat.completion",
    created,
    model,
    system_fingerprint,
    choices: answers.map((answer, index) => ({
      index,
      message: {
        role: "assistant",
        content: answer.text === "" && answer.toolCalls.length > 0 ? null : answer.text,
        refusal: null,
        ...(answer.reasoning === "" ? {} : { reasoning_content: answer.reasoning }),
        ...(answer.toolCalls.length === 0 ? {} : { tool_calls: answer.toolCalls }),
      },
      logprobs: logprobs ? logprobsOut(tokenizer, answer.logprobs ?? [], answer.text) : null,
      finish_reason: answer.finish.reason,
    })),
    usage: usageOut(addUsage(answers.map(({ finish }) => finish.usage))),
  };
}

/** Where an API wants arguments as an object; a call that max_tokens cut has none that can be read. */
export function parsedArguments(text: string): Record<string, unknown> {
  try {
    const value: unknown = JSON.parse(text);
    return typeof value === "object" && value !== null && !Array.isArray(value)
      ? (value as Record<string, unknown>)
      : {};
  } catch {
    return {};
  }
}
