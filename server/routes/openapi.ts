/** GET /openapi.json: the document of this server, made from the schemas that its requests are checked with. */
import { Hono } from "hono";
import { z } from "zod";
import { version } from "../../src/version.ts";
import { ollamaError } from "../ollama/answers.ts";
import { type Field, fields } from "../openai/fields.ts";
import { anthropicError, errorResponse } from "../openai/response-schemas.ts";
import { type Operation, operations } from "../operations.ts";

/** What each status means, beside 200; a request's body can be wrong in more ways than its path. */
const refusals: Readonly<Record<string, string>> = {
  "400": "The request is wrong; the message says where",
  "401": "No API key, or a wrong one",
  "403": "This Host or Origin is not allowed",
  "404": "There is no such model",
  "500": "The model stopped while it was answering",
  "503": "Loading, ending, or too many requests: Retry-After says when to ask again",
};
const bodyRefusals: Readonly<Record<string, string>> = {
  "413": "The body is too large",
  "415": "The body is no JSON, or compressed",
};

export function openapi(): Hono {
  let document: object | undefined;
  return new Hono().get("/openapi.json", (c) => {
    document ??= makeDocument();
    return c.json(document);
  });
}

export function makeDocument() {
  const paths: Record<string, Record<string, object>> = {};
  for (const operation of operations) {
    const { method, path } = operation;
    paths[path] = { ...paths[path], [method]: describe(operation) };
  }
  return {
    openapi: "3.1.0",
    info: { title: "Nibble", version, description: "OpenAI-compatible API of models exported by Nibble" },
    components: {
      securitySchemes: { key: { type: "http", scheme: "bearer" } },
      schemas: {
        Error: schemaOf(errorResponse, "output"),
        AnthropicError: schemaOf(anthropicError, "output"),
        OllamaError: schemaOf(ollamaError, "output"),
      },
    },
    security: [{}, { key: [] }],
    paths,
  };
}

function describe(operation: Operation) {
  const { path, summary, request, answer, alsoAs, refused } = operation;
  const ok = {
    ...(answer ? json(schemaOf(answer, "output")) : {}),
    ...Object.fromEntries((alsoAs ?? []).map((type) => [type, {}])), // a schema would be read as that of one event
  };
  const failed = json({ $ref: `#/components/schemas/${errorSchema(path)}` });
  const statuses = Object.entries({ ...refusals, ...(request || refused ? bodyRefusals : {}) });
  const parameter = { name: "id", in: "path", required: true, schema: { type: "string", minLength: 1 } };
  return {
    summary,
    ...(path.includes("{id}") ? { parameters: [parameter] } : {}),
    ...(request ? { requestBody: { required: true, content: json(requestSchema(operation, request)) } } : {}),
    responses: {
      ...(refused ? {} : { "200": { description: "The answer", content: ok } }),
      ...Object.fromEntries(statuses.map(([status, description]) => [status, { description, content: failed }])),
      // the same shape as when all is well
      ...(path.endsWith("/health") ? { "503": { description: "Not ready", content: ok } } : {}),
    },
  };
}

function errorSchema(path: string): string {
  if (path.startsWith("/v1/messages")) return "AnthropicError";
  return path.startsWith("/api/") ? "OllamaError" : "Error";
}

interface JsonSchema {
  readonly type?: string;
  readonly properties?: Readonly<Record<string, object>>;
  readonly required?: readonly string[];
}

function schemaOf(schema: z.ZodType, io: "input" | "output"): JsonSchema {
  const { $schema: _, ...rest } = z.toJSONSchema(schema, { io, unrepresentable: "any" });
  return rest as JsonSchema;
}

const json = (schema: object) => ({ "application/json": { schema } });

/** The schema of a request and what the table of fields says beside each property; null is as good as left out. */
function requestSchema({ fields: endpoint }: Operation, request: z.ZodType): JsonSchema {
  const schema = schemaOf(request, "input");
  if (endpoint === undefined) return schema;
  const own = schema.properties ?? {};
  const orNull = (property: object) => ({ anyOf: [property, { type: "null" }] });
  const describeField = ({ name, status, note, neutral = [] }: Field): object => {
    if (status === "ignored") return { description: `no effect: ${note}` };
    if (status === "refused") return { enum: [...neutral, null], description: `refused: ${note}` };
    const property = schema.required?.includes(name) ? own[name] : orNull(own[name]);
    return { ...property, description: note };
  };
  const properties = Object.fromEntries(fields[endpoint].map((field) => [field.name, describeField(field)]));
  return { ...schema, properties, additionalProperties: false } as JsonSchema;
}
