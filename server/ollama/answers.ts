/** What Ollama's endpoints answer, as schemas. */
import { z } from "zod";

const nanoseconds = z.int().min(0);
const count = z.int().min(0);

const details = z.object({
  parent_model: z.string(),
  format: z.string(),
  family: z.string(),
  families: z.array(z.string()),
  parameter_size: z.string(),
  quantization_level: z.string(),
});

export const ollamaModels = z.object({
  models: z.array(
    z.object({
      name: z.string(),
      model: z.string(),
      modified_at: z.iso.datetime(),
      size: z.int().min(0),
      size_vram: z.int().min(0),
      digest: z.string(),
      expires_at: z.iso.datetime(),
      details,
    }),
  ),
});

export const ollamaShown = z.object({
  license: z.string(),
  modelfile: z.string(),
  parameters: z.string(),
  template: z.string(),
  details,
  model_info: z.looseObject({ "general.architecture": z.string() }),
  capabilities: z.array(z.enum(["completion", "embedding", "tools", "thinking", "insert"])),
  modified_at: z.iso.datetime(),
});

const logprob = z.object({ token: z.string(), logprob: z.number(), bytes: z.array(z.int()) });

/** Of the last line, or of the whole answer. */
const line = {
  model: z.string(),
  created_at: z.iso.datetime(),
  done: z.boolean(),
  done_reason: z.enum(["stop", "length", "load", "unload"]).optional(),
  total_duration: nanoseconds.optional(),
  load_duration: nanoseconds.optional(),
  prompt_eval_count: count.optional(),
  prompt_eval_duration: nanoseconds.optional(),
  eval_count: count.optional(),
  eval_duration: nanoseconds.optional(),
  logprobs: z.array(logprob.extend({ top_logprobs: z.array(logprob) })).optional(),
};

export const ollamaChatAnswer = z.object({
  ...line,
  message: z.object({
    role: z.literal("assistant"),
    content: z.string(),
    thinking: z.string().optional(),
    tool_calls: z
      .array(z.object({ function: z.object({ name: z.string(), arguments: z.record(z.string(), z.unknown()) }) }))
      .optional(),
  }),
});

export const ollamaGenerateAnswer = z.object({ ...line, response: z.string(), thinking: z.string().optional() });

export const ollamaEmbedAnswer = z.object({
  model: z.string(),
  embeddings: z.array(z.array(z.number())),
  total_duration: nanoseconds,
  load_duration: nanoseconds,
  prompt_eval_count: count,
});
export const ollamaEmbeddingsAnswer = z.object({ embedding: z.array(z.number()) });
export const ollamaVersion = z.object({ version: z.string() });
export const ollamaError = z.object({ error: z.string() });
