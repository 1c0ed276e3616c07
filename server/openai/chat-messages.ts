/** Messages as OpenAI's clients send them, and as chat templates read them. */
import { z } from "zod";
import type { ChatMessage } from "../../src/tokenizer/tokenizer.ts";
import { refuse } from "./errors.ts";

/** Checked apart from its type, so that an image is refused as an image. */
const part = z.looseObject({ type: z.string() });
const content = z.union([z.string(), z.array(part)]);
export const toolCall = z.object({
  id: z.string(),
  type: z.string().optional(), // "function"; some clients leave it out of replayed history
  function: z.object({ name: z.string().min(1), arguments: z.string() }),
});

const system = z.object({ role: z.enum(["system", "developer"]), content, name: z.string().nullish() });
const user = z.object({ role: z.literal("user"), content, name: z.string().nullish() });
const assistant = z.object({
  role: z.literal("assistant"),
  content: content.nullish(),
  name: z.string().nullish(),
  refusal: z.string().nullish(),
  reasoning_content: z.string().nullish(),
  tool_calls: z.array(toolCall).nullish(),
});
const tool = z.object({ role: z.literal("tool"), content, tool_call_id: z.string(), name: z.string().nullish() });

export const message = z.discriminatedUnion("role", [system, user, assistant, tool]);
export type Message = z.infer<typeof message>;

/** Template messages: developer is system, parts are one text, arguments are objects. */
export function toTemplateMessages(messages: readonly Message[], template: string | undefined): ChatMessage[] {
  const knowsDeveloper = template?.includes("developer") ?? false;
  return messages.map((item, index) => {
    const text = plainText(item.content, `messages[${index}].content`);
    if (item.role === "developer" && !knowsDeveloper) return named(item, { role: "system", content: text });
    if (item.role === "tool") return named(item, { role: "tool", content: text, tool_call_id: item.tool_call_id });
    if (item.role !== "assistant") return named(item, { role: item.role, content: text });
    const calls = item.tool_calls ?? [];
    return named(item, {
      role: "assistant",
      content: item.content === null || item.content === undefined ? "" : text,
      ...(item.reasoning_content ? { reasoning_content: item.reasoning_content } : {}),
      ...(calls.length > 0 ? { tool_calls: calls.map(templateCall) } : {}),
    });
  });
}

function named(item: Message, templateMessage: ChatMessage): ChatMessage {
  return item.name ? { ...templateMessage, name: item.name } : templateMessage;
}

/** Templates write `arguments | tojson`, so they want the object; what is no JSON stays text and harms nobody. */
function templateCall(call: z.infer<typeof toolCall>): unknown {
  const { name, arguments: text } = call.function;
  return { id: call.id, type: "function", function: { name, arguments: parsedOr(text) } };
}

function parsedOr(text: string): unknown {
  try {
    const value: unknown = JSON.parse(text === "" ? "{}" : text);
    return typeof value === "object" && value !== null ? value : text;
  } catch {
    return text;
  }
}

/** Parts of text, joined by line breaks as llama.cpp and vLLM join them. */
function plainText(value: Message["content"], param: string): string {
  if (value === null || value === undefined) return "";
  if (typeof value === "string") return value;
  return value
    .map((item, index) => {
      const text = item.type === "refusal" ? item.refusal : item.text;
      if (item.type === "text" || item.type === "refusal") {
        if (typeof text === "string") return text;
        throw refuse(
          `${param}[${index}]`,
          `Invalid value for '${param}[${index}]': its text is missing.`,
          "invalid_value",
        );
      }
      throw refuse(
        `${param}[${index}].type`,
        `Content parts of type '${item.type.slice(0, 32)}' are not supported: this server's models read text.`,
        "unsupported_value",
      );
    })
    .join("\n");
}
