/** Tools for templates that know none: the model is told of them, and sees its earlier calls, as plain text. */
import type { ChatMessage } from "../src/tokenizer/tokenizer.ts";
import type { ToolDefinition } from "./answer.ts";

export function knowsTools(template: string | undefined): boolean {
  return template?.includes("tools") ?? false;
}

/** The calls are spelled as `src/tokenizer/tool-formats.ts` reads them where no template says otherwise. */
export function describeTools(messages: readonly ChatMessage[], tools: readonly ToolDefinition[]): ChatMessage[] {
  const list = tools.map(({ name, description, parameters }) => JSON.stringify({ name, description, parameters }));
  const text = [
    "You can call these functions:",
    ...list,
    'To call one, answer with nothing but JSON: {"name": "<function>", "arguments": {<its arguments>}}',
  ].join("\n");
  const [first, ...rest] = messages;
  const plain = (message: ChatMessage): ChatMessage => callsAsText(message);
  if (first?.role !== "system") return [{ role: "system", content: text }, ...messages.map(plain)];
  return [{ ...first, content: `${String(first.content)}\n\n${text}` }, ...rest.map(plain)];
}

function callsAsText(message: ChatMessage): ChatMessage {
  const { tool_calls: calls, ...rest } = message;
  if (!Array.isArray(calls)) return message;
  const lines = calls.map((call: { function?: unknown }) => JSON.stringify(call.function));
  return { ...rest, content: [message.content, ...lines].filter((line) => line !== "").join("\n") };
}
