/** The Responses API's request in the engine's terms. Nothing is stored, so the whole conversation comes as input. */
import { z } from "zod";
import type { Engine } from "../../src/runtime/engine.ts";
import type { ChatJob, ToolDefinition } from "../answer.ts";
import { type Message, toTemplateMessages } from "./chat-messages.ts";
import { reasoningEffort, templateVariables } from "./chat-request.ts";
import { badValue, refuse } from "./errors.ts";
import { acceptFields } from "./fields.ts";
import { grammarOf, type ResponseFormat, textFormat } from "./response-format.ts";
import { defined, tokenCount } from "./sampling.ts";
import { MAX_TOOLS, parseTool, templateTools, toolUse } from "./tools.ts";

const item = z.looseObject({ type: z.string().optional() });
const tool = z.looseObject({ type: z.string() });
const toolChoice = z.union([
  z.enum(["none", "auto", "required"]),
  z.object({ type: z.literal("function"), name: z.string() }),
  z.object({
    type: z.literal("allowed_tools"),
    mode: z.enum(["auto", "required"]),
    tools: z.array(z.looseObject({ name: z.string().optional() })),
  }),
]);

export const responsesRequest = z.object({
  model: z.string().optional(),
  input: z.union([z.string(), z.array(item).min(1)]),
  instructions: z.string().optional(),
  max_output_tokens: tokenCount.optional(),
  stream: z.boolean().optional(),
  temperature: z.number().min(0).max(2).optional(),
  top_p: z.number().min(0).max(1).optional(),
  top_logprobs: z.int().min(0).max(20).optional(),
  text: z.object({ format: textFormat.nullish(), verbosity: z.literal("medium").nullish() }).optional(),
  tools: z.array(tool).max(MAX_TOOLS).optional(),
  tool_choice: toolChoice.optional(),
  parallel_tool_calls: z.boolean().optional(),
  reasoning: z.looseObject({ effort: reasoningEffort.nullish() }).optional(),
  include: z.array(z.string()).optional(),
  metadata: z.record(z.string(), z.string()).optional(),
  store: z.boolean().optional(),
});
export type ResponsesRequest = z.infer<typeof responsesRequest>;

const INCLUDES = ["message.output_text.logprobs", "reasoning.encrypted_content"];

export function parseResponsesRequest(body: Readonly<Record<string, unknown>>): ResponsesRequest {
  const request = responsesRequest.parse(acceptFields("/v1/responses", body));
  const wrong = request.include?.find((name) => !INCLUDES.includes(name));
  if (wrong !== undefined) throw refuse("include", `'${wrong.slice(0, 64)}' cannot be included.`, "unsupported_value");
  return request;
}

export function wantsLogprobs(request: ResponsesRequest): boolean {
  return request.top_logprobs !== undefined || (request.include?.includes(INCLUDES[0]) ?? false);
}

export function responsesJob(request: ResponsesRequest, engine: Engine): ChatJob {
  const use = toolUse(
    request.tools?.map(flatTool),
    nestedChoice(request.tool_choice),
    request.parallel_tool_calls ?? true,
  );
  const format = request.text?.format;
  const instructions: Message[] = request.instructions ? [{ role: "system", content: request.instructions }] : [];
  return {
    messages: toTemplateMessages([...instructions, ...inputMessages(request.input)], engine.tokenizer.chatTemplate),
    template: defined({
      tools: use && templateTools(use),
      kwargs: templateVariables(request.reasoning?.effort ?? undefined),
    }),
    generate: defined({
      maxTokens: request.max_output_tokens,
      temperature: request.temperature,
      topP: request.top_p,
      topLogprobs: wantsLogprobs(request) ? (request.top_logprobs ?? 0) : undefined,
      grammar: format ? grammarOf(nestedFormat(format), "text.format") : undefined,
    }),
    tools: use,
    splitReasoning: true,
  };
}

function nestedFormat(format: z.infer<typeof textFormat>): ResponseFormat {
  if (format.type !== "json_schema") return format;
  const { name, schema, strict } = format;
  return { type: "json_schema", json_schema: { name, schema, strict } };
}

function flatTool(given: z.infer<typeof tool>, index: number): ToolDefinition {
  const { type, name, description, parameters, strict } = given;
  return parseTool({ type, function: { name, description, parameters, strict } }, index);
}

function nestedChoice(choice: ResponsesRequest["tool_choice"]): Parameters<typeof toolUse>[1] {
  if (choice === undefined || typeof choice === "string") return choice;
  if (choice.type === "function") return { type: "function", function: { name: choice.name } };
  const tools = choice.tools.map(({ name = "" }) => ({ function: { name } }));
  return { type: "allowed_tools", allowed_tools: { mode: choice.mode, tools } };
}

const inputMessage = z.object({
  role: z.enum(["user", "assistant", "system", "developer"]),
  content: z.union([z.string(), z.array(z.looseObject({ type: z.string() }))]),
});
const functionCall = z.object({ call_id: z.string(), name: z.string().min(1), arguments: z.string() });
const functionOutput = z.object({
  call_id: z.string(),
  output: z.union([z.string(), z.array(z.looseObject({ type: z.string() }))]),
});

/** Calls that follow each other are one assistant message, as templates want them. */
function inputMessages(input: ResponsesRequest["input"]): Message[] {
  if (typeof input === "string") return [{ role: "user", content: input }];
  const messages: Message[] = [];
  let thoughts: string | undefined;
  input.forEach((given, index) => {
    const param = `input[${index}]`;
    const { type = "message" } = given;
    const last = messages.at(-1);
    if (type === "message") {
      const { role, content } = parseItem(inputMessage, given, param);
      const message: Message = { role, content: textParts(content, `${param}.content`) } as Message;
      messages.push(
        role === "assistant" && thoughts ? ({ ...message, reasoning_content: thoughts } as Message) : message,
      );
      thoughts = undefined;
    } else if (type === "function_call") {
      const { call_id: id, name, arguments: args } = parseItem(functionCall, given, param);
      const call = { id, type: "function", function: { name, arguments: args } };
      if (last?.role === "assistant" && last.tool_calls) last.tool_calls.push(call);
      else messages.push({ role: "assistant", content: null, reasoning_content: thoughts, tool_calls: [call] });
      thoughts = undefined;
    } else if (type === "function_call_output") {
      const { call_id, output } = parseItem(functionOutput, given, param);
      messages.push({ role: "tool", tool_call_id: call_id, content: textParts(output, `${param}.output`) });
    } else if (type === "reasoning") {
      const parts = Array.isArray(given.content) ? (given.content as { text?: unknown }[]) : [];
      thoughts = parts.map((part) => (typeof part?.text === "string" ? part.text : "")).join("");
    } else {
      const message = `Items of type '${type.slice(0, 64)}' are not supported in 'input'.`;
      throw refuse(`${param}.type`, message, "unsupported_value");
    }
  });
  return messages;
}

function parseItem<T>(schema: z.ZodType<T>, given: unknown, param: string): T {
  const parsed = schema.safeParse(given);
  if (parsed.success) return parsed.data;
  const { path, message } = parsed.error.issues[0];
  const where = [param, ...path].join(".");
  throw badValue(where, `Invalid value for '${where}': ${message}.`);
}

/** `input_text` and `output_text` are what chat completions call `text`. */
function textParts(content: z.infer<typeof inputMessage>["content"], param: string) {
  if (typeof content === "string") return content;
  return content.map((part, index) => {
    if (part.type === "input_text" || part.type === "output_text") return { ...part, type: "text" };
    if (part.type === "refusal") return part;
    const message = `Content parts of type '${part.type.slice(0, 32)}' are not supported: this server's models read text.`;
    throw refuse(`${param}[${index}].type`, message, "unsupported_value");
  });
}
