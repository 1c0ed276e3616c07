/** Anthropic's Messages API: a request in the engine's terms, an answer as content blocks. */
import { z } from "zod";
import type { Engine } from "../../src/runtime/engine.ts";
import type { ChatMessage } from "../../src/tokenizer/tokenizer.ts";
import type { ChatJob, FinalUsage, ToolUse } from "../answer.ts";
import { requireGrammar } from "../grammar.ts";
import { parsedArguments, type WholeAnswer } from "../openai/chat-response.ts";
import { badValue, refuse } from "../openai/errors.ts";
import { acceptFields } from "../openai/fields.ts";
import { jsonSchema } from "../openai/response-format.ts";
import { defined, tokenCount } from "../openai/sampling.ts";
import { MAX_TOOLS, templateTools, toolUse } from "../openai/tools.ts";

/** Checked by type later, so that an image is refused as an image. */
const block = z.looseObject({ type: z.string() });
const content = z.union([z.string(), z.array(block)]);
const tool = z.looseObject({
  type: z.string().nullish(),
  name: z.string().regex(/^[a-zA-Z0-9_-]{1,128}$/),
  description: z.string().nullish(),
  input_schema: jsonSchema.optional(),
  strict: z.boolean().nullish(),
});

export const messagesRequest = z.object({
  model: z.string(),
  messages: z.array(z.object({ role: z.enum(["user", "assistant", "system"]), content })).min(1),
  system: content.optional(),
  max_tokens: tokenCount,
  stop_sequences: z.array(z.string()).max(32).optional(),
  stream: z.boolean().optional(),
  temperature: z.number().min(0).max(1).optional(),
  top_p: z.number().min(0).max(1).optional(),
  top_k: z.int().min(0).optional(),
  tools: z.array(tool).max(MAX_TOOLS).optional(),
  tool_choice: z
    .object({
      type: z.enum(["auto", "any", "tool", "none"]),
      name: z.string().optional(),
      disable_parallel_tool_use: z.boolean().nullish(),
    })
    .optional(),
  thinking: z
    .object({ type: z.enum(["enabled", "disabled", "adaptive"]), budget_tokens: z.int().optional() })
    .optional(),
  output_config: z
    .object({
      effort: z.string().nullish(),
      format: z.object({ type: z.literal("json_schema"), schema: jsonSchema }).nullish(),
    })
    .optional(),
});
export type MessagesRequest = z.infer<typeof messagesRequest>;

/** Counting needs no `max_tokens`; the tokens it would allow make no difference. */
export function parseMessagesRequest(body: Readonly<Record<string, unknown>>, countOnly = false): MessagesRequest {
  const accepted = acceptFields("/v1/messages", body);
  return messagesRequest.parse(countOnly ? { max_tokens: 1, ...accepted } : accepted);
}

export function messagesJob(request: MessagesRequest, _engine: Engine): ChatJob {
  const use = messagesTools(request);
  const format = request.output_config?.format;
  return {
    messages: toTemplateMessages(request),
    template: defined({
      tools: use && templateTools(use),
      kwargs: request.thinking && { enable_thinking: request.thinking.type !== "disabled" },
    }),
    generate: defined({
      maxTokens: request.max_tokens,
      temperature: request.temperature,
      topP: request.top_p,
      topK: request.top_k,
      stop: request.stop_sequences?.filter((text) => text !== ""),
      grammar: format
        ? requireGrammar({ kind: "json_schema", schema: format.schema, strict: true }, "output_config.format.schema")
        : undefined,
    }),
    tools: use,
    splitReasoning: true,
  };
}

function messagesTools({ tools, tool_choice: choice }: MessagesRequest): ToolUse | undefined {
  const definitions = tools?.map((item, index) => {
    if (item.type && item.type !== "custom") {
      const message = `Tools of type '${item.type.slice(0, 64)}' are not supported: this server runs no tools itself.`;
      throw refuse(`tools.${index}.type`, message, "unsupported_value");
    }
    const { name, description, input_schema: parameters = { type: "object", properties: {} }, strict } = item;
    return { name, ...(description ? { description } : {}), parameters, ...(strict ? { strict } : {}) };
  });
  const parallel = !choice?.disable_parallel_tool_use;
  if (choice?.type === "tool") {
    if (choice.name === undefined) throw badValue("tool_choice.name", "tool_choice.name: field required.");
    return toolUse(definitions, { type: "function", function: { name: choice.name } }, parallel);
  }
  return toolUse(
    definitions,
    choice?.type === "any" ? "required" : choice?.type === "none" ? "none" : "auto",
    parallel,
  );
}

function toTemplateMessages(request: MessagesRequest): ChatMessage[] {
  const system = request.system === undefined ? [] : [{ role: "system", content: textOf(request.system, "system") }];
  return [
    ...system,
    ...request.messages.flatMap((message, index) => fromMessage(message, `messages.${index}.content`)),
  ];
}

/** One message of blocks is one or several of a template: each tool result is a message of its own. */
function fromMessage({ role, content: given }: MessagesRequest["messages"][number], param: string): ChatMessage[] {
  if (typeof given === "string") return [{ role, content: given }];
  const messages: ChatMessage[] = [];
  const texts: string[] = [];
  const calls: unknown[] = [];
  let thoughts = "";
  given.forEach((item, index) => {
    const where = `${param}.${index}`;
    if (item.type === "text") texts.push(requireText(item.text, `${where}.text`));
    else if (item.type === "thinking" && role === "assistant")
      thoughts += requireText(item.thinking, `${where}.thinking`);
    else if (item.type === "redacted_thinking") return;
    else if (item.type === "tool_use" && role === "assistant") {
      const name = requireText(item.name, `${where}.name`);
      calls.push({ id: item.id, type: "function", function: { name, arguments: item.input ?? {} } });
    } else if (item.type === "tool_result" && role === "user") {
      const result =
        item.content === undefined || item.content === null ? "" : textOf(item.content as string, `${where}.content`);
      messages.push({
        role: "tool",
        tool_call_id: requireText(item.tool_use_id, `${where}.tool_use_id`),
        content: result,
      });
    } else throw unsupportedBlock(item.type, where);
  });
  if (texts.length > 0 || messages.length === 0) {
    const content = texts.join("\n");
    messages.push({
      role,
      content,
      ...(thoughts === "" ? {} : { reasoning_content: thoughts }),
      ...(calls.length === 0 ? {} : { tool_calls: calls }),
    });
  }
  return messages;
}

function textOf(given: z.infer<typeof content>, param: string): string {
  if (typeof given === "string") return given;
  if (!Array.isArray(given)) throw badValue(param, `${param}: has to be a string or a list of text blocks.`);
  return given
    .map((item, index) => {
      if (item?.type !== "text") throw unsupportedBlock(String(item?.type), `${param}.${index}`);
      return requireText(item.text, `${param}.${index}.text`);
    })
    .join("\n");
}

function requireText(value: unknown, param: string): string {
  if (typeof value === "string") return value;
  throw badValue(param, `${param}: has to be a string.`);
}

function unsupportedBlock(type: string, param: string): Error {
  return refuse(
    `${param}.type`,
    `${param}: blocks of type '${type.slice(0, 32)}' are not supported here.`,
    "unsupported_value",
  );
}

export function messagesUsage({ promptTokens, cachedTokens, completionTokens }: Omit<FinalUsage, "reasoningTokens">) {
  return {
    input_tokens: promptTokens - cachedTokens,
    output_tokens: completionTokens,
    cache_creation_input_tokens: 0,
    cache_read_input_tokens: cachedTokens,
  };
}

export function stopReason({ finish }: Pick<WholeAnswer, "finish">): string {
  if (finish.reason === "tool_calls") return "tool_use";
  if (finish.reason === "length") return "max_tokens";
  return finish.stopString === undefined ? "end_turn" : "stop_sequence";
}

export function toMessage(id: string, model: string, answer: WholeAnswer) {
  const { text, reasoning, toolCalls, finish } = answer;
  return {
    id,
    type: "message",
    role: "assistant",
    model,
    content: [
      ...(reasoning === "" ? [] : [{ type: "thinking", thinking: reasoning, signature: "" }]),
      ...(text === "" && toolCalls.length > 0 ? [] : [{ type: "text", text, citations: null }]),
      ...toolCalls.map((call) => ({
        type: "tool_use",
        id: call.id,
        name: call.function.name,
        input: parsedArguments(call.function.arguments),
      })),
    ],
    stop_reason: stopReason(answer),
    stop_sequence: finish.stopString ?? null,
    usage: messagesUsage(finish.usage),
  };
}
