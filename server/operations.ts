/** Every endpoint with the schemas of its requests and answers: what `/openapi.json` says, and what the tests hold it to. */
import { z } from "zod";
import { messagesRequest } from "./anthropic/messages.ts";
import * as ollama from "./ollama/answers.ts";
import { ollamaChat, ollamaEmbed, ollamaEmbeddings, ollamaGenerate, ollamaShow } from "./ollama/requests.ts";
import { chatRequest } from "./openai/chat-request.ts";
import { completionRequest } from "./openai/completions.ts";
import { embeddingRequest } from "./openai/embeddings.ts";
import type { Endpoint } from "./openai/fields.ts";
import * as openai from "./openai/response-schemas.ts";
import { responsesRequest } from "./openai/responses-request.ts";
import { healthAnswer } from "./routes/health.ts";
import { infillAnswer, infillRequest } from "./routes/infill.ts";
import { propsAnswer, slotsAnswer } from "./routes/state.ts";
import {
  detokenizeAnswer,
  detokenizeRequest,
  templateAnswer,
  tokenizeAnswer,
  tokenizeRequest,
} from "./routes/tokens.ts";

export interface Operation {
  readonly method: "get" | "post" | "delete";
  /** As OpenAPI writes it, with `{id}`. */
  readonly path: string;
  readonly summary: string;
  readonly request?: z.ZodType;
  /** Whose table of fields the request is held to: one that is not in it is refused. */
  readonly fields?: Endpoint;
  /** A JSON answer with status 200. */
  readonly answer?: z.ZodType;
  /** Content types of an answer that is no JSON, or of a streamed one. */
  readonly alsoAs?: readonly string[];
  /** Every request is refused with 400. */
  readonly refused?: boolean;
}

const EVENTS = "text/event-stream";
const JSON_LINES = "application/x-ndjson";
const get = (path: string, summary: string, answer?: z.ZodType, alsoAs?: readonly string[]): Operation => ({
  method: "get",
  path,
  summary,
  answer,
  alsoAs,
});
const post = (
  path: string,
  summary: string,
  request: z.ZodType,
  answer: z.ZodType,
  more: Pick<Operation, "alsoAs" | "fields"> = {},
): Operation => ({ method: "post", path, summary, request, answer, ...more });
const refused = (method: "post" | "delete", path: string): Operation => ({
  method,
  path,
  summary: "Not offered: models are named when the server starts",
  refused: true,
});

export const operations: readonly Operation[] = [
  post("/v1/chat/completions", "Answer a conversation", chatRequest, openai.chatCompletionResponse, {
    fields: "/v1/chat/completions",
    alsoAs: [EVENTS],
  }),
  post("/v1/completions", "Continue text", completionRequest, openai.completionResponse, {
    fields: "/v1/completions",
    alsoAs: [EVENTS],
  }),
  post("/v1/responses", "Answer input items", responsesRequest, openai.responseResponse, {
    fields: "/v1/responses",
    alsoAs: [EVENTS],
  }),
  post("/v1/embeddings", "Vectors of texts", embeddingRequest, openai.embeddingResponse, { fields: "/v1/embeddings" }),
  get("/v1/models", "The models of this server", openai.modelListResponse),
  get("/v1/models/{id}", "One model", openai.modelResponse),
  post("/v1/messages", "Answer, in Anthropic's shape", messagesRequest, openai.messageResponse, {
    fields: "/v1/messages",
    alsoAs: [EVENTS],
  }),
  post(
    "/v1/messages/count_tokens",
    "Tokens of a conversation",
    messagesRequest.partial({ max_tokens: true }),
    openai.countTokensResponse,
    { fields: "/v1/messages" },
  ),
  post("/infill", "Code between a prefix and a suffix", infillRequest, infillAnswer, { alsoAs: [EVENTS] }),
  post("/tokenize", "Text to token ids", tokenizeRequest, tokenizeAnswer),
  post("/detokenize", "Token ids to text", detokenizeRequest, detokenizeAnswer),
  post("/apply-template", "The prompt of a conversation", chatRequest, templateAnswer, {
    fields: "/v1/chat/completions",
  }),
  get("/health", "503 while the first model loads", healthAnswer),
  get("/v1/health", "503 while the first model loads", healthAnswer),
  get("/props", "What is loaded, and how", propsAnswer),
  get("/slots", "Places of loaded models", slotsAnswer),
  get("/metrics", "Prometheus metrics", undefined, ["text/plain"]),
  get("/openapi.json", "This document", z.looseObject({ openapi: z.string() })),
  get("/", "The chat page, or a line of text where there is none", undefined, ["text/html", "text/plain"]),
  post("/api/chat", "Answer a conversation, in Ollama's shape", ollamaChat, ollama.ollamaChatAnswer, {
    alsoAs: [JSON_LINES],
  }),
  post("/api/generate", "Answer a prompt, in Ollama's shape", ollamaGenerate, ollama.ollamaGenerateAnswer, {
    alsoAs: [JSON_LINES],
  }),
  post("/api/embed", "Vectors of texts, in Ollama's shape", ollamaEmbed, ollama.ollamaEmbedAnswer),
  post("/api/embeddings", "The vector of one text", ollamaEmbeddings, ollama.ollamaEmbeddingsAnswer),
  post("/api/show", "One model, in Ollama's shape", ollamaShow, ollama.ollamaShown),
  get("/api/tags", "The models of this server, in Ollama's shape", ollama.ollamaModels),
  get("/api/ps", "The loaded models", ollama.ollamaModels),
  get("/api/version", "The version of Ollama's API whose shapes these are", ollama.ollamaVersion),
  ...["pull", "push", "create", "copy"].map((name) => refused("post", `/api/${name}`)),
  refused("delete", "/api/delete"),
];
