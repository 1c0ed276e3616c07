/** A request's JSON body, within named limits. `curl -d` sends JSON as a form, so a form is read as JSON too. */
import type { Context } from "hono";
import { ApiError } from "./openai/errors.ts";

export interface BodyLimits {
  readonly maxBodyBytes: number;
  /** Arrays and objects inside each other. */
  readonly maxNesting: number;
}

/** A context of 100k tokens is under 1 MB of text; 16 MB leaves room for long tool results. */
export const defaultBodyLimits: BodyLimits = { maxBodyBytes: 16 * 1024 * 1024, maxNesting: 64 };

export type JsonObject = Record<string, unknown>;

const JSON_TYPES = /^(application\/([\w.-]+\+)?json|text\/plain|application\/x-www-form-urlencoded)\s*(;|$)/i;

export async function readJsonBody(c: Context, limits: BodyLimits): Promise<JsonObject> {
  const type = c.req.header("content-type");
  if (type !== undefined && !JSON_TYPES.test(type)) {
    const message = `Unsupported content type '${type.slice(0, 64)}': send the body as application/json.`;
    throw new ApiError(415, "unsupported_media_type", message);
  }
  const encoding = c.req.header("content-encoding");
  if (encoding !== undefined && !/^(identity)?$/i.test(encoding.trim())) {
    const message = `Unsupported Content-Encoding '${encoding.slice(0, 64)}': send the body as it is, not compressed.`;
    throw new ApiError(415, "unsupported_media_type", message);
  }
  const bytes = await readBytes(c.req.raw, c.req.header("content-length"), limits).catch((error) => {
    if (error instanceof ApiError) throw error;
    throw new ApiError(400, "incomplete_body", "The body ended before it was whole."); // the client left, or was too slow
  });
  const text = decodeUtf8(bytes);
  if (nesting(text) > limits.maxNesting) {
    throw new ApiError(400, "invalid_json", `The JSON body nests deeper than ${limits.maxNesting} levels.`);
  }
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    throw new ApiError(
      400,
      "invalid_json",
      "We could not parse the JSON body of your request: the body has to be a JSON object.",
    );
  }
  if (typeof value !== "object" || value === null || Array.isArray(value)) {
    throw new ApiError(400, "invalid_json", "The JSON body of your request has to be an object.");
  }
  return value as JsonObject;
}

function tooLarge({ maxBodyBytes }: BodyLimits): ApiError {
  return new ApiError(413, "request_too_large", `The body is larger than ${maxBodyBytes} bytes.`);
}

/** At once where its size is known, which saves Node a stream; else piece by piece, as far as the limit. */
async function readBytes(request: Request, declared: string | undefined, limits: BodyLimits): Promise<Uint8Array> {
  if (declared !== undefined) {
    const bytes = Number(declared) > limits.maxBodyBytes ? undefined : new Uint8Array(await request.arrayBuffer());
    if (!bytes || bytes.length > limits.maxBodyBytes) throw tooLarge(limits);
    return bytes;
  }
  const chunks: Uint8Array[] = [];
  let sizeBytes = 0;
  const reader = request.body?.getReader();
  for (let chunk = await reader?.read(); chunk && !chunk.done; chunk = await reader?.read()) {
    sizeBytes += chunk.value.byteLength;
    if (sizeBytes > limits.maxBodyBytes) {
      await reader?.cancel();
      throw tooLarge(limits);
    }
    chunks.push(chunk.value);
  }
  const bytes = new Uint8Array(sizeBytes);
  chunks.reduce((at, chunk) => {
    bytes.set(chunk, at);
    return at + chunk.byteLength;
  }, 0);
  return bytes;
}

function decodeUtf8(bytes: Uint8Array): string {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    throw new ApiError(400, "invalid_json", "The body is not valid UTF-8.");
  }
}

/** The deepest nesting of brackets outside strings; cheap, and safe on what is not JSON. */
export function nesting(text: string): number {
  let depth = 0;
  let deepest = 0;
  let inString = false;
  for (let at = 0; at < text.length; at++) {
    const code = text.charCodeAt(at);
    if (inString) {
      if (code === 0x5c) at++;
      else if (code === 0x22) inString = false;
    } else if (code === 0x22) inString = true;
    else if (code === 0x7b || code === 0x5b) deepest = Math.max(deepest, ++depth);
    else if (code === 0x7d || code === 0x5d) depth--;
  }
  return deepest;
}
