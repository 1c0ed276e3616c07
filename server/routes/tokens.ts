/** POST /tokenize, /detokenize and /apply-template, as llama.cpp's server has them. */

import type { Context } from "hono";
import { Hono } from "hono";
import { z } from "zod";
import type { Engine } from "../../src/runtime/engine.ts";
import { describeToken, renderPrompt } from "../answer.ts";
import { body, requestFacts, type ServerContext } from "../context.ts";
import { parseChatRequest, toChatJob } from "../openai/chat-request.ts";
import { requireIds } from "../openai/prompts.ts";

export const tokenizeRequest = z.object({
  model: z.string().optional(),
  content: z.string(),
  add_special: z.boolean().optional(),
  with_pieces: z.boolean().optional(),
});
export const detokenizeRequest = z.object({
  model: z.string().optional(),
  tokens: z.array(z.int().min(0)),
});

export const tokenizeAnswer = z.object({
  tokens: z.array(
    z.union([z.int().min(0), z.object({ id: z.int().min(0), piece: z.union([z.string(), z.array(z.int())]) })]),
  ),
  count: z.int().min(0),
  max_model_len: z.int().min(1),
});
export const detokenizeAnswer = z.object({ content: z.string(), prompt: z.string() });
export const templateAnswer = z.object({ prompt: z.string() });

export function tokens(context: ServerContext): Hono {
  return new Hono()
    .post("/tokenize", async (c) => {
      const { prompt, text, ...rest } = await body(c, context); // vLLM calls it prompt, some clients text
      const request = tokenizeRequest.parse({ content: prompt ?? text, ...rest });
      return withEngine(c, context, request.model, ({ tokenizer, info }) => {
        const ids = tokenizer.encode(request.content, { addSpecialTokens: request.add_special ?? false });
        const pieces = (id: number) => {
          const { token, bytes } = describeToken(tokenizer, { id, logprob: 0 });
          return { id, piece: token.includes("\ufffd") ? bytes : token };
        };
        const shown = request.with_pieces ? ids.map(pieces) : ids;
        return c.json({ tokens: shown, count: ids.length, max_model_len: info.contextLength });
      });
    })
    .post("/detokenize", async (c) => {
      const request = detokenizeRequest.parse(await body(c, context));
      return withEngine(c, context, request.model, ({ tokenizer, info }) => {
        requireIds(request.tokens, info.vocabSize, "tokens");
        const content = tokenizer.decode(request.tokens, { skipSpecialTokens: false });
        return c.json({ content, prompt: content });
      });
    })
    .post("/apply-template", async (c) => {
      const request = parseChatRequest(await body(c, context));
      return withEngine(c, context, request.model, (engine) => {
        const { text } = renderPrompt(engine.tokenizer, toChatJob(request, engine));
        return c.json({ prompt: text });
      });
    });
}

async function withEngine(
  c: Context,
  context: ServerContext,
  model: string | undefined,
  work: (engine: Engine) => Response,
): Promise<Response> {
  const lease = await context.registry.use(model);
  requestFacts(c).model = lease.id;
  try {
    return work(lease.engine);
  } finally {
    lease.release();
  }
}
