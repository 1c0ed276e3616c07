/** Embeddings: their schema, truncation to fewer dimensions, base64. */
import { z } from "zod";
import { badValue } from "./errors.ts";
import { acceptFields } from "./fields.ts";
import { promptInput } from "./prompts.ts";

export const embeddingRequest = z.object({
  model: z.string().optional(),
  input: promptInput,
  encoding_format: z.enum(["float", "base64"]).optional(),
  dimensions: z.int().min(1).optional(),
});
export type EmbeddingRequest = z.infer<typeof embeddingRequest>;

export function parseEmbeddingRequest(body: Readonly<Record<string, unknown>>): EmbeddingRequest {
  return embeddingRequest.parse(acceptFields("/v1/embeddings", body));
}

/** The first `dimensions` numbers, normalised again. */
export function shorten(vector: Float32Array, dimensions: number | undefined): Float32Array {
  if (dimensions === undefined || dimensions === vector.length) return vector;
  if (dimensions > vector.length) {
    throw badValue("dimensions", `'dimensions' is ${dimensions}; this model's vectors have ${vector.length}.`);
  }
  const first = vector.slice(0, dimensions);
  const norm = Math.hypot(...first) || 1;
  return first.map((value) => value / norm);
}

/** Little-endian f32, as OpenAI's clients read it. */
export function toBase64(vector: Float32Array): string {
  const view = new DataView(new ArrayBuffer(vector.length * 4));
  vector.forEach((value, index) => {
    view.setFloat32(index * 4, value, true);
  });
  let text = "";
  for (let at = 0; at < view.byteLength; at++) text += String.fromCharCode(view.getUint8(at));
  return btoa(text);
}
