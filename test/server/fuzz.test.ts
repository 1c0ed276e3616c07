/** Requests made from the server's own OpenAPI document: no 500, and every answer has its published shape. */
import { Ajv2020 } from "ajv/dist/2020.js";
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import {
  chatCompletionChunk,
  completionChunk,
  messageResponse,
  responseResponse,
} from "../../server/openai/response-schemas.ts";
import { operations } from "../../server/operations.ts";
import { makeDocument } from "../../server/routes/openapi.ts";
import { nearly, type Schema } from "./from-schema.ts";
import { events, testApp } from "./serving.ts";

/** NIBBLE_FUZZ_RUNS=2000 looks longer. */
const runs = Number(process.env.NIBBLE_FUZZ_RUNS ?? 150);
const document = makeDocument();
const ajv = new Ajv2020({ strict: false, validateFormats: false }).addSchema({ ...document, $id: "document" });
const posts = operations.filter(({ request }) => request).map(({ path }) => path);

/** JSON Pointer of the schema of JSON answers with this status. */
const pointer = (path: string, method: string, status: number): string =>
  `document#/paths/${path.replaceAll("/", "~1")}/${method}/responses/${status}/content/application~1json/schema`;

/** The status is a published one, and the body what the document says of it. */
function checkAnswer(path: string, method: string, status: number, body: unknown): void {
  const validate = ajv.getSchema(pointer(path, method, status));
  expect(validate, `${path} answers ${status}, which the document does not know`).toBeDefined();
  expect(validate?.(body), `${JSON.stringify(body)}: ${ajv.errorsText(validate?.errors)}`).toBe(true);
}

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
  } else if (path === "/infill") {
    expect((all as { stop: boolean }[]).map(({ stop }) => stop)).toEqual(all.map((_, at) => at === all.length - 1));
    checkAnswer(path, "post", 200, all.at(-1));
  } else {
    expect((all as { done: boolean }[]).map(({ done }) => done)).toEqual(all.map((_, at) => at === all.length - 1));
    for (const line of all) checkAnswer(path, "post", 200, line);
  }
}

/** The events or lines of a streamed answer, undefined where it is not one. */
async function streamed(response: Response): Promise<unknown[] | undefined> {
  const type = response.headers.get("content-type") ?? "";
  if (type.startsWith("text/event-stream")) return events(response);
  if (!type.startsWith("application/x-ndjson")) return undefined;
  return (await response.text())
    .trimEnd()
    .split("\n")
    .map((line) => JSON.parse(line));
}

describe("no 500 and no answer outside the published shapes", () => {
  test.each(posts)("%s", async (path) => {
    const { post } = testApp({ contextLength: 512 });
    const { requestBody } = document.paths[path].post as {
      requestBody: { content: Record<string, { schema: Schema }> };
    };
    const statuses = new Map<number, number>();
    await fc.assert(
      fc.asyncProperty(nearly(requestBody.content["application/json"].schema), async (given) => {
        const response = await post(path, { ...(given as object), model: "scripted" });
        statuses.set(response.status, (statuses.get(response.status) ?? 0) + 1);
        expect(response.status).toBeLessThan(500);
        const all = await streamed(response);
        if (all) checkStream(path, all);
        else checkAnswer(path, "post", response.status, await response.json());
      }),
      { numRuns: runs },
    );
    expect(statuses.get(400) ?? 0).toBeGreaterThan(0);
    expect(statuses.get(200) ?? 0).toBeGreaterThan(0); // or nothing but refusals was tried
  });

  test("what is only read, before and after a model is loaded", async () => {
    const { app, post } = testApp();
    for (let round = 0; round < 2; round++) {
      for (const { path, answer } of operations.filter(({ method }) => method === "get")) {
        const response = await app.request(path.replace("{id}", "scripted"));
        if (answer) checkAnswer(path, "get", response.status, await response.json());
        expect(response.status).toBe(path === "/metrics" ? 404 : 200); // metrics come with Node
      }
      await post("/v1/completions", { prompt: "a" });
    }
    const missing = await app.request("/v1/models/none");
    checkAnswer("/v1/models/{id}", "get", missing.status, await missing.json());
  });

  test("bodies that are any text", async () => {
    const { post } = testApp();
    await fc.assert(
      fc.asyncProperty(fc.constantFrom(...posts), fc.oneof(fc.string(), fc.json()), async (path, text) => {
        const response = await post(path, text);
        expect(response.status).toBeLessThan(500);
        checkAnswer(path, "post", response.status, await response.json());
      }),
      { numRuns: runs },
    );
  });
});
