/** POST /v1/embeddings */
import { Hono } from "hono";
import { body, type ServerContext } from "../context.ts";
import { embed } from "../embed.ts";
import { parseEmbeddingRequest, shorten, toBase64 } from "../openai/embeddings.ts";

export function embeddings(context: ServerContext): Hono {
  return new Hono().post("/v1/embeddings", async (c) => {
    const request = parseEmbeddingRequest(await body(c, context));
    const { model, vectors, promptTokens } = await embed(c, context, request.model, request.input);
    return c.json({
      object: "list",
      model,
      data: vectors.map((vector, index) => {
        const short = shorten(vector, request.dimensions);
        const embedding = request.encoding_format === "base64" ? toBase64(short) : Array.from(short);
        return { object: "embedding", index, embedding };
      }),
      usage: { prompt_tokens: promptTokens, total_tokens: promptTokens },
    });
  });
}
