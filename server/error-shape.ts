/** An error in the words of the API that was asked: OpenAI's, Anthropic's or Ollama's. */
import type { HttpError } from "./openai/errors.ts";

/** Anthropic's error types by status. */
const anthropicTypes: Readonly<Record<number, string>> = {
  401: "authentication_error",
  403: "permission_error",
  404: "not_found_error",
  413: "request_too_large",
  429: "rate_limit_error",
  503: "overloaded_error",
};

/** Anthropic's tool runner asks for a conversation that the server keeps; told this, it sends the conversation itself. */
const unthreaded = { error_code: "thread_unsupported_request", unsupported: ["thread"] };

export function errorBody(path: string, { status, body }: HttpError): unknown {
  const { message, param } = body.error;
  if (path.startsWith("/v1/messages")) {
    const type = anthropicTypes[status] ?? (status < 500 ? "invalid_request_error" : "api_error");
    return { type: "error", error: { type, message, ...(param === "thread" ? { details: unthreaded } : {}) } };
  }
  if (path.startsWith("/api/")) return { error: message };
  return body;
}
