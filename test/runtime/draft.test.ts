/** Guessing with a draft model: the answers are the model's own, in distribution and, where there is one answer, in every token. */
import { expect, test } from "vitest";
import { DraftModel, requireSameTokens } from "../../src/runtime/draft.ts";
import type { GenerateOptions } from "../../src/runtime/engine.ts";
import { Generation } from "../../src/runtime/generate.ts";
import { Random } from "../../src/runtime/random.ts";
import { resolveSampling, Sampler, type Sampling } from "../../src/runtime/sampling.ts";
import { type BatchSession, Scheduler } from "../../src/runtime/scheduler.ts";
import { BYTE_VOCAB, byteTokenizer } from "./fake-tokenizer.ts";

const VOCAB = 6;

/** Logits that depend on the last two tokens, `sharpness` times those of a fixed random table. */
function tableModel(seed: number, vocab: number, active = vocab) {
  const random = new Random(seed);
  const table = Float32Array.from({ length: active * active * active }, () => 3 * random.uniform());
  return (tokens: readonly number[]): Float32Array => {
    const [a, b] = [tokens.at(-2) ?? 0, tokens.at(-1)!].map((token) => token % active);
    const logits = new Float32Array(vocab).fill(Number.NEGATIVE_INFINITY);
    logits.set(table.subarray((a * active + b) * active, (a * active + b + 1) * active));
    return logits;
  };
}

/** Sum of squared differences over their expectation, of counts and probabilities. */
function chiSquare(counts: readonly number[], probabilities: readonly number[]): number {
  const total = counts.reduce((a, b) => a + b, 0);
  return counts.reduce((sum, count, i) => {
    const expected = total * probabilities[i];
    return expected === 0 ? sum + (count > 0 ? Number.POSITIVE_INFINITY : 0) : sum + (count - expected) ** 2 / expected;
  }, 0);
}

/** What a request's sampling makes of logits, by plain arithmetic over the sorted vocabulary. */
function distribution(logits: Float32Array, { temperature, topK, topP, minP }: Sampling): number[] {
  const order = [...logits.keys()].sort((a, b) => logits[b] - logits[a] || a - b);
  let kept = order.map((id) => ({ id, weight: Math.exp((logits[id] - logits[order[0]]) / temperature) }));
  if (topK > 0) kept = kept.slice(0, topK);
  const total = kept.reduce((sum, { weight }) => sum + weight, 0);
  let mass = 0;
  kept = kept.filter(({ weight }, i) => {
    const stays = i === 0 || (mass < topP * total && weight >= minP);
    mass += weight;
    return stays;
  });
  const rest = kept.reduce((sum, { weight }) => sum + weight, 0);
  const out = new Array<number>(logits.length).fill(0);
  for (const { id, weight } of kept) out[id] = weight / rest;
  return out;
}

/** 99.9 % of right samplers stay below this with 5 degrees of freedom (fewer where tokens are cut off). */
const CHI_SQUARE_5_AT_999 = 20.52;
const DRAWS = 20_000;
/** Of a share of so many draws, at its widest. */
const FOUR_SIGMA = 4 * Math.sqrt(0.25 / DRAWS);

test.each([
  ["plain", {}],
  ["hot", { temperature: 2 }],
  ["top-k", { temperature: 0.8, topK: 3 }],
  ["top-p", { topP: 0.7 }],
  ["min-p", { minP: 0.3 }],
])("a token after a guess is distributed as without one (%s)", (_, options) => {
  const sampling = resolveSampling(options, {}, VOCAB);
  const sampler = new Sampler(sampling, [], undefined, new Random(11));
  const [model, draft] = [tableModel(1, VOCAB), tableModel(2, VOCAB)];
  for (const text of [
    [0, 1],
    [3, 2],
    [5, 5],
  ]) {
    const counts = new Array<number>(VOCAB).fill(0);
    let accepted = 0;
    for (let i = 0; i < DRAWS; i++) {
      const guess = sampler.guess(draft(text));
      const { id } = sampler.next(model(text), undefined, [], guess);
      counts[id]++;
      if (id === guess.id) accepted++;
    }
    const target = distribution(model(text), sampling);
    expect(chiSquare(counts, target)).toBeLessThan(CHI_SQUARE_5_AT_999);
    // Leviathan et al., corollary 3.6: accepted with probability sum of min(p, q)
    const rate = target.reduce((sum, p, id) => sum + Math.min(p, distribution(draft(text), sampling)[id]), 0);
    expect(Math.abs(accepted / DRAWS - rate)).toBeLessThan(FOUR_SIGMA);
    expect(rate).toBeLessThan(0.97); // the two models do differ
  }
});

test("taking the draft's token without a second look would be noticed", () => {
  const sampling = resolveSampling({}, {}, VOCAB);
  const sampler = new Sampler(sampling, [], undefined, new Random(11));
  const counts = new Array<number>(VOCAB).fill(0);
  for (let i = 0; i < DRAWS; i++) counts[sampler.guess(tableModel(2, VOCAB)([0, 1])).id]++;
  expect(chiSquare(counts, distribution(tableModel(1, VOCAB)([0, 1]), sampling))).toBeGreaterThan(100);
});

/** A session whose logits are `model`'s; counts its steps. */
class TableSession implements BatchSession {
  steps = 0;
  private readonly rows: number[][] = [];

  constructor(private readonly model: (tokens: readonly number[]) => Float32Array) {}

  private put(row: number, past: number, tokens: readonly number[]): Float32Array[] {
    const held = (this.rows[row] ??= []);
    expect(held.length).toBeGreaterThanOrEqual(past);
    held.length = past;
    return tokens.map((token) => {
      held.push(token);
      return this.model(held);
    });
  }

  async append(row: number, past: number, tokens: readonly number[], rows: "last" | "all" = "last") {
    this.steps++;
    const logits = this.put(row, past, tokens);
    return rows === "all" ? logits : logits.slice(-1);
  }
  async decode(pasts: readonly number[], tokens: readonly number[]) {
    this.steps++;
    return tokens.map((token, row) => this.put(row, pasts[row], [token])[0]);
  }
  bytesFor = () => 0;
  reserve() {}
  shrink() {}
  moveRow(from: number, to: number) {
    this.rows[to] = [...(this.rows[from] ?? [])];
  }
  readTokens = () => [];
  writeTokens() {}
}

const ACTIVE = 40;

function setUp(draftModel: (tokens: readonly number[]) => Float32Array, options: { draftSteps?: number } = {}) {
  const session = new TableSession(tableModel(7, BYTE_VOCAB, ACTIVE));
  const draftSession = new TableSession(draftModel);
  const { draftSteps = 0.1 } = options; // what one of the draft's steps costs, in steps of the model
  const clock = () => session.steps + draftSteps * draftSession.steps;
  const scheduler = new Scheduler(session, {
    maxBatch: 4,
    maxWaiting: 10,
    draft: new DraftModel(draftSession, 10_000),
    clock,
  });
  const plain = new Scheduler(new TableSession(tableModel(7, BYTE_VOCAB, ACTIVE)), { maxBatch: 4, maxWaiting: 10 });
  const ask = async (prompt: readonly number[], generate: GenerateOptions, from = scheduler) => {
    const generation = new Generation(
      byteTokenizer(),
      prompt,
      { ignoreEos: true, ...generate },
      resolveSampling(generate, {}, BYTE_VOCAB),
      { contextLength: 10_000 },
    );
    const tokens: number[] = [];
    for await (const piece of from.submit({ generation, signal: generate.signal })) tokens.push(...piece.tokens);
    return tokens;
  };
  return { session, draftSession, plain, ask };
}

test("greedy tokens are the same with any draft, and fewer steps with a good one", async () => {
  const prompt = [3, 14, 15, 9, 2, 6];
  const greedy = { temperature: 0, maxTokens: 200 };
  const good = setUp(tableModel(7, BYTE_VOCAB, ACTIVE));
  const expected = await good.ask(prompt, greedy, good.plain);
  expect(await good.ask(prompt, greedy)).toEqual(expected);
  expect(good.session.steps).toBeLessThan(200 / 3);
  const bad = setUp(tableModel(8, BYTE_VOCAB, ACTIVE));
  expect(await bad.ask(prompt, greedy)).toEqual(expected);
});

test("the same seed gives the same text with a draft and without", async () => {
  const both = setUp(tableModel(7, BYTE_VOCAB, ACTIVE));
  const sampled = { temperature: 1, seed: 5, maxTokens: 150 };
  expect(await both.ask([1, 2], sampled)).toEqual(await both.ask([1, 2], sampled, both.plain));
  expect(both.session.steps).toBeLessThan(150);
});

test("a draft that does not pay is left alone after a few tries", async () => {
  const wrong = setUp(tableModel(8, BYTE_VOCAB, ACTIVE));
  await wrong.ask([1, 2, 3], { temperature: 0, maxTokens: 600 });
  expect(wrong.session.steps).toBeGreaterThan(550); // nearly a step a token, and
  expect(wrong.draftSession.steps).toBeLessThan(60); // few of the draft's
  // right every time, but slower than the model itself
  const slow = setUp(tableModel(7, BYTE_VOCAB, ACTIVE), { draftSteps: 1.3 });
  await slow.ask([1, 2, 3], { temperature: 0, maxTokens: 600 });
  expect(slow.draftSession.steps).toBeLessThan(100);
});

test("only a sequence that runs alone is guessed for", async () => {
  const { ask, draftSession } = setUp(tableModel(7, BYTE_VOCAB, ACTIVE));
  const together = { temperature: 0, maxTokens: 30 };
  await Promise.all([ask([1, 2], together), ask([3, 4], together), ask([5, 6], together)]);
  const after = draftSession.steps;
  await ask([1, 2], together);
  expect(after).toBeLessThan(10);
  expect(draftSession.steps).toBeGreaterThan(after);
});

test("a draft with other tokens is refused, and the first that differs is named", () => {
  const same = byteTokenizer();
  expect(() => requireSameTokens("model", byteTokenizer(), "draft", same)).not.toThrow();
  const other = { ...same, vocabSize: same.vocabSize, tokenBytes: (id: number) => same.tokenBytes(id === 7 ? 8 : id) };
  expect(() => requireSameTokens("model", byteTokenizer(), "draft", other as typeof same)).toThrow(/token 7 is/);
  const fewer = { ...same, vocabSize: same.vocabSize - 1 };
  expect(() => requireSameTokens("model", byteTokenizer(), "draft", fewer as typeof same)).toThrow(
    /draft cannot guess for model: it has \d+ tokens/,
  );
});
