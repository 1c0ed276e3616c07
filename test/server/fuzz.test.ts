/** Requests made from the server's own OpenAPI document: no 500, and every answer has its published shape. */
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import {
  chatCompletionChunk,
  completionChunk,
  errorResponse,
  messageResponse,
  responseResponse,
} from "../../server/openai/response-schemas.ts";
import { makeDocument, operations } from "../../server/routes/openapi.ts";
import { nearly, type Schema } from "./from-schema.ts";
import { events, testApp } from "./serving.ts";

/** NIBBLE_FUZZ_RUNS=2000 looks longer. */
const runs = Number(process.env.NIBBLE_FUZZ_RUNS ?? 150);
const { paths } = makeDocument() as unknown as {
  paths: Record<string, { post?: { requestBody: { content: Record<string, { schema: Schema }> } } }>;
};

interface StreamEvent {
  readonly type: string;
  readonly sequence_number?: number;
  readonly index?: number;
  readonly message?: unknown;
  readonly response?: unknown;
}

/** Every event of a stream has its API's shape and its place. */
function checkStream(path: string, all: readonly unknown[]): void {
  if (path === "/v1/chat/completions" || path === "/v1/completions") {
    const chunk = path === "/v1/completions" ? completionChunk : chatCompletionChunk;
    expect(all.at(-1)).toBe("[DONE]");
    for (const item of all.slice(0, -1)) chunk.parse(item);
  } else if (path === "/v1/responses") {
    const typed = all as StreamEvent[];
    expect(typed.map(({ sequence_number }) => sequence_number)).toEqual(typed.map((_, index) => index));
    expect(typed.slice(0, 2).map(({ type }) => type)).toEqual(["response.created", "response.in_progress"]);
    const last = typed.at(-1);
    expect(last?.type).toMatch(/^response\.(completed|incomplete)$/);
    responseResponse.parse(last?.response);
  } else if (path === "/v1/messages") {
    const typed = all as StreamEvent[];
    expect(typed[0].type).toBe("message_start");
    messageResponse.extend({ stop_reason: messageResponse.shape.stop_reason.nullable() }).parse(typed[0].message);
    expect(typed.slice(-2).map(({ type }) => type)).toEqual(["message_delta", "message_stop"]);
    let open = -1;
    for (const { type, index } of typed) {
      if (type === "content_block_start")
        expect(index).toBe(++open); // one after the other
      else if (type.startsWith("content_block")) expect(index).toBe(open);
    }
  }
}

describe("no 500 and no answer outside the published shapes", () => {
  test.each(Object.keys(operations))("%s", async (path) => {
    const { post } = testApp({ contextLength: 512 });
    const schema = paths[path].post!.requestBody.content["application/json"].schema;
    const statuses = new Map<number, number>();
    await fc.assert(
      fc.asyncProperty(nearly(schema), async (given) => {
        const body = { ...(given as object), model: "scripted" } as { stream?: unknown };
        const response = await post(path, body);
        statuses.set(response.status, (statuses.get(response.status) ?? 0) + 1);
        expect(response.status).toBeLessThan(500);
        if (response.status === 200 && response.headers.get("content-type")?.startsWith("text/event-stream")) {
          checkStream(path, await events(response));
        } else if (response.status === 200) {
          operations[path].response?.parse(await response.json());
        } else if (!path.startsWith("/v1/messages")) {
          errorResponse.parse(await response.json());
        }
      }),
      { numRuns: runs },
    );
    expect(statuses.get(400) ?? 0).toBeGreaterThan(0);
    expect(statuses.get(200) ?? 0).toBeGreaterThan(0); // or nothing but refusals was tried
  });

  test("Ollama's routes", async () => {
    const { post } = testApp({ contextLength: 512 });
    const schema: Schema = {
      type: "object",
      properties: {
        messages: {
          type: "array",
          items: {
            type: "object",
            properties: { role: { enum: ["user", "system"] }, content: { type: "string" } },
            required: ["role", "content"],
          },
        },
        prompt: { type: "string" },
        input: { type: "string" },
        stream: { type: "boolean" },
        format: {},
        think: { type: "boolean" },
        options: {
          type: "object",
          properties: {
            temperature: { type: "number" },
            num_predict: { type: "integer" },
            stop: { type: "array", items: { type: "string" } },
          },
        },
      },
    };
    const paths = fc.constantFrom("/api/chat", "/api/generate", "/api/embed", "/api/embeddings", "/api/show");
    const seen = new Set<number>();
    await fc.assert(
      fc.asyncProperty(paths, nearly(schema), async (path, given) => {
        const response = await post(path, { ...(given as object), model: "scripted" });
        seen.add(response.status);
        expect(response.status).toBeLessThan(500);
        await response.text();
      }),
      { numRuns: runs },
    );
    expect([...seen].sort()).toEqual(expect.arrayContaining([200, 400]));
  });

  test("bodies that are any text", async () => {
    const { post } = testApp();
    await fc.assert(
      fc.asyncProperty(
        fc.constantFrom(...Object.keys(operations), "/api/chat"),
        fc.oneof(fc.string(), fc.json()),
        async (path, text) => {
          expect((await post(path, text)).status).toBeLessThan(500);
        },
      ),
      { numRuns: runs },
    );
  });
});
