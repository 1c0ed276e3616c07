/** `prompt` of completions and `input` of embeddings: text, texts, token ids or lists of them. */
import { z } from "zod";
import type { Tokenizer } from "../../src/tokenizer/tokenizer.ts";
import { badValue } from "./errors.ts";

/** As many as OpenAI embeds in one request. */
const MAX_PROMPTS = 2048;
const tokenId = z.int().min(0);

export const promptInput = z.union([
  z.string(),
  z.array(z.string()).min(1).max(MAX_PROMPTS),
  z.array(tokenId).min(1),
  z.array(z.array(tokenId).min(1)).min(1).max(MAX_PROMPTS),
]);
export type PromptInput = z.infer<typeof promptInput>;

export interface Prompt {
  readonly ids: readonly number[];
  readonly text: string;
  /** How many ids at the front the server added (the begin-of-sequence token). */
  readonly added: number;
  /** The space at its end is not among the ids: the answer begins with it, and it is taken off there. */
  readonly leavesSpace?: boolean;
}

export function toPrompts(input: PromptInput, tokenizer: Tokenizer, vocabSize: number, param: string): Prompt[] {
  const items: readonly (string | readonly number[])[] =
    typeof input === "string" || typeof input[0] === "number"
      ? [input as string | readonly number[]]
      : (input as readonly (string | readonly number[])[]);
  return items.map((item, index) => {
    if (typeof item === "string") {
      const ids = tokenizer.encode(item);
      const added = ids[0] === tokenizer.bosId && tokenizer.bosId !== undefined ? 1 : 0;
      return { ids, text: item, added };
    }
    requireIds(item, vocabSize, items.length === 1 ? param : `${param}[${index}]`);
    return { ids: item, text: tokenizer.decode(item, { skipSpecialTokens: false }), added: 0 };
  });
}

export function requireIds(ids: readonly number[], vocabSize: number, param: string): void {
  const wrong = ids.find((id) => id >= vocabSize);
  if (wrong === undefined) return;
  throw badValue(param, `Invalid token id ${wrong} in '${param}': ids are 0 .. ${vocabSize - 1}.`);
}
