/** The order in which many requests get their tokens, on a session that only counts. */
import { expect, test } from "vitest";
import { NibbleError } from "../../src/errors.ts";
import type { GenerateOptions, Piece, TokenConstraint } from "../../src/runtime/engine.ts";
import { Generation } from "../../src/runtime/generate.ts";
import { lookUp } from "../../src/runtime/lookup.ts";
import { BLOCK_TOKENS, PrefixCache } from "../../src/runtime/prefix-cache.ts";
import { resolveSampling } from "../../src/runtime/sampling.ts";
import { type BatchSession, Scheduler, type SchedulerOptions } from "../../src/runtime/scheduler.ts";
import { BYTE_VOCAB, byteTokenizer, oneHot } from "./fake-tokenizer.ts";

const BYTES_PER_TOKEN = 4;

/** A "model" that says (sum of all tokens) mod 256; its cache of a token is the token, so that a wrong row shows. */
class FakeSession implements BatchSession {
  readonly steps: string[] = [];
  readonly rows: number[][] = [];
  stepsDone = 0;
  mostBytes = 0;
  failAt = Number.POSITIVE_INFINITY;

  private next(row: number): Float32Array {
    return oneHot(this.rows[row].reduce((sum, token) => sum + token, 0) % 256);
  }

  private async step(name: string): Promise<void> {
    this.steps.push(name);
    await new Promise(setImmediate);
    this.stepsDone++;
    if (this.steps.length >= this.failAt) throw new Error("the model broke");
  }

  async append(row: number, past: number, tokens: readonly number[], rows: "last" | "all" = "last") {
    await this.step(`prefill ${row}: ${tokens.length}`);
    const held = (this.rows[row] ?? []).slice(0, past);
    expect(held).toHaveLength(past);
    this.rows[row] = held;
    const logits = tokens.map((token) => {
      held.push(token);
      return this.next(row);
    });
    return rows === "all" ? logits : logits.slice(-1);
  }

  async decode(pasts: readonly number[], tokens: readonly number[]) {
    await this.step(`decode ${tokens.length}`);
    return tokens.map((token, row) => {
      this.rows[row] = [...this.rows[row].slice(0, pasts[row]), token];
      expect(this.rows[row]).toHaveLength(pasts[row] + 1);
      return this.next(row);
    });
  }

  bytesFor(rows: number, tokens: number): number {
    return rows * tokens * BYTES_PER_TOKEN;
  }
  reserve(rows: number, tokens: number): void {
    this.mostBytes = Math.max(this.mostBytes, this.bytesFor(rows, tokens));
  }
  shrink(): void {}
  moveRow(from: number, to: number): void {
    this.rows[to] = [...(this.rows[from] ?? [])];
  }
  readTokens(row: number, start: number, count: number) {
    return [Int32Array.from(this.rows[row].slice(start, start + count))];
  }
  writeTokens(row: number, start: number, _count: number, [part]: readonly ArrayBufferView[]): void {
    this.rows[row] = [...(this.rows[row] ?? []).slice(0, start), ...(part as Int32Array)];
  }
}

function setUp(options: Partial<SchedulerOptions> = {}) {
  const session = new FakeSession();
  const clock = () => session.steps.length;
  const scheduler = new Scheduler(session, { maxBatch: 4, maxWaiting: 100, clock, ...options });
  const ask = (prompt: readonly number[], generate: GenerateOptions = {}, constraint?: TokenConstraint) => {
    const sampling = resolveSampling({ temperature: 0 }, {}, BYTE_VOCAB);
    const limits = { contextLength: 10_000 };
    const asked = { ignoreEos: true, ...generate };
    const generation = new Generation(byteTokenizer(), prompt, asked, sampling, limits, constraint);
    return scheduler.submit({ generation, signal: generate.signal });
  };
  return { session, scheduler, ask };
}

function expected(prompt: readonly number[], count: number): number[] {
  const tokens = [...prompt];
  while (tokens.length < prompt.length + count) tokens.push(tokens.reduce((a, b) => a + b, 0) % 256);
  return tokens.slice(prompt.length);
}

async function collect(pieces: AsyncIterable<Piece>): Promise<number[]> {
  const tokens: number[] = [];
  for await (const piece of pieces) tokens.push(...piece.tokens);
  return tokens;
}

test("sequences that join and leave at any step keep their own caches", async () => {
  const { ask, session } = setUp();
  const lengths = [5, 40, 1, 12, 3, 25, 7, 18, 2, 30];
  const prompts = lengths.map((length, i) => Array.from({ length }, (_, j) => (7 * i + 3 * j + 1) % 256));
  const answers = await Promise.all(prompts.map((prompt, i) => collect(ask(prompt, { maxTokens: 4 + 5 * (i % 4) }))));
  for (const [i, prompt] of prompts.entries()) expect(answers[i]).toEqual(expected(prompt, 4 + 5 * (i % 4)));
  expect(session.steps).toContain("decode 4");
});

test("a long prompt holds running streams up for one chunk at most", async () => {
  const { ask, session } = setUp({ prefillChunk: { alone: 64, beside: 16 } });
  const short: number[] = [];
  let long: Promise<number[]> | undefined;
  for await (const { tokens } of ask([1, 2], { maxTokens: 40 })) {
    short.push(...tokens);
    if (short.length > 3) long ??= collect(ask(new Array(200).fill(3), { maxTokens: 3 }));
  }
  expect(short).toEqual(expected([1, 2], 40));
  expect(await long).toEqual(expected(new Array(200).fill(3), 3));
  const from = session.steps.findIndex((step) => step.endsWith(": 16"));
  for (let i = from; session.steps[i]?.startsWith("prefill"); i += 2) expect(session.steps[i + 1]).toMatch(/^decode/);
});

test("a shared beginning is computed once, and what follows is right", async () => {
  const { ask, scheduler, session } = setUp({ prefixCacheBytes: 1 << 20 });
  const shared = Array.from({ length: 3 * BLOCK_TOKENS }, (_, i) => (i * 5) % 256);
  await collect(ask([...shared, 1, 2, 3], { maxTokens: 2 }));
  session.steps.length = 0;
  expect(await collect(ask([...shared, 9, 9], { maxTokens: 5 }))).toEqual(expected([...shared, 9, 9], 5));
  expect(session.steps[0]).toBe("prefill 0: 2");
  expect(scheduler.stats().cachedTokens).toBe(shared.length);
});

test("the prefix cache stays within its bytes and drops what was not used for longest", () => {
  const session = new FakeSession();
  const blockBytes = BLOCK_TOKENS * 4;
  const cache = new PrefixCache<ArrayBufferView>(session, 4 * blockBytes);
  const text = (seed: number) => Array.from({ length: 2 * BLOCK_TOKENS + 1 }, (_, i) => (seed * 31 + i) % 256);
  const keep = (seed: number) => {
    session.rows[0] = text(seed);
    cache.keep(0, text(seed), text(seed).length);
  };
  const find = (seed: number) => cache.restore(1, text(seed), () => {});
  keep(1);
  keep(2);
  expect(find(1)).toBe(2 * BLOCK_TOKENS); // used now: 2 is the older one
  keep(3);
  expect(cache.bytes).toBeLessThanOrEqual(4 * blockBytes);
  expect(find(1)).toBe(2 * BLOCK_TOKENS);
  expect(find(2)).toBe(0);
  expect(session.rows[1].slice(0, 2 * BLOCK_TOKENS)).toEqual(text(1).slice(0, 2 * BLOCK_TOKENS));
  // a prompt that is known to its last token still leaves one block to compute
  expect(cache.restore(1, text(1).slice(0, 2 * BLOCK_TOKENS), () => {})).toBe(BLOCK_TOKENS);
});

test("no more sequences run than their caches have room for", async () => {
  const { ask, session } = setUp({ maxKvBytes: 2 * 60 * BYTES_PER_TOKEN });
  const prompts = [1, 2, 3, 4].map((n) => new Array(50).fill(n));
  const answers = await Promise.all(prompts.map((prompt) => collect(ask(prompt, { maxTokens: 6 }))));
  for (const [i, prompt] of prompts.entries()) expect(answers[i]).toEqual(expected(prompt, 6));
  expect(session.steps).toContain("decode 2");
  expect(session.steps).not.toContain("decode 3");
});

test("one request too many is refused", async () => {
  const { ask } = setUp({ maxBatch: 1, maxWaiting: 2 });
  const running = [collect(ask([1], { maxTokens: 3 })), collect(ask([2], { maxTokens: 3 }))];
  expect(() => [ask([3]), ask([4])]).toThrow(expect.objectContaining({ code: "overloaded" }));
  await Promise.all(running);
});

test("an abort while waiting ends a request before it was begun", async () => {
  const { ask } = setUp({ maxBatch: 1 });
  const abort = new AbortController();
  const first = collect(ask([1], { maxTokens: 20 }));
  const second = ask([2], { maxTokens: 20, signal: abort.signal });
  abort.abort();
  const pieces: Piece[] = [];
  for await (const piece of second) pieces.push(piece);
  expect(pieces).toEqual([expect.objectContaining({ finish: "aborted", tokens: [] })]);
  expect(await first).toHaveLength(20);
});

test("a step that fails ends the requests that ran, and the next one is answered", async () => {
  const { ask, session } = setUp();
  session.failAt = 4;
  const running = [ask([1], { maxTokens: 50 }), ask([2], { maxTokens: 50 })].map(collect);
  for (const result of await Promise.allSettled(running)) {
    expect(result).toMatchObject({ status: "rejected", reason: { code: "engine" } });
  }
  session.failAt = Number.POSITIVE_INFINITY;
  expect(await collect(ask([5, 6], { maxTokens: 4 }))).toEqual(expected([5, 6], 4));
});

test("closing ends what runs with an error", async () => {
  const { ask, scheduler } = setUp();
  const running = collect(ask([1], { maxTokens: 5000 }));
  running.catch(() => undefined);
  await scheduler.close();
  await expect(running).rejects.toBeInstanceOf(NibbleError);
  expect(() => ask([1])).toThrow(/closed/);
});

test("guesses from the text itself are verified: the tokens are the same in fewer steps", async () => {
  const cycle = new Array(40).fill([0, 0, 0, 0]).flat(); // the sum stays 0: an answer that repeats itself
  const plain = setUp();
  const guessing = setUp({ speculate: true });
  const answer = await collect(plain.ask(cycle, { maxTokens: 40 }));
  expect(await collect(guessing.ask(cycle, { maxTokens: 40 }))).toEqual(answer);
  expect(guessing.session.steps.length).toBeLessThan(plain.session.steps.length / 3);
});

test("a guess is what followed the latest place that has enough behind it", () => {
  expect(lookUp([1, 2, 3, 9, 8, 7, 6, 1, 2, 3], 3)).toEqual([9, 8, 7]);
  expect(lookUp([1, 2, 5, 5, 1, 2, 6, 6, 1, 2], 2)).toEqual([6, 6]);
  expect(lookUp([4, 4, 4, 4, 4, 4, 4, 4], 3)).toEqual([4, 4, 4]);
  expect(lookUp([1, 2, 3], 3)).toEqual([]);
});

test("a mask is made once the step is asked for whose logits it masks; one that fails ends its own request", async () => {
  const { session, ask } = setUp();
  const madeAt: string[] = [];
  const evenOnly = new Uint32Array(8).fill(0x55555555);
  const constraint = (failsAfter: number): TokenConstraint => {
    let accepted = 0;
    return {
      done: false,
      allowed() {
        madeAt.push(`${session.steps.length} begun, ${session.stepsDone} done`);
        if (accepted >= failsAfter) throw new Error("no such state");
        return evenOnly;
      },
      accept: () => accepted++,
    };
  };
  const tokens = await collect(ask([1, 2], { maxTokens: 2 }, constraint(9)));
  expect(tokens.every((id) => id % 2 === 0)).toBe(true);
  expect(madeAt).toEqual(["1 begun, 0 done", "1 begun, 1 done", "2 begun, 1 done", "2 begun, 2 done"]);

  const other = collect(ask([3, 4], { maxTokens: 3 }));
  await expect(collect(ask([5], { maxTokens: 3 }, constraint(1)))).rejects.toThrow("no such state");
  expect(await other).toEqual(expected([3, 4], 3));
});

test("a first text rests before the next step; a first token that says nothing does not", async () => {
  const rested: number[] = [];
  const { session, ask } = setUp({ rest: async () => void rested.push(session.steps.length) });
  await collect(ask([65], { maxTokens: 3 }));
  expect(rested).toEqual([1]);
  await collect(ask([0xc3], { maxTokens: 3 })); // half a character
  expect(rested).toEqual([1]);
});
