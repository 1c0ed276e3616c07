import { expect, test } from "vitest";
import type { SamplingOptions } from "../../src/runtime/engine.ts";
import { Random } from "../../src/runtime/random.ts";
import { largest, resolveSampling, Sampler } from "../../src/runtime/sampling.ts";

const DRAWS = 20_000;
/** Four standard deviations of a frequency near one half. */
const FREQUENCY_TOLERANCE = (4 * 0.5) / Math.sqrt(DRAWS);

function sampler(options: SamplingOptions, prompt: number[] = []): Sampler {
  return new Sampler(resolveSampling({ seed: 1, ...options }, {}, 1000), prompt);
}

/** How often each token comes from the same logits, by a fresh sampler whose history stays empty. */
function frequencies(logits: readonly number[], options: SamplingOptions): number[] {
  const counts = logits.map(() => 0);
  const one = sampler(options);
  for (let i = 0; i < DRAWS; i++) counts[one.next(Float32Array.from(logits)).id]++;
  return counts.map((count) => count / DRAWS);
}

/** The same rule over a full sort, as transformers' warpers state it. */
function expected(logits: readonly number[], { temperature = 1, topK = 0, topP = 1, minP = 0 }: SamplingOptions) {
  const scaled = logits.map((logit, id) => ({ id, weight: Math.exp(logit / temperature) }));
  scaled.sort((a, b) => b.weight - a.weight || a.id - b.id);
  let kept = topK > 0 ? scaled.slice(0, topK) : scaled;
  const sum = (list: typeof scaled) => list.reduce((total, { weight }) => total + weight, 0);
  const total = sum(kept);
  let mass = 0;
  kept = kept.filter(({ weight }, i) => {
    const keep = i === 0 || mass < topP * total;
    mass += weight;
    return keep;
  });
  kept = kept.filter(({ weight }) => weight >= minP * kept[0].weight);
  const result = logits.map(() => 0);
  for (const { id, weight } of kept) result[id] = weight / sum(kept);
  return result;
}

const logits = [0.1, 2, -1, 1.5, 0.4, -3, 1.9, 0];

test.each<SamplingOptions>([
  {},
  { temperature: 0.7 },
  { topK: 3 },
  { topP: 0.6 },
  { topP: 0.9, temperature: 2 },
  { minP: 0.3 },
  { topK: 5, topP: 0.8, minP: 0.4, temperature: 1.3 },
  { topK: 100 },
  { topP: 0 },
])("tokens come as often as a sorted reference says: %j", (options) => {
  const got = frequencies(logits, options);
  for (const [id, frequency] of expected(logits, options).entries()) {
    expect(Math.abs(got[id] - frequency), `token ${id}`).toBeLessThan(FREQUENCY_TOLERANCE);
    if (frequency === 0) expect(got[id]).toBe(0);
  }
});

test("temperature 0 takes the likeliest token, the first of equals", () => {
  expect(sampler({ temperature: 0 }).next(Float32Array.of(1, 3, 3, 2)).id).toBe(1);
});

test("the same seed draws the same tokens, another seed others", () => {
  const draw = (seed: number) => {
    const one = sampler({ seed });
    return Array.from({ length: 50 }, () => one.next(Float32Array.from(logits)).id);
  };
  expect(draw(7)).toEqual(draw(7));
  expect(draw(7)).not.toEqual(draw(8));
  expect(draw(7)).not.toEqual(draw(7 + 2 ** 33));
});

test("xoshiro128** is uniform in its first two moments", () => {
  const random = new Random(42);
  let sum = 0;
  let squares = 0;
  const count = 100_000;
  for (let i = 0; i < count; i++) {
    const x = random.uniform();
    sum += x;
    squares += x * x;
  }
  expect(Math.abs(sum / count - 1 / 2)).toBeLessThan(4 * Math.sqrt(1 / 12 / count));
  expect(Math.abs(squares / count - 1 / 3)).toBeLessThan(4 * Math.sqrt(4 / 45 / count));
});

test("repetition divides positive logits and multiplies negative ones, prompt included", () => {
  const one = sampler({ temperature: 0, repetitionPenalty: 2 }, [0]);
  expect(one.next(Float32Array.of(3, 2, -1)).id).toBe(1); // 1.5 against 2
  expect(one.next(Float32Array.of(-1, -1.5, -1.9)).id).toBe(2); // -2, -3, -1.9
});

test("presence counts once, frequency each time, and neither counts the prompt", () => {
  const presence = sampler({ temperature: 0, presencePenalty: 1 }, [0]);
  const take = (one: Sampler) => Array.from({ length: 4 }, () => one.next(Float32Array.of(2, 1.5, 0)).id);
  expect(take(presence)).toEqual([0, 1, 0, 0]);
  expect(take(sampler({ temperature: 0, frequencyPenalty: 0.6 }, [0]))).toEqual([0, 1, 0, 1]);
});

test("logit bias of -100 bans a token and 100 forces one", () => {
  expect(frequencies([5, 1, 1], { logitBias: { 0: -100 } })[0]).toBe(0);
  expect(frequencies([5, 1, 1], { logitBias: { 2: 100 } })[2]).toBe(1);
});

test("a constraint leaves only its tokens, and the end token once it is done", () => {
  const constraint = { allowed: () => Uint32Array.of(0b0100), accept() {}, done: false };
  const row = () => Float32Array.of(9, 8, 1, 7);
  expect(sampler({ temperature: 0 }).next(row(), constraint, [0]).id).toBe(2);
  expect(sampler({ temperature: 0 }).next(row(), { ...constraint, done: true }, [0]).id).toBe(0);
});

test("log-probabilities are the model's own, whatever the sampling", () => {
  const one = new Sampler(resolveSampling({ temperature: 0.1, logitBias: { 2: 50 } }, {}, 3), [], 2);
  const { id, logprob, top } = one.next(Float32Array.of(Math.log(5), Math.log(3), Math.log(2)));
  expect(id).toBe(2);
  expect(logprob).toBeCloseTo(Math.log(0.2), 6);
  expect(top.map((entry) => entry.id)).toEqual([0, 1]);
  expect(top[0].logprob).toBeCloseTo(Math.log(0.5), 6);
});

test.each([0, 1, 40, 300, 700])(
  "the %d largest values come in order, smaller ids first, as a sort gives them",
  (count) => {
    const random = new Random(3);
    const values = Float32Array.from({ length: 500 }, () => Math.floor(random.uniform() * 90)); // with equals
    values[17] = Number.NaN;
    values[18] = Number.NEGATIVE_INFINITY;
    const ids = [...values.keys()].filter((id) => id !== 17);
    ids.sort((a, b) => (values[a] === values[b] ? a - b : values[b] - values[a]));
    expect(largest(values, count)).toEqual(ids.slice(0, count));
  },
);

test.each([31, 32, 33, 95])("of %d tokens a mask leaves what its bits allow", (vocab) => {
  for (const words of [
    [0, 0, 0],
    [-1, -1, -1],
    [0b101, -1, 1 << 30],
  ]) {
    const allowed = Uint32Array.from(words.slice(0, Math.ceil(vocab / 32)));
    const possible = [...Array(vocab).keys()].filter((id) => (allowed[id >> 5] >>> (id % 32)) & 1);
    const constraint = { allowed: () => allowed, accept: () => undefined, done: false };
    const draw = () =>
      new Sampler(resolveSampling({ topK: 1 }, {}, vocab), []).next(new Float32Array(vocab), constraint);
    if (possible.length === 0) expect(draw).toThrow(/No token can follow/);
    else expect(draw().id).toBe(possible[0]);
    for (const id of possible) {
      const logits = new Float32Array(vocab);
      logits[id] = 1;
      expect(new Sampler(resolveSampling({ topK: 1 }, {}, vocab), []).next(logits, constraint).id).toBe(id);
    }
  }
});

test("damaged logits are an error, not a token", () => {
  expect(() => sampler({}).next(Float32Array.of(Number.NaN, Number.NaN))).toThrow(/not a number/);
  expect(() => sampler({}).next(Float32Array.of(1, Number.POSITIVE_INFINITY))).toThrow(/overflow/);
});

test("options out of range are refused by name", () => {
  expect(() => resolveSampling({ temperature: -1 }, {}, 10)).toThrow(/temperature/);
  expect(() => resolveSampling({ topP: Number.NaN }, {}, 10)).toThrow(/topP/);
  expect(() => resolveSampling({ topK: 2.5 }, {}, 10)).toThrow(/topK: 2.5 is no whole number/);
  expect(() => resolveSampling({ logitBias: { 10: 1 } }, {}, 10)).toThrow(/no token 10/);
  expect(() => resolveSampling({ logitBias: { 1: 101 } }, {}, 10)).toThrow(/logitBias/);
});

test("the model's defaults hold where the request says nothing", () => {
  const sampling = resolveSampling({ topP: undefined, temperature: 0.2 }, { topP: 0.5, topK: 20 }, 10);
  expect(sampling).toMatchObject({ topP: 0.5, topK: 20, temperature: 0.2 });
});
