/** What the OpenAI-shaped endpoints answer, as schemas: for the OpenAPI document, and for tests that hold answers to it. */
import { z } from "zod";

const tokenLogprob = z.object({ token: z.string(), logprob: z.number(), bytes: z.array(z.int()).nullable() });
const logprobs = z
  .object({
    content: z.array(tokenLogprob.extend({ top_logprobs: z.array(tokenLogprob) })).nullable(),
    refusal: z.null(),
  })
  .nullable();

export const usage = z.object({
  prompt_tokens: z.int().min(0),
  completion_tokens: z.int().min(0),
  total_tokens: z.int().min(0),
  prompt_tokens_details: z.looseObject({ cached_tokens: z.int().min(0) }),
  completion_tokens_details: z.looseObject({ reasoning_tokens: z.int().min(0) }),
});

const toolCall = z.object({
  id: z.string().min(9),
  type: z.literal("function"),
  function: z.object({ name: z.string(), arguments: z.string() }),
});
const finishReason = z.enum(["stop", "length", "tool_calls"]);
const head = { id: z.string(), created: z.int(), model: z.string(), system_fingerprint: z.string() };

export const chatCompletionResponse = z.object({
  ...head,
  object: z.literal("chat.completion"),
  choices: z
    .array(
      z.object({
        index: z.int().min(0),
        message: z.object({
          role: z.literal("assistant"),
          content: z.string().nullable(),
          refusal: z.null(),
          reasoning_content: z.string().optional(),
          tool_calls: z.array(toolCall).min(1).optional(),
        }),
        logprobs,
        finish_reason: finishReason,
      }),
    )
    .min(1),
  usage,
});

export const chatCompletionChunk = z.object({
  ...head,
  object: z.literal("chat.completion.chunk"),
  choices: z
    .array(
      z.object({
        index: z.int().min(0),
        delta: z.object({
          role: z.literal("assistant").optional(),
          content: z.string().nullish(),
          reasoning_content: z.string().optional(),
          tool_calls: z.array(z.looseObject({ index: z.int().min(0) })).optional(),
        }),
        logprobs,
        finish_reason: finishReason.nullable(),
      }),
    )
    .max(1),
  usage: usage.nullish(),
});

export const completionResponse = z.object({
  ...head,
  object: z.literal("text_completion"),
  choices: z
    .array(
      z.object({
        index: z.int().min(0),
        text: z.string(),
        logprobs: z
          .object({
            tokens: z.array(z.string()),
            token_logprobs: z.array(z.number().nullable()),
            top_logprobs: z.array(z.record(z.string(), z.number()).nullable()),
            text_offset: z.array(z.int().min(0)),
          })
          .nullable(),
        finish_reason: z.enum(["stop", "length"]),
      }),
    )
    .min(1),
  usage,
});

export const completionChunk = completionResponse.extend({
  choices: z
    .array(completionResponse.shape.choices.element.extend({ finish_reason: z.enum(["stop", "length"]).nullable() }))
    .max(1),
  usage: usage.nullish(),
});

export const embeddingResponse = z.object({
  object: z.literal("list"),
  model: z.string(),
  data: z.array(
    z.object({
      object: z.literal("embedding"),
      index: z.int().min(0),
      embedding: z.union([z.array(z.number()), z.string()]),
    }),
  ),
  usage: z.object({ prompt_tokens: z.int(), total_tokens: z.int() }),
});

const model = z.object({ id: z.string(), object: z.literal("model"), created: z.int(), owned_by: z.string() });
export const modelResponse = model;
export const modelListResponse = z.object({ object: z.literal("list"), data: z.array(model) });

export const responseResponse = z.looseObject({
  id: z.string(),
  object: z.literal("response"),
  created_at: z.int(),
  status: z.enum(["completed", "incomplete"]),
  model: z.string(),
  output: z.array(z.looseObject({ type: z.enum(["message", "reasoning", "function_call"]), id: z.string() })),
  usage: z.object({
    input_tokens: z.int(),
    input_tokens_details: z.object({ cached_tokens: z.int() }),
    output_tokens: z.int(),
    output_tokens_details: z.object({ reasoning_tokens: z.int() }),
    total_tokens: z.int(),
  }),
});

export const messageResponse = z.object({
  id: z.string(),
  type: z.literal("message"),
  role: z.literal("assistant"),
  model: z.string(),
  content: z.array(z.looseObject({ type: z.enum(["text", "thinking", "tool_use"]) })),
  stop_reason: z.enum(["end_turn", "max_tokens", "stop_sequence", "tool_use"]),
  stop_sequence: z.string().nullable(),
  usage: z.object({
    input_tokens: z.int(),
    output_tokens: z.int(),
    cache_creation_input_tokens: z.int(),
    cache_read_input_tokens: z.int(),
  }),
});

export const countTokensResponse = z.object({ input_tokens: z.int().min(0) });

export const anthropicError = z.object({
  type: z.literal("error"),
  error: z.object({
    type: z.string(),
    message: z.string(),
    details: z.looseObject({ error_code: z.string() }).optional(),
  }),
});

export const errorResponse = z.object({
  error: z.object({
    message: z.string(),
    type: z.string(),
    param: z.string().nullable(),
    code: z.string().nullable(),
  }),
});
