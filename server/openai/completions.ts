/** Text completions: their schema, and pieces as choices with OpenAI's older logprobs. */
import { z } from "zod";
import type { GeneratedToken, GenerateOptions } from "../../src/runtime/engine.ts";
import type { Tokenizer } from "../../src/tokenizer/tokenizer.ts";
import { finiteLogprob } from "../answer.ts";
import { acceptFields } from "./fields.ts";
import { promptInput } from "./prompts.ts";
import { checkStream, defined, samplingFields, samplingOptions, streamFields } from "./sampling.ts";

/** OpenAI's default. */
const DEFAULT_MAX_TOKENS = 16;

export const completionRequest = z.object({
  model: z.string().optional(),
  prompt: promptInput.default(""),
  suffix: z.string().optional(),
  echo: z.boolean().optional(),
  /** 5 for OpenAI; evaluation harnesses ask for more. */
  logprobs: z.int().min(0).max(20).optional(),
  max_tokens: z.int().min(0).max(1_000_000).optional(),
  ...streamFields,
  ...samplingFields,
});
export type CompletionRequest = z.infer<typeof completionRequest>;

export function parseCompletionRequest(body: Readonly<Record<string, unknown>>): CompletionRequest {
  const request = completionRequest.parse(acceptFields("/v1/completions", body));
  checkStream(request);
  return request;
}

export function completionOptions(request: CompletionRequest, vocabSize: number): GenerateOptions {
  return defined({
    ...samplingOptions(request, vocabSize),
    maxTokens: request.max_tokens ?? DEFAULT_MAX_TOKENS,
    topLogprobs: request.logprobs,
    promptLogprobs: (request.echo && request.logprobs !== undefined) || undefined,
  });
}

/** The four parallel arrays of a choice's `logprobs`; a prompt's first token has none. */
export interface CompletionLogprobs {
  readonly tokens: string[];
  readonly token_logprobs: (number | null)[];
  readonly top_logprobs: (Record<string, number> | null)[];
  readonly text_offset: number[];
}

/** Builds `logprobs` token by token, counting characters from the start of the choice's text. */
export class LogprobsWriter {
  private offset = 0;
  private first = true;

  /** @param begin what the text begins with: Llama's tokenizers write the first word with a space before it. */
  constructor(
    private readonly tokenizer: Tokenizer,
    private readonly begin = "",
  ) {}

  private tokenText(id: number): string {
    const text = completionToken(this.tokenizer, id);
    const padded = this.first && this.begin !== "" && text.startsWith(" ") && !this.begin.startsWith(" ");
    return padded ? text.slice(1) : text;
  }

  /** A token without a probability: the first of a prompt. */
  unscored(id: number): CompletionLogprobs {
    const token = this.tokenText(id);
    return { tokens: [token], token_logprobs: [null], top_logprobs: [null], text_offset: [this.advance(token)] };
  }

  scored(tokens: readonly GeneratedToken[]): CompletionLogprobs {
    const written = tokens.map((token) => {
      const text = this.tokenText(token.id);
      return { ...token, text, offset: this.advance(text) };
    });
    return {
      tokens: written.map(({ text }) => text),
      token_logprobs: written.map(({ logprob }) => finiteLogprob(logprob)),
      top_logprobs: written.map(({ id, logprob, top }) => this.alternatives(id, logprob, top)),
      text_offset: written.map(({ offset }) => offset),
    };
  }

  /** The alternatives, and the token itself where it is not among them, as OpenAI lists them. */
  private alternatives(id: number, logprob: number, top: GeneratedToken["top"]): Record<string, number> {
    const all = [{ id, logprob }, ...top];
    return Object.fromEntries(
      all.map((other) => [completionToken(this.tokenizer, other.id), finiteLogprob(other.logprob)]),
    );
  }

  private advance(token: string): number {
    const { offset } = this;
    this.offset += [...token].length;
    this.first = false;
    return offset;
  }
}

export function joinLogprobs(parts: readonly CompletionLogprobs[]): CompletionLogprobs {
  return {
    tokens: parts.flatMap(({ tokens }) => tokens),
    token_logprobs: parts.flatMap(({ token_logprobs }) => token_logprobs),
    top_logprobs: parts.flatMap(({ top_logprobs }) => top_logprobs),
    text_offset: parts.flatMap(({ text_offset }) => text_offset),
  };
}

/** A token's text, or "bytes:\xe2\x80" for part of a character, as OpenAI writes it. */
export function completionToken(tokenizer: Tokenizer, id: number): string {
  const bytes = tokenizer.tokenBytes(id);
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    return `bytes:${Array.from(bytes, (byte) => `\\x${byte.toString(16).padStart(2, "0")}`).join("")}`;
  }
}
