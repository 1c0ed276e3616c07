/** Requests made from the server's own OpenAPI document: no 500, and every answer has its published shape. */
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { chatCompletionChunk, errorResponse } from "../../server/openai/response-schemas.ts";
import { makeDocument, operations } from "../../server/routes/openapi.ts";
import { nearly, type Schema } from "./from-schema.ts";
import { events, testApp } from "./serving.ts";

/** NIBBLE_FUZZ_RUNS=2000 looks longer. */
const runs = Number(process.env.NIBBLE_FUZZ_RUNS ?? 150);
const { paths } = makeDocument() as unknown as {
  paths: Record<string, { post?: { requestBody: { content: Record<string, { schema: Schema }> } } }>;
};

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
          const all = await events(response);
          if (path === "/v1/chat/completions") {
            expect(all.at(-1)).toBe("[DONE]");
            for (const chunk of all.slice(0, -1)) chatCompletionChunk.parse(chunk);
          }
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
