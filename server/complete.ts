/** One completion of token ids, as pieces of a choice: the echoed prompt, then text with its log probabilities. */
import { NibbleError } from "../src/errors.ts";
import type { Engine, FinishReason, GenerateOptions, Timings, Usage } from "../src/runtime/engine.ts";
import { FirstSpace, HeldTokens, requireUsage } from "./answer.ts";
import { type CompletionLogprobs, joinLogprobs, LogprobsWriter } from "./openai/completions.ts";
import type { Prompt } from "./openai/prompts.ts";

export interface CompletionPart {
  readonly text: string;
  readonly tokens: readonly number[];
  readonly logprobs?: CompletionLogprobs;
  readonly finish?: Exclude<FinishReason, "aborted">;
  readonly usage?: Usage;
  readonly timings?: Timings;
  readonly stopString?: string;
}

export async function* complete(
  engine: Engine,
  prompt: Prompt,
  options: GenerateOptions,
  echo: boolean,
): AsyncGenerator<CompletionPart> {
  const { tokenizer } = engine;
  const held = new HeldTokens(tokenizer, options.keepSpecialTokens ?? false);
  const writer = new LogprobsWriter(tokenizer, echo ? prompt.text : "");
  const spaces = new FirstSpace(tokenizer, true);
  let echoed = !echo;
  let leavesSpace = prompt.leavesSpace ?? false;
  for await (const piece of engine.generate(prompt.ids, options)) {
    if (piece.finish === "aborted") throw new NibbleError("aborted", "The request was cancelled.");
    if (!echoed) {
      echoed = true;
      const scores = piece.promptLogprobs;
      const logprobs = scores && promptLogprobs(writer, prompt, scores);
      yield { text: prompt.text, tokens: [], ...(logprobs ? { logprobs } : {}) };
    }
    held.add(piece);
    let text = spaces.text(piece.text, piece);
    if (leavesSpace && text !== "") {
      if (text.startsWith(" ")) text = text.slice(1);
      leavesSpace = false;
    }
    if (text === "" && !piece.finish) continue;
    const { tokens, logprobs } = held.take();
    yield {
      text,
      tokens,
      ...(logprobs ? { logprobs: writer.scored(logprobs) } : {}),
      ...(piece.finish
        ? { finish: piece.finish, usage: requireUsage(piece), timings: piece.timings, stopString: piece.stopString }
        : {}),
    };
    if (piece.finish) return;
  }
  throw new NibbleError("engine", `${engine.info.id}: the stream ended without a last piece.`);
}

/**
 * `scores` begins with the prompt's second token; a token that the server added is not the client's. The first token has
 * no score, as OpenAI's has none: evaluation harnesses count on it. Who wants it sends ids that begin with the BOS token.
 */
function promptLogprobs(
  writer: LogprobsWriter,
  prompt: Prompt,
  scores: NonNullable<Parameters<LogprobsWriter["scored"]>[0]>,
): CompletionLogprobs {
  const own = prompt.ids.slice(prompt.added);
  if (own.length === 0) return writer.scored([]);
  return joinLogprobs([writer.unscored(own[0]), writer.scored(scores.slice(prompt.added))]);
}
