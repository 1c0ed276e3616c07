/** One answer, made in the page or on the server: text as it comes, and its numbers at the end. */
import type { SamplingOptions } from "../src/runtime/engine.ts";
import type { ChatMessage } from "../src/tokenizer/tokenizer.ts";
import type { Prompt } from "../src/web/protocol.ts";
import { answeringServed, engine, model, refreshServer } from "./app.ts";
import type { Message, MessageStats } from "./conversations.ts";
import { answerFromServer } from "./server-backend.ts";
import { type Settings, settings } from "./settings.ts";

export function samplingOf(chosen: Settings): SamplingOptions & { maxTokens: number } {
  const { temperature, topK, topP, minP, repetitionPenalty, maxTokens, seed } = chosen;
  const sampling = { temperature, topK, topP, minP, repetitionPenalty, maxTokens };
  return seed === "" ? sampling : { ...sampling, seed: Number(seed) };
}

/** An answer takes at most this share of a small model's context, so that a conversation can go on. */
const ANSWER_SHARE = 0.25;

/** The settings' longest answer, or less where the context is small. */
function longestAnswer(chosen: Settings, contextLength = Number.POSITIVE_INFINITY): number {
  return Math.min(chosen.maxTokens, Math.max(1, Math.floor(contextLength * ANSWER_SHARE)));
}

/** Where the next answer is made: "stories260K · wasm", or undefined when there is nothing to ask. */
export function answeredBy(): string | undefined {
  const served = answeringServed();
  if (served) return `${served.id} · server`;
  const loaded = model.value;
  return loaded && `${loaded.info.id} · ${loaded.choice.device}`;
}

function chatMessages(messages: readonly Message[], system: string): ChatMessage[] {
  const said = messages.map(({ role, content }) => ({ role, content }));
  return system ? [{ role: "system", content: system }, ...said] : said;
}

/** A base model has no chat template: it goes on from the last text, so the conversation is one text. */
export function promptOf(messages: readonly Message[], system: string, hasChatTemplate: boolean): Prompt {
  if (!hasChatTemplate) return { kind: "text", text: messages.map(({ content }) => content).join("") };
  return { kind: "chat", messages: chatMessages(messages, system) };
}

/** Appends to `message` as pieces come, calling `onText` after each; sets its stats at the end. */
export async function answer(
  history: readonly Message[],
  message: Message,
  onText: () => void,
  signal: AbortSignal,
): Promise<void> {
  const served = answeringServed();
  const context = served ? served.contextLength : model.value!.info.contextLength;
  const chosen = { ...settings.value, maxTokens: longestAnswer(settings.value, context) };
  const pieces = served
    ? answerFromServer(served.id, chatMessages(history, chosen.system), chosen, signal)
    : engine.generate(promptOf(history, chosen.system, model.value!.hasChatTemplate), {
        ...samplingOf(chosen),
        signal,
      });
  const by = answeredBy()!;
  const started = performance.now();
  let first = 0;
  let seen = 0;
  let usage: { promptTokens: number; completionTokens: number } | undefined;
  for await (const piece of pieces) {
    if (first === 0 && (piece.text || piece.tokens.length)) first = performance.now();
    seen += piece.tokens.length;
    message.content += piece.text;
    usage = piece.usage ?? usage;
    onText();
  }
  if (served && context === undefined) await refreshServer(); // it has loaded the model now
  const completionTokens = usage?.completionTokens ?? seen;
  if (first === 0) return;
  // The first token belongs to the prefill: the rate is that of the tokens after it.
  const decodeSeconds = (performance.now() - first) / 1000;
  const stats: MessageStats = {
    tokensPerSecond: completionTokens > 1 && decodeSeconds > 0 ? (completionTokens - 1) / decodeSeconds : 0,
    firstTokenMs: first - started,
    promptTokens: usage?.promptTokens ?? 0,
    completionTokens,
    by,
  };
  message.stats = stats;
}
