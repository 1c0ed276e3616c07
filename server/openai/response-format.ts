/** `response_format` and `text.format`: what the answer has to look like, as a grammar. Never unconstrained in silence. */
import { z } from "zod";
import type { GrammarSpec } from "../../src/runtime/engine.ts";
import { requireGrammar } from "../grammar.ts";

const schemaName = z.string().regex(/^[a-zA-Z0-9_-]{1,64}$/);
/** A JSON Schema: an object here; its keywords are checked when it is compiled. */
export const jsonSchema = z.record(z.string(), z.unknown());

export const responseFormat = z.discriminatedUnion("type", [
  z.object({ type: z.literal("text") }),
  z.object({ type: z.literal("json_object"), schema: jsonSchema.optional() }), // schema: llama.cpp's older form
  z.object({
    type: z.literal("json_schema"),
    json_schema: z.object({
      name: schemaName.optional(),
      description: z.string().nullish(),
      schema: jsonSchema,
      strict: z.boolean().nullish(),
    }),
  }),
]);
export type ResponseFormat = z.infer<typeof responseFormat>;

/** `text.format` of the Responses API: the same, flat. */
export const textFormat = z.discriminatedUnion("type", [
  z.object({ type: z.literal("text") }),
  z.object({ type: z.literal("json_object") }),
  z.object({
    type: z.literal("json_schema"),
    name: schemaName,
    description: z.string().nullish(),
    schema: jsonSchema,
    strict: z.boolean().nullish(),
  }),
]);

export function grammarOf(format: ResponseFormat, param: string): GrammarSpec | undefined {
  switch (format.type) {
    case "text":
      return undefined;
    case "json_object":
      if (format.schema) return requireGrammar({ kind: "json_schema", schema: format.schema }, `${param}.schema`);
      return requireGrammar({ kind: "json_object" }, param);
    case "json_schema": {
      const { schema, strict } = format.json_schema;
      return requireGrammar({ kind: "json_schema", schema, strict: strict ?? false }, `${param}.json_schema.schema`);
    }
  }
}
