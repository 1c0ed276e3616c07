/**
 * Many sequences on one session (continuous batching): those that are generating decode together, one token each;
 * between two such steps one new request gets a chunk of its prompt computed. Sequences join and leave at any step.
 *   rows 0 .. n-1   sequences that decode, without gaps
 *   row  n          the one whose prompt is being read, if any
 */
import { NibbleError } from "../errors.ts";
import { type WindowPolicy, windowTokens } from "../kv/window.ts";
import type { DraftModel } from "./draft.ts";
import type { EngineStats, GeneratedToken, Piece } from "./engine.ts";
import type { Generation } from "./generate.ts";
import { GUESS_TOKENS, GuessGauge, lookUp } from "./lookup.ts";
import { BLOCK_TOKENS, type BlockStore, PrefixCache } from "./prefix-cache.ts";
import { type Guess, Scores } from "./sampling.ts";
import type { Rows } from "./session.ts";
import { Stream } from "./stream.ts";

/** What the scheduler needs of a session (`DecoderSession`). */
export interface BatchSession {
  append(row: number, past: number, tokens: readonly number[], rows?: Rows): Promise<Float32Array[]>;
  decode(pasts: readonly number[], tokens: readonly number[]): Promise<Float32Array[]>;
  reserve(rows: number, tokens: number): void;
  shrink(rows: number, tokens: number): void;
  moveRow(from: number, to: number): void;
  bytesFor(rows: number, tokens: number): number;
  readTokens(row: number, start: number, count: number): ArrayBufferView[];
  writeTokens(row: number, start: number, count: number, parts: readonly ArrayBufferView[]): void;
}

export interface SchedulerOptions {
  readonly maxBatch: number;
  /** Forget what lies between the first tokens and the recent ones, instead of ending at the context's length. */
  readonly window?: WindowPolicy;
  /** Requests that may wait; one more is `overloaded`. */
  readonly maxWaiting: number;
  /** Prompt tokens computed at once while nobody else waits for a token, and while somebody does. */
  readonly prefillChunk?: { readonly alone: number; readonly beside: number };
  /**
   * What of a prompt is no whole block of the prefix cache is computed by itself, as it is where the blocks were found:
   * for a session to which pieces of other sizes give other roundings. The same request gets the same answer then.
   */
  readonly wholeBlocks?: boolean;
  /** Most memory of the caches of running sequences; another one waits until there is room. */
  readonly maxKvBytes?: number;
  readonly prefixCacheBytes?: number;
  /** Where computed prefixes outlive the process. */
  readonly prefixStore?: BlockStore<ArrayBufferView>;
  /** Guess tokens by prompt lookup when one sequence runs alone. */
  readonly speculate?: boolean;
  /** Guesses where the text itself says nothing. */
  readonly draft?: DraftModel;
  /** Milliseconds, to find out whether guessing pays. */
  readonly clock?: () => number;
  /** Awaited once an answer's first text is said, where that is its first token's: who hands it on needs a core, and the next step takes them all. */
  readonly rest?: () => Promise<void>;
  /** A text that grows beyond so many tokens is computed again from its start, in one piece (longrope). */
  readonly recomputeAbove?: number;
}

/** 512 is where prefill throughput is flat (measured); 128 holds running streams up for about four of their steps. */
const PREFILL_CHUNK = { alone: 512, beside: 128 };

export interface Request {
  readonly generation: Generation;
  readonly signal?: AbortSignal;
  readonly promptLogprobs?: number;
}

interface Sequence extends Request {
  readonly stream: Stream<Piece>;
  /** What the model sees: the generation's own tokens, or under a window those that it kept. */
  seen: number[];
  /** How many of them are in the cache. */
  past: number;
  cachedTokens: number;
  startedAt: number;
  firstTokenAt: number;
  readonly lookupGauge: GuessGauge;
  readonly draftGauge: GuessGauge;
  promptScores: GeneratedToken[];
  left: boolean;
}

export class Scheduler {
  private readonly waiting: Sequence[] = [];
  private readonly decoding: Sequence[] = [];
  private prefilling: Sequence | undefined;
  /** Sequences whose window moved: they are read again before anybody new is. */
  private readonly shifted: Sequence[] = [];
  private busy: Promise<void> | undefined;
  /** Set and cleared in one go with what it says, so that no request arrives between the last look and the end. */
  private working = false;
  private closed = false;
  private readonly prefixes: PrefixCache<ArrayBufferView>;
  /** Milliseconds of a step of one sequence without a guess, moving mean. */
  private plainStepMs: number | undefined;
  private readonly clock: () => number;
  private readonly counts = { generatedTokens: 0, promptTokens: 0, cachedTokens: 0 };

  constructor(
    private readonly session: BatchSession,
    private readonly options: SchedulerOptions,
  ) {
    this.prefixes = new PrefixCache(session, options.prefixCacheBytes ?? 0, options.prefixStore);
    this.clock = options.clock ?? (() => performance.now());
  }

  stats(): EngineStats {
    return {
      running: this.decoding.length + this.shifted.length + (this.prefilling ? 1 : 0),
      waiting: this.waiting.length,
      ...this.counts,
    };
  }

  /** Queues a request; errors: `overloaded`. */
  submit(request: Request): AsyncIterable<Piece> {
    if (this.closed) throw new NibbleError("engine", "The engine is closed.");
    if (this.waiting.length >= this.options.maxWaiting) {
      throw new NibbleError(
        "overloaded",
        `${this.stats().running} requests are running and ${this.waiting.length} are waiting; try again later.`,
      );
    }
    const sequence: Sequence = {
      ...request,
      stream: new Stream<Piece>(() => {
        sequence.left = true;
      }),
      seen: this.options.window
        ? windowTokens(request.generation.tokens, this.options.window)
        : request.generation.tokens,
      past: 0,
      cachedTokens: 0,
      startedAt: 0,
      firstTokenAt: 0,
      lookupGauge: new GuessGauge(),
      draftGauge: new GuessGauge(),
      promptScores: [],
      left: false,
    };
    this.waiting.push(sequence);
    if (!this.working) this.busy = this.work();
    return sequence.stream;
  }

  /** Ends everything; requests get an error. */
  async close(): Promise<void> {
    this.closed = true;
    const error = new NibbleError("engine", "The engine was closed while this request ran.");
    this.failRunning(error);
    for (const { stream } of this.waiting.splice(0)) stream.fail(error);
    await this.busy;
    this.prefixes.clear();
  }

  private async work(): Promise<void> {
    this.working = true;
    while (!this.closed) {
      try {
        this.dropStopped();
        this.admit();
        if (!this.prefilling && this.decoding.length === 0) break;
        if (this.prefilling) await this.prefillChunk(this.prefilling);
        if (this.decoding.length > 0) await this.decodeStep();
      } catch (error) {
        // the cache may be half written: nobody who runs can go on from it, and those who wait begin anew
        const message = `A step of the model failed: ${error instanceof Error ? error.message : error}`;
        this.failRunning(error instanceof NibbleError ? error : new NibbleError("engine", message, { cause: error }));
      }
    }
    this.working = false;
  }

  private failRunning(error: NibbleError): void {
    const reading = this.prefilling ? [this.prefilling] : [];
    for (const { stream } of [...this.decoding, ...this.shifted, ...reading]) stream.fail(error);
    this.shifted.length = 0;
    this.decoding.length = 0;
    this.prefilling = undefined;
  }

  private dropStopped(): void {
    const stopped = (sequence: Sequence) => sequence.left || sequence.signal?.aborted || sequence.generation.finished;
    for (const queue of [this.waiting, this.shifted]) {
      for (let i = queue.length - 1; i >= 0; i--) if (stopped(queue[i])) this.finish(queue.splice(i, 1)[0]);
    }
    if (this.prefilling && stopped(this.prefilling)) {
      this.finish(this.prefilling);
      this.prefilling = undefined;
    }
    for (let i = this.decoding.length - 1; i >= 0; i--) if (stopped(this.decoding[i])) this.leave(i);
  }

  private leave(row: number): void {
    const sequence = this.decoding[row];
    this.prefixes.keep(row, sequence.seen, sequence.past);
    this.finish(sequence);
    this.takeOut(row);
  }

  /** Takes a sequence out of the batch and closes the gap. */
  private takeOut(row: number): void {
    const last = this.decoding.length - 1;
    if (row !== last) {
      this.session.moveRow(last, row);
      this.decoding[row] = this.decoding[last];
    }
    this.decoding.length = last;
    if (this.prefilling) this.session.moveRow(last + 1, last);
  }

  private finish(sequence: Sequence): void {
    const { generation, stream } = sequence;
    if (!generation.finished) this.say(sequence, generation.end("aborted"));
    stream.end();
  }

  private admit(): void {
    const { maxBatch, maxKvBytes = Number.POSITIVE_INFINITY } = this.options;
    if (this.decoding.length === 0 && !this.prefilling) this.session.shrink(0, 0);
    this.prefilling ??= this.shifted.shift();
    while (!this.prefilling && this.waiting.length > 0 && this.decoding.length < maxBatch) {
      const next = this.waiting[0];
      const row = this.decoding.length;
      const longest = Math.max(next.seen.length, ...this.decoding.map(({ past }) => past));
      if (row > 0 && this.session.bytesFor(row + 1, longest) > maxKvBytes) break; // until somebody leaves
      this.waiting.shift();
      next.startedAt = performance.now();
      this.counts.promptTokens += next.generation.promptTokens;
      if (!next.generation.wantsToken && next.promptLogprobs === undefined) {
        this.say(next, next.generation.end("length"));
        next.stream.end();
        continue;
      }
      this.prefilling = next;
      if (next.promptLogprobs === undefined) {
        const reserve = (tokens: number) => this.session.reserve(row + 1, tokens);
        next.past = this.prefixes.restore(row, next.seen, reserve);
        next.cachedTokens = next.past;
        this.counts.cachedTokens += next.past;
      }
    }
  }

  private async prefillChunk(sequence: Sequence): Promise<void> {
    const { generation, promptLogprobs } = sequence;
    const row = this.decoding.length;
    const { alone, beside } = this.options.prefillChunk ?? PREFILL_CHUNK;
    const prompt = sequence.seen;
    const { recomputeAbove: limit = Number.POSITIVE_INFINITY } = this.options;
    const size = row > 0 ? beside : alone;
    // the first piece of a text beyond the limit reaches beyond it: every key is rotated for a long text
    const reach = prompt.length > limit ? Math.max(size, limit + 1 - sequence.past) : size;
    const end = this.pieceEnd(sequence, sequence.past + reach);
    const chunk = prompt.slice(sequence.past, end);
    const running = this.session.append(row, sequence.past, chunk, promptLogprobs === undefined ? "last" : "all");
    if (end === prompt.length) generation.prepareMask();
    const logits = await running;
    if (this.prefilling !== sequence) return; // closed meanwhile
    if (promptLogprobs !== undefined) {
      for (const [i, scored] of logits.entries()) {
        const id = prompt[sequence.past + i + 1];
        if (id === undefined) break;
        const scores = new Scores(scored, promptLogprobs);
        sequence.promptScores.push({ id, logprob: scores.of(id), top: scores.top });
      }
    }
    sequence.past = end;
    if (end < prompt.length) return;
    this.prefilling = undefined;
    const first = sequence.firstTokenAt === 0;
    if (first) sequence.firstTokenAt = performance.now();
    let said = true;
    if (!generation.wantsToken) this.say(sequence, generation.end("length"));
    else said = this.take(sequence, logits[logits.length - 1]);
    this.decoding.push(sequence); // dropStopped takes it out again where that was its only token
    if (!first) return;
    if (said) await this.options.rest?.();
    if (this.decoding[row] === sequence) this.prefixes.keep(row, prompt, end); // else closed meanwhile
  }

  /** Where a piece of the prompt ends that may reach to `limit`. */
  private pieceEnd({ seen, past }: Sequence, limit: number): number {
    const { wholeBlocks, prefixCacheBytes = 0, recomputeAbove } = this.options;
    const blocks = BLOCK_TOKENS * Math.floor((seen.length - 1) / BLOCK_TOKENS);
    const isCut = wholeBlocks && prefixCacheBytes > 0 && recomputeAbove === undefined && past < blocks;
    return Math.min(isCut ? blocks : seen.length, limit);
  }

  private async decodeStep(): Promise<void> {
    const batch = this.decoding.filter(({ generation }) => !generation.finished);
    if (batch.length !== this.decoding.length) return; // dropStopped closes the gaps first
    if (this.options.window && this.moveWindows(this.options.window)) return;
    if (batch.length === 1 && (await this.guessStep(batch[0]))) return;
    if (batch.length === 1 && batch[0].past === this.options.recomputeAbove) {
      const [sequence] = batch;
      const [row] = await this.session.append(0, 0, sequence.seen);
      sequence.past = sequence.seen.length;
      this.take(sequence, row);
      return;
    }
    const startedAt = this.clock();
    const running = this.session.decode(
      batch.map(({ past }) => past),
      batch.map(({ seen }) => seen[seen.length - 1]),
    );
    for (const { generation } of batch) generation.prepareMask();
    const logits = await running;
    if (batch.length === 1) {
      const ms = this.clock() - startedAt;
      this.plainStepMs = this.plainStepMs === undefined ? ms : 0.8 * this.plainStepMs + 0.2 * ms;
    }
    for (const [i, sequence] of batch.entries()) {
      sequence.past++;
      this.take(sequence, logits[i]);
    }
  }

  /** Sends sequences whose cache is full back to be read again; whether there were any. */
  private moveWindows(window: WindowPolicy): boolean {
    let moved = false;
    for (let row = this.decoding.length - 1; row >= 0; row--) {
      const sequence = this.decoding[row];
      if (sequence.past < window.budget) continue;
      this.takeOut(row);
      sequence.seen = windowTokens(sequence.seen, window);
      sequence.past = 0;
      this.shifted.push(sequence);
      moved = true;
    }
    return moved;
  }

  /** One step over guesses; false where there are none. */
  private async guessStep(sequence: Sequence): Promise<boolean> {
    const { generation, seen, lookupGauge, draftGauge } = sequence;
    const { window, speculate, draft } = this.options;
    const plainMs = this.plainStepMs;
    const room = Math.min(generation.tokensLeft, window ? window.budget - sequence.past : Infinity) - 1;
    const count = Math.min(GUESS_TOKENS, room);
    if (count <= 0 || plainMs === undefined) return false; // a guess is measured against a step without
    const startedAt = this.clock();
    let gauge = lookupGauge;
    let guesses: Guess[] = [];
    if (speculate && lookupGauge.wantsGuess) guesses = lookUp(seen, count).map((id) => ({ id }));
    if (guesses.length === 0 && draft && draftGauge.wantsGuess) {
      gauge = draftGauge;
      guesses = await draft.guess(seen, count, (logits) => generation.guess(logits));
    }
    if (guesses.length === 0 || this.decoding[0] !== sequence) return false; // or it was closed meanwhile
    const tokens = [seen[seen.length - 1], ...guesses.map(({ id }) => id)];
    const logits = await this.session.append(0, sequence.past, tokens, "all");
    let accepted = 0;
    for (const [i, row] of logits.entries()) {
      sequence.past++; // the token before this row is right: its keys and values stay
      this.take(sequence, row, guesses[i]);
      if (generation.finished || seen[seen.length - 1] !== guesses[i]?.id) break;
      accepted++;
    }
    gauge.tried(accepted, (this.clock() - startedAt) / plainMs - 1);
    return true;
  }

  /** Whether there was something to say. */
  private take(sequence: Sequence, logits: Float32Array, guess?: Guess): boolean {
    if (sequence.left || sequence.signal?.aborted) return false;
    try {
      const { generation, seen } = sequence;
      const piece = generation.take(logits, guess);
      if (seen !== generation.tokens) seen.push(generation.tokens[generation.tokens.length - 1]);
      this.counts.generatedTokens++;
      if (piece) this.say(sequence, piece);
      return piece !== undefined;
    } catch (error) {
      sequence.stream.fail(error); // one request's fault (a grammar, damaged logits) is not the others'
      sequence.left = true;
      return false;
    }
  }

  /** Hands out a piece; the first one carries the prompt's scores, the last one usage and times. */
  private say(sequence: Sequence, piece: Piece): void {
    const { promptScores, stream, generation, startedAt, firstTokenAt, cachedTokens } = sequence;
    const now = performance.now();
    const first = promptScores.length > 0 ? { promptLogprobs: promptScores } : {};
    sequence.promptScores = [];
    if (piece.finish === undefined) {
      stream.push({ ...piece, ...first });
      return;
    }
    const prefilled = firstTokenAt || now;
    const timings = { prefillMs: startedAt ? prefilled - startedAt : 0, decodeMs: now - prefilled };
    stream.push({ ...piece, ...first, usage: generation.usage(cachedTokens), timings });
  }
}
