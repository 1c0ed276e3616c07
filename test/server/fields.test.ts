/** The table of fields against the openai and Anthropic packages and against our own schemas. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { messagesRequest } from "../../server/anthropic/messages.ts";
import { chatRequest } from "../../server/openai/chat-request.ts";
import { completionRequest } from "../../server/openai/completions.ts";
import { embeddingRequest } from "../../server/openai/embeddings.ts";
import { type Endpoint, fields, fieldsMarkdown } from "../../server/openai/fields.ts";
import { responsesRequest } from "../../server/openai/responses-request.ts";
import { repoPath } from "../helpers.ts";

/** The members of an interface in a package's type declarations. */
function members(file: string, name: string): string[] {
  const text = readFileSync(join(repoPath("node_modules"), file), "utf8").replace(/\/\*\*[\s\S]*?\*\//g, "");
  const body = new RegExp(`export interface ${name} \\{([\\s\\S]*?)\\n\\}`).exec(text)?.[1] ?? "";
  return Array.from(body.matchAll(/^ {4}(\w+)\??:/gm), (match) => match[1]);
}

const references: [Endpoint, string, string][] = [
  ["/v1/chat/completions", "openai/resources/chat/completions/completions.d.ts", "ChatCompletionCreateParamsBase"],
  ["/v1/completions", "openai/resources/completions.d.ts", "CompletionCreateParamsBase"],
  ["/v1/embeddings", "openai/resources/embeddings.d.ts", "EmbeddingCreateParams"],
  ["/v1/responses", "openai/resources/responses/responses.d.ts", "ResponseCreateParamsBase"],
  ["/v1/messages", "@anthropic-ai/sdk/resources/messages/messages.d.ts", "MessageCreateParamsBase"],
];

test.each(references)("%s: every field of the reference is in the table", (endpoint, file, name) => {
  const reference = members(file, name);
  expect(reference.length).toBeGreaterThan(3);
  const known = new Set(fields[endpoint].map((field) => field.name));
  expect(reference.filter((field) => !known.has(field))).toEqual([]);
});

const schemas: [Endpoint, { shape: object }][] = [
  ["/v1/chat/completions", chatRequest],
  ["/v1/completions", completionRequest],
  ["/v1/embeddings", embeddingRequest],
  ["/v1/responses", responsesRequest],
  ["/v1/messages", messagesRequest],
];

test.each(schemas)("%s: what the table calls done is what the schema reads", (endpoint, schema) => {
  const done = fields[endpoint].filter(({ status }) => status === "done").map(({ name }) => name);
  expect(done.sort()).toEqual(Object.keys(schema.shape).sort());
});

test("no field is listed twice, and the Markdown names each", () => {
  const markdown = fieldsMarkdown();
  for (const list of Object.values(fields)) {
    const names = list.map(({ name }) => name);
    expect(names.filter((name, index) => names.indexOf(name) !== index)).toEqual([]);
    for (const name of names) expect(markdown).toContain(`\`${name}\``);
  }
});
