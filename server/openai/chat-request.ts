/** A chat completion request: its schema, and its way into the engine's terms. */
import { z } from "zod";
import type { Engine } from "../../src/runtime/engine.ts";
import type { ChatJob } from "../answer.ts";
import { message, toTemplateMessages } from "./chat-messages.ts";
import { badValue } from "./errors.ts";
import { acceptFields } from "./fields.ts";
import { checkStream, defined, samplingFields, samplingOptions, streamFields, tokenCount } from "./sampling.ts";
import { MAX_TOOLS, parseTool, templateTools, tool, toolChoice, toolUse } from "./tools.ts";

export const reasoningEffort = z.enum(["none", "minimal", "low", "medium", "high", "xhigh", "max"]);

export const chatRequest = z.object({
  model: z.string().optional(),
  messages: z.array(message).min(1),
  max_tokens: tokenCount.optional(),
  max_completion_tokens: tokenCount.optional(),
  logprobs: z.boolean().optional(),
  top_logprobs: z.int().min(0).max(20).optional(),
  tools: z.array(tool).max(MAX_TOOLS).optional(),
  tool_choice: toolChoice.optional(),
  parallel_tool_calls: z.boolean().optional(),
  reasoning_effort: reasoningEffort.optional(),
  reasoning_format: z.enum(["none", "auto", "deepseek"]).optional(),
  chat_template_kwargs: z.record(z.string(), z.unknown()).optional(),
  ...streamFields,
  ...samplingFields,
});
export type ChatRequest = z.infer<typeof chatRequest>;

export function parseChatRequest(body: Readonly<Record<string, unknown>>): ChatRequest {
  const request = chatRequest.parse(acceptFields("/v1/chat/completions", body));
  checkStream(request);
  if (request.top_logprobs !== undefined && !request.logprobs) {
    throw badValue("top_logprobs", "The 'top_logprobs' parameter is only allowed when 'logprobs' is enabled.");
  }
  return request;
}

export function toChatJob(request: ChatRequest, engine: Engine): ChatJob {
  const { tokenizer, info } = engine;
  const use = toolUse(request.tools?.map(parseTool), request.tool_choice, request.parallel_tool_calls ?? true);
  return {
    messages: toTemplateMessages(request.messages, tokenizer.chatTemplate),
    template: defined({
      tools: use && templateTools(use),
      kwargs: templateVariables(request.reasoning_effort, request.chat_template_kwargs),
    }),
    generate: defined({
      ...samplingOptions(request, info.vocabSize),
      maxTokens: request.max_completion_tokens ?? request.max_tokens,
      topLogprobs: request.logprobs ? (request.top_logprobs ?? 0) : undefined,
    }),
    tools: use,
    splitReasoning: request.reasoning_format !== "none",
  };
}

/** `enable_thinking` is what Qwen3, SmolLM3, GLM and Granite templates call the switch. */
export function templateVariables(
  effort: z.infer<typeof reasoningEffort> | undefined,
  variables: Readonly<Record<string, unknown>> = {},
): Record<string, unknown> | undefined {
  const thinking = effort === undefined ? {} : { enable_thinking: effort !== "none", reasoning_effort: effort };
  const all = { ...thinking, ...variables };
  return Object.keys(all).length === 0 ? undefined : all;
}
