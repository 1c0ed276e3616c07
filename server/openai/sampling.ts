/** Sampling fields that chat, completions and infill share, and their way into the engine's options. */
import { z } from "zod";
import type { GenerateOptions, GrammarSpec } from "../../src/runtime/engine.ts";
import { requireGrammar } from "../grammar.ts";
import { badValue } from "./errors.ts";
import { grammarOf, type ResponseFormat, responseFormat } from "./response-format.ts";

// zod's compiled parsers need eval, which a page's content security policy forbids
z.config({ jitless: true });

/** OpenAI takes 4; local clients send more. */
const MAX_STOPS = 32;
const MAX_CHOICES = 16;

export const tokenCount = z.int().min(1).max(1_000_000);

export const samplingFields = {
  temperature: z.number().min(0).max(2).optional(),
  top_p: z.number().min(0).max(1).optional(),
  top_k: z.int().min(-1).optional(), // -1 is vLLM's "all"
  min_p: z.number().min(0).max(1).optional(),
  repetition_penalty: z.number().gt(0).max(10).optional(),
  repeat_penalty: z.number().gt(0).max(10).optional(),
  presence_penalty: z.number().min(-2).max(2).optional(),
  frequency_penalty: z.number().min(-2).max(2).optional(),
  logit_bias: z.record(z.string(), z.number().min(-100).max(100)).optional(),
  seed: z.int().optional(),
  stop: z.union([z.string(), z.array(z.string()).max(MAX_STOPS)]).optional(),
  ignore_eos: z.boolean().optional(),
  grammar: z.string().max(100_000).optional(),
  response_format: responseFormat.optional(),
} as const;

export const streamFields = {
  stream: z.boolean().optional(),
  stream_options: z
    .object({ include_usage: z.boolean().nullish(), include_obfuscation: z.boolean().nullish() })
    .optional(),
  n: z.int().min(1).max(MAX_CHOICES).optional(),
} as const;

type Sampling = z.infer<z.ZodObject<typeof samplingFields>>;

export function samplingOptions(request: Sampling, vocabSize: number): GenerateOptions {
  const { temperature, top_p, top_k, min_p, presence_penalty, frequency_penalty, seed, stop, ignore_eos } = request;
  return defined({
    temperature,
    topP: top_p,
    topK: top_k === -1 ? 0 : top_k,
    minP: min_p,
    repetitionPenalty: request.repetition_penalty ?? request.repeat_penalty,
    presencePenalty: presence_penalty,
    frequencyPenalty: frequency_penalty,
    logitBias: request.logit_bias && logitBias(request.logit_bias, vocabSize),
    seed,
    stop: (typeof stop === "string" ? [stop] : stop)?.filter((text) => text !== ""),
    ignoreEos: ignore_eos,
    grammar: grammarField(request),
  });
}

function grammarField(request: { grammar?: string; response_format?: ResponseFormat }): GrammarSpec | undefined {
  const format = request.response_format && grammarOf(request.response_format, "response_format");
  if (request.grammar === undefined) return format;
  if (format) throw badValue("grammar", "'grammar' and 'response_format' both constrain the answer; send one.");
  return requireGrammar({ kind: "ebnf", grammar: request.grammar }, "grammar");
}

function logitBias(bias: Readonly<Record<string, number>>, vocabSize: number): Record<number, number> {
  const byId: Record<number, number> = {};
  for (const [key, value] of Object.entries(bias)) {
    if (!/^\d+$/.test(key) || Number(key) >= vocabSize) {
      throw badValue(
        "logit_bias",
        `Invalid key in 'logit_bias': ${key.slice(0, 32)}. Token ids are 0 .. ${vocabSize - 1}.`,
      );
    }
    byId[Number(key)] = value;
  }
  return byId;
}

export function checkStream(request: { stream?: boolean; stream_options?: unknown }): void {
  if (request.stream_options !== undefined && request.stream !== true) {
    throw badValue("stream_options", "The 'stream_options' parameter is only allowed when 'stream' is enabled.");
  }
}

/** Leaves out what is undefined, so that the engine's defaults apply. */
export function defined<T extends object>(value: T): T {
  return Object.fromEntries(Object.entries(value).filter(([, item]) => item !== undefined)) as T;
}
