/** Ollama's chat and generate requests in the engine's terms. Options that it alone knows have no effect, as there. */
import { z } from "zod";
import type { Engine, GenerateOptions } from "../../src/runtime/engine.ts";
import type { ChatJob } from "../answer.ts";
import { requireGrammar } from "../grammar.ts";
import { badValue, refuse } from "../openai/errors.ts";
import { jsonSchema } from "../openai/response-format.ts";
import { defined } from "../openai/sampling.ts";
import { parseTool, templateTools, tool, toolUse } from "../openai/tools.ts";

const number = (least: number, most: number) => z.number().min(least).max(most).nullish();

const options = z.object({
  num_predict: z.int().min(-2).nullish(), // -1 and -2: until it ends
  temperature: number(0, 5),
  top_k: z.int().min(0).nullish(),
  top_p: number(0, 1),
  min_p: number(0, 1),
  repeat_penalty: z.number().gt(0).max(10).nullish(),
  presence_penalty: number(-2, 2),
  frequency_penalty: number(-2, 2),
  seed: z.int().nullish(),
  stop: z.union([z.string(), z.array(z.string()).max(32)]).nullish(),
});

const think = z.union([z.boolean(), z.enum(["low", "medium", "high", "max"])]).nullish();
const format = z.union([z.literal(""), z.literal("json"), jsonSchema]).nullish();
const shared = {
  model: z.string(),
  stream: z.boolean().nullish(),
  format,
  options: options.nullish(),
  think,
  /** 0 unloads; other times have no effect: the server's --idle-unload decides. */
  keep_alive: z.union([z.string(), z.number()]).nullish(),
  logprobs: z.boolean().nullish(),
  top_logprobs: z.int().min(0).max(20).nullish(),
};

const message = z.object({
  role: z.enum(["system", "user", "assistant", "tool"]),
  content: z.string().nullish(),
  thinking: z.string().nullish(),
  images: z.array(z.unknown()).nullish(),
  tool_calls: z
    .array(z.object({ function: z.object({ name: z.string(), arguments: z.record(z.string(), z.unknown()) }) }))
    .nullish(),
  tool_name: z.string().nullish(),
  tool_call_id: z.string().nullish(),
});

export const ollamaChat = z.object({ ...shared, messages: z.array(message).nullish(), tools: z.array(tool).nullish() });
export const ollamaGenerate = z.object({
  ...shared,
  prompt: z.string().nullish(),
  suffix: z.string().nullish(),
  system: z.string().nullish(),
  raw: z.boolean().nullish(),
  images: z.array(z.unknown()).nullish(),
  template: z.string().nullish(),
  context: z.array(z.int()).nullish(),
});
export const ollamaEmbed = z.object({
  model: z.string(),
  input: z.union([z.string(), z.array(z.string())]),
  truncate: z.boolean().nullish(),
  dimensions: z.int().min(1).nullish(),
});
export const ollamaEmbeddings = z.object({ model: z.string(), prompt: z.string() });
export const ollamaShow = z.object({
  model: z.string().optional(),
  name: z.string().optional(),
  verbose: z.boolean().nullish(),
});

type Shared = Pick<z.infer<typeof ollamaChat>, keyof typeof shared>;

export function ollamaOptions(request: Shared): GenerateOptions {
  const given = request.options ?? {};
  const value = <T>(item: T | null | undefined): T | undefined => item ?? undefined;
  const limit = given.num_predict ?? -1;
  return defined({
    maxTokens: limit >= 0 ? limit : undefined,
    temperature: value(given.temperature),
    topK: value(given.top_k),
    topP: value(given.top_p),
    minP: value(given.min_p),
    repetitionPenalty: value(given.repeat_penalty),
    presencePenalty: value(given.presence_penalty),
    frequencyPenalty: value(given.frequency_penalty),
    seed: value(given.seed),
    stop: typeof given.stop === "string" ? [given.stop] : value(given.stop)?.filter((text) => text !== ""),
    topLogprobs: request.logprobs ? (request.top_logprobs ?? 0) : undefined,
    grammar: grammarOf(request.format),
  });
}

function grammarOf(given: z.infer<typeof format>) {
  if (given === undefined || given === null || given === "") return undefined;
  if (given === "json") return requireGrammar({ kind: "json_object" }, "format");
  return requireGrammar({ kind: "json_schema", schema: given }, "format");
}

function variables(given: z.infer<typeof think>): Record<string, unknown> | undefined {
  if (given === undefined || given === null) return undefined;
  return { enable_thinking: given !== false, ...(typeof given === "string" ? { reasoning_effort: given } : {}) };
}

export function chatJob(request: z.infer<typeof ollamaChat>, _engine: Engine): ChatJob {
  const messages = request.messages ?? [];
  if (messages.length === 0) throw badValue("messages", "messages: at least one is needed.");
  const use = toolUse(request.tools?.map(parseTool), "auto", true);
  return {
    messages: messages.map((item, index) => {
      refuseImages(item.images, `messages[${index}].images`);
      const calls = item.tool_calls?.map((call, at) => ({ id: `call_${index}_${at}`, type: "function", ...call }));
      return {
        role: item.role,
        content: item.content ?? "",
        ...(item.thinking ? { reasoning_content: item.thinking } : {}),
        ...(calls?.length ? { tool_calls: calls } : {}),
        ...(item.tool_name ? { name: item.tool_name } : {}),
        ...(item.tool_call_id ? { tool_call_id: item.tool_call_id } : {}),
      };
    }),
    template: defined({ tools: use && templateTools(use), kwargs: variables(request.think) }),
    generate: ollamaOptions(request),
    tools: use,
    splitReasoning: true,
  };
}

export function generateJob(request: z.infer<typeof ollamaGenerate>): ChatJob {
  refuseImages(request.images, "images");
  const system = request.system ? [{ role: "system", content: request.system }] : [];
  return {
    messages: [...system, { role: "user", content: request.prompt ?? "" }],
    template: defined({ kwargs: variables(request.think) }),
    generate: ollamaOptions(request),
    splitReasoning: true,
  };
}

export function refuseImages(images: readonly unknown[] | null | undefined, param: string): void {
  if (images?.length)
    throw refuse(param, "Images are not supported: this server's models read text.", "unsupported_value");
}
