/**
 * The generation of one request: rows of logits in, pieces of text out. Whatever computes the logits (a batch in Node,
 * a page's WebGPU) hands each row to `take`: `scheduler.ts` for many sequences together, a page's engine for one.
 */
import { NibbleError } from "../errors.ts";
import type { StreamingDecoder, Tokenizer } from "../tokenizer/tokenizer.ts";
import type { FinishReason, GeneratedToken, GenerateOptions, Piece, TokenConstraint, Usage } from "./engine.ts";
import { type Guess, Sampler, type Sampling } from "./sampling.ts";
import { StopStrings } from "./stop.ts";

/** OpenAI's limit, and what is worth computing. */
const MAX_TOP_LOGPROBS = 20;

export interface GenerationLimits {
  readonly contextLength: number;
}

export class Generation {
  /** Prompt and answer so far; the last one has not been through the model yet. */
  readonly tokens: number[];
  readonly promptTokens: number;
  private readonly sampler: Sampler;
  private readonly decoder: StreamingDecoder;
  private readonly stops: StopStrings;
  private readonly endIds: ReadonlySet<number>;
  private readonly endList: readonly number[];
  private readonly maxTokens: number;
  /** Made since the last piece that had text. */
  private pending: number[] = [];
  private pendingLogprobs: GeneratedToken[] = [];
  private generated = 0;
  finished = false;

  constructor(
    tokenizer: Tokenizer,
    prompt: readonly number[],
    private readonly options: GenerateOptions,
    sampling: Sampling,
    { contextLength }: GenerationLimits,
    private readonly constraint?: TokenConstraint,
  ) {
    this.tokens = [...prompt];
    this.promptTokens = prompt.length;
    const { topLogprobs, maxTokens = Number.POSITIVE_INFINITY } = options;
    if (
      topLogprobs !== undefined &&
      !(Number.isInteger(topLogprobs) && topLogprobs >= 0 && topLogprobs <= MAX_TOP_LOGPROBS)
    ) {
      throw new NibbleError(
        "bad_option",
        `topLogprobs: ${topLogprobs} is no whole number of 0 .. ${MAX_TOP_LOGPROBS}.`,
        {
          param: "topLogprobs",
        },
      );
    }
    if (!(maxTokens >= 0)) {
      throw new NibbleError("bad_option", `maxTokens: ${maxTokens} is not 0 or more.`, { param: "maxTokens" });
    }
    if (prompt.length === 0)
      throw new NibbleError("bad_option", "The prompt holds no token; there is nothing to go on from.");
    if (prompt.length >= contextLength) {
      throw new NibbleError(
        "context_length",
        `The prompt has ${prompt.length} tokens and this model's context holds ${contextLength}, answer included. Shorten it.`,
        { param: "messages" },
      );
    }
    this.maxTokens = Math.min(maxTokens, contextLength - prompt.length);
    this.sampler = new Sampler(sampling, prompt, topLogprobs);
    this.decoder = tokenizer.streamingDecoder({ skipSpecialTokens: !options.keepSpecialTokens });
    this.stops = new StopStrings(options.stop);
    this.endIds = new Set([...(options.ignoreEos ? [] : tokenizer.eosIds), ...(options.stopTokens ?? [])]);
    this.endList = [...this.endIds];
  }

  /** The answer's tokens so far. */
  get completionTokens(): number {
    return this.generated;
  }

  get tokensLeft(): number {
    return this.finished ? 0 : this.maxTokens - this.generated;
  }

  /** Whether another token may be made at all. */
  get wantsToken(): boolean {
    return this.tokensLeft > 0;
  }

  /**
   * Makes the mask of the next token, which depends on the tokens before it alone: called once the step that gives its
   * logits is asked for, and where that runs elsewhere, beside it. What fails here fails in `take` again, as this
   * request's error.
   */
  prepareMask(): void {
    try {
      if (!this.finished) this.constraint?.allowed();
    } catch {}
  }

  /** What a draft model's logits say comes next. */
  guess(logits: Float32Array): Guess {
    return this.sampler.guess(logits);
  }

  /**
   * Chooses the next token from the row after the last one; returns a piece where there is something to say.
   * @param guess what was guessed; where it was right the token is the same.
   */
  take(logits: Float32Array, guess?: Guess): Piece | undefined {
    const token = this.sampler.next(logits, this.constraint, this.endList, guess);
    this.tokens.push(token.id);
    this.generated++;
    this.pending.push(token.id);
    if (this.options.topLogprobs !== undefined) this.pendingLogprobs.push(token);
    if (this.endIds.has(token.id)) {
      // the end token's own text is said only where special tokens are
      const said = this.options.keepSpecialTokens ? this.stops.push(this.decoder.push(token.id)) : { text: "" };
      return this.end("stop", said.text, said.stopString);
    }
    this.constraint?.accept(token.id);
    const { text, stopString } = this.stops.push(this.decoder.push(token.id));
    if (stopString !== undefined) return this.end("stop", text, stopString);
    if (this.generated >= this.maxTokens) return this.end("length", text);
    return text === "" ? undefined : this.piece(text);
  }

  /** Ends it with what is held back: after the last token, or because the caller or the server says so. */
  end(finish: FinishReason, said = "", stopString?: string): Piece {
    let text = said;
    if (stopString === undefined) {
      const rest = this.stops.push(this.decoder.end());
      text += rest.text + (rest.stopString === undefined ? this.stops.end() : "");
    }
    this.finished = true;
    return { ...this.piece(text), finish, ...(stopString === undefined ? {} : { stopString }) };
  }

  usage(cachedTokens: number): Usage {
    return { promptTokens: this.promptTokens, cachedTokens, completionTokens: this.generated };
  }

  private piece(text: string): Piece {
    const tokens = this.pending;
    const logprobs = this.pendingLogprobs;
    this.pending = [];
    this.pendingLogprobs = [];
    return { text, tokens, ...(this.options.topLogprobs === undefined ? {} : { logprobs }) };
  }
}
