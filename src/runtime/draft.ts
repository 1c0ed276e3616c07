/**
 * A draft model (Leviathan et al. 2023, arXiv 2211.17192): a smaller model with the same tokens says what may come
 * next, one cheap step a token, and the model verifies all of it in one step. It has a cache of its own, of one
 * sequence: the one that runs alone.
 */
import { NibbleError } from "../errors.ts";
import type { Tokenizer } from "../tokenizer/tokenizer.ts";
import type { Guess } from "./sampling.ts";
import type { BatchSession } from "./scheduler.ts";

/** Tokens of a text read at once, before guesses can begin: nobody who waits is held up for longer. */
const READ_CHUNK = 256;

export class DraftModel {
  /** Tokens in the cache. */
  private held: number[] = [];

  constructor(
    private readonly session: BatchSession,
    /** Tokens that its cache may hold. */
    readonly contextLength: number,
  ) {}

  /**
   * Up to `count` guesses at what follows `tokens`, each chosen by `choose` from a row of logits (vocab). None while a
   * text is still being read (a chunk a call), and none beyond the draft's own context.
   */
  async guess(tokens: readonly number[], count: number, choose: (logits: Float32Array) => Guess): Promise<Guess[]> {
    const room = Math.min(count, this.contextLength - tokens.length + 1);
    if (room <= 0) return [];
    let same = 0;
    while (same < this.held.length && same < tokens.length - 1 && this.held[same] === tokens[same]) same++;
    const unread = tokens.slice(same, same + READ_CHUNK);
    this.held.length = same; // the rest of the cache is written over
    let [logits] = await this.session.append(0, same, unread);
    this.held.push(...unread);
    if (this.held.length < tokens.length) return [];
    const guesses = [choose(logits)];
    while (guesses.length < room) {
      const { id } = guesses[guesses.length - 1];
      [logits] = await this.session.decode([this.held.length], [id]);
      this.held.push(id);
      guesses.push(choose(logits));
    }
    return guesses;
  }
}

/** Error `unsupported` where two models do not write the same tokens; `draft` and `model` name them. */
export function requireSameTokens(model: string, tokens: Tokenizer, draft: string, others: Tokenizer): void {
  const refuse = (what: string) => {
    throw new NibbleError("unsupported", `${draft} cannot guess for ${model}: ${what}. A draft needs its tokenizer.`, {
      param: "draft",
    });
  };
  if (tokens.vocabSize !== others.vocabSize) {
    refuse(`it has ${others.vocabSize} tokens, and ${model} ${tokens.vocabSize}`);
  }
  for (let id = 0; id < tokens.vocabSize; id++) {
    const [here, there] = [tokens.tokenBytes(id), others.tokenBytes(id)];
    if (here.length === there.length && here.every((byte, i) => byte === there[i])) continue;
    const text = (bytes: Uint8Array) => JSON.stringify(new TextDecoder().decode(bytes));
    refuse(`token ${id} is ${text(there)} there, and ${text(here)} here`);
  }
}
