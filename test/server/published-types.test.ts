/** The schemas of answers against the types that the clients' packages publish: `tsc` refuses this file where they part. */
import type Anthropic from "@anthropic-ai/sdk";
import type OpenAI from "openai";
import { expect, test } from "vitest";
import type { z } from "zod";
import * as answers from "../../server/openai/response-schemas.ts";

/** Fails to compile unless what the schema lets through is what the client expects. */
function fits<Published>() {
  return <Schema extends z.ZodType<Published>>(schema: Schema): Schema => schema;
}

test("answers are what the openai package's types say", () => {
  const checked = [
    fits<OpenAI.ChatCompletion>()(answers.chatCompletionResponse),
    fits<OpenAI.ChatCompletionChunk>()(answers.chatCompletionChunk),
    // its token_logprobs are null where OpenAI's are, for the first token of an echoed prompt; the types leave that out
    fits<Omit<OpenAI.Completion, "choices">>()(answers.completionResponse.omit({ choices: true })),
    fits<OpenAI.Model>()(answers.modelResponse),
    fits<{ data: OpenAI.Model[] }>()(answers.modelListResponse),
    fits<Anthropic.MessageTokensCount>()(answers.countTokensResponse),
  ];
  expect(checked.every((schema) => !schema.safeParse({}).success)).toBe(true);
});
