/** GET /openapi.json: the document of this server, made from the schemas that its requests are checked with. */
import { Hono } from "hono";
import { z } from "zod";
import { version } from "../../src/version.ts";
import { messagesRequest } from "../anthropic/messages.ts";
import { chatRequest } from "../openai/chat-request.ts";
import { completionRequest } from "../openai/completions.ts";
import { embeddingRequest } from "../openai/embeddings.ts";
import { type Endpoint, fields } from "../openai/fields.ts";
import * as answers from "../openai/response-schemas.ts";
import { responsesRequest } from "../openai/responses-request.ts";
import { infillRequest } from "./infill.ts";
import { detokenizeRequest, tokenizeRequest } from "./tokens.ts";

interface Operation {
  readonly summary: string;
  readonly request: z.ZodType;
  readonly response?: z.ZodType;
}

export const operations: Readonly<Record<string, Operation>> = {
  "/v1/chat/completions": {
    summary: "Answer a conversation",
    request: chatRequest,
    response: answers.chatCompletionResponse,
  },
  "/v1/completions": { summary: "Continue text", request: completionRequest, response: answers.completionResponse },
  "/v1/responses": { summary: "Answer input items", request: responsesRequest, response: answers.responseResponse },
  "/v1/embeddings": { summary: "Vectors of texts", request: embeddingRequest, response: answers.embeddingResponse },
  "/v1/messages": {
    summary: "Answer, in Anthropic's shape",
    request: messagesRequest,
    response: answers.messageResponse,
  },
  "/v1/messages/count_tokens": {
    summary: "Tokens of a conversation",
    request: messagesRequest.partial({ max_tokens: true }),
  },
  "/infill": { summary: "Code between a prefix and a suffix", request: infillRequest },
  "/tokenize": { summary: "Text to token ids", request: tokenizeRequest },
  "/detokenize": { summary: "Token ids to text", request: detokenizeRequest },
  "/apply-template": { summary: "The prompt of a conversation", request: chatRequest },
};

const gets: Readonly<Record<string, { summary: string; response?: z.ZodType }>> = {
  "/v1/models": { summary: "The models of this server", response: answers.modelListResponse },
  "/v1/models/{id}": { summary: "One model", response: answers.modelResponse },
  "/health": { summary: "503 while the first model loads" },
  "/metrics": { summary: "Prometheus metrics" },
  "/props": { summary: "What is loaded, and how" },
  "/slots": { summary: "Places of loaded models" },
};

export function openapi(): Hono {
  let document: object | undefined;
  return new Hono().get("/openapi.json", (c) => {
    document ??= makeDocument();
    return c.json(document);
  });
}

export function makeDocument() {
  const error = content(schemaOf(answers.errorResponse));
  const refusals = Object.fromEntries(
    ["400", "401", "404", "503"].map((status) => [status, { description: "An error", content: error }]),
  );
  const posts = Object.entries(operations).map(([path, { summary, request, response }]) => {
    const body = { required: true, content: content(describeFields(path, schemaOf(request))) };
    const ok = { description: "The answer", ...(response ? { content: content(schemaOf(response)) } : {}) };
    return [path, { post: { summary, requestBody: body, responses: { "200": ok, ...refusals } } }];
  });
  const reads = Object.entries(gets).map(([path, { summary, response }]) => {
    const ok = { description: "The answer", ...(response ? { content: content(schemaOf(response)) } : {}) };
    const parameters = path.includes("{id}")
      ? [{ name: "id", in: "path", required: true, schema: { type: "string" } }]
      : [];
    return [path, { get: { summary, parameters, responses: { "200": ok } } }];
  });
  return {
    openapi: "3.1.0",
    info: { title: "Nibble", version, description: "OpenAI-compatible API of models exported by Nibble" },
    components: { securitySchemes: { key: { type: "http", scheme: "bearer" } } },
    security: [{}, { key: [] }],
    paths: Object.fromEntries([...posts, ...reads]),
  };
}

interface JsonSchema {
  readonly properties?: Record<string, object>;
}

function schemaOf(schema: z.ZodType): JsonSchema {
  const { $schema: _, ...rest } = z.toJSONSchema(schema, { io: "input", unrepresentable: "any" });
  return rest as JsonSchema;
}

/** What the table of fields says, beside each property; those without effect are named too. */
function describeFields(path: string, schema: JsonSchema): JsonSchema {
  const list = fields[path as Endpoint] ?? [];
  const properties: Record<string, object> = { ...schema.properties };
  for (const { name, status, note } of list) {
    if (status === "done" && properties[name]) properties[name] = { ...properties[name], description: note };
    if (status === "ignored") properties[name] = { description: `no effect: ${note}` };
  }
  return { ...schema, properties };
}

function content(schema: object) {
  return { "application/json": { schema } };
}
