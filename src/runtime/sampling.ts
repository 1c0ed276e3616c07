/**
 * From a row of logits (vocab) to the next token. Order: logit bias and penalties, the constraint's mask, temperature,
 * top-k, top-p, min-p: transformers' order, which the values in a model's generation_config are tuned for.
 *
 * In place: the row is overwritten. Only candidates are ever ordered, by a heap that stops as soon as enough of them came
 * out or, where few are wanted, by a list of the best so far.
 */
import { NibbleError } from "../errors.ts";
import type { GeneratedToken, SamplingOptions, TokenConstraint, TokenLogprob } from "./engine.ts";
import { Random } from "./random.ts";
import { exponentiate } from "./softmax.ts";

export type Sampling = Required<Omit<SamplingOptions, "seed" | "logitBias">> &
  Pick<SamplingOptions, "seed" | "logitBias">;

export const SAMPLING_DEFAULTS: Sampling = {
  temperature: 1,
  topK: 0,
  topP: 1,
  minP: 0,
  repetitionPenalty: 1,
  presencePenalty: 0,
  frequencyPenalty: 0,
};

/** Bounds of each option: what the APIs that carry them allow, or what is arithmetic. */
const bounds: Readonly<Record<keyof typeof SAMPLING_DEFAULTS & string, readonly [number, number]>> = {
  temperature: [0, 100],
  topK: [0, Number.MAX_SAFE_INTEGER],
  topP: [0, 1],
  minP: [0, 1],
  repetitionPenalty: [1e-3, 1e3],
  presencePenalty: [-100, 100],
  frequencyPenalty: [-100, 100],
  seed: [-Number.MAX_SAFE_INTEGER, Number.MAX_SAFE_INTEGER],
  logitBias: [-100, 100],
};

/** The request's options over the model's defaults, checked; errors: `bad_option`. */
export function resolveSampling(options: SamplingOptions, defaults: SamplingOptions, vocabSize: number): Sampling {
  const given = Object.fromEntries(
    Object.keys(bounds)
      .map((name) => [name, options[name as keyof SamplingOptions]])
      .filter(([, value]) => value !== undefined && value !== null),
  );
  const sampling: Sampling = { ...SAMPLING_DEFAULTS, ...defaults, ...given };
  for (const [name, [low, high]] of Object.entries(bounds)) {
    const value = sampling[name as keyof Sampling];
    if (value === undefined) continue;
    if (name === "logitBias") {
      for (const [id, bias] of Object.entries(value)) {
        if (!(Number(id) >= 0 && Number(id) < vocabSize && Number.isInteger(Number(id)))) {
          throw badOption(name, `there is no token ${id}; ids are 0 to ${vocabSize - 1}`);
        }
        if (!(bias >= low && bias <= high))
          throw badOption(name, `${bias} for token ${id} is not in ${low} .. ${high}`);
      }
    } else if (name === "topK" && !Number.isInteger(value)) {
      throw badOption(name, `${value} is no whole number`);
    } else if (!((value as number) >= low && (value as number) <= high)) {
      throw badOption(name, `${value} is not in ${low} .. ${high}`);
    }
  }
  return sampling;
}

function badOption(name: string, what: string): NibbleError {
  return new NibbleError("bad_option", `${name}: ${what}.`, { param: name });
}

/** Chooses the tokens of one sequence. */
export class Sampler {
  /** Occurrences among the generated tokens. */
  private readonly counts = new Map<number, number>();
  private readonly seen = new Set<number>();
  private readonly penalizesSeen: boolean;

  /** @param topLogprobs report log-probabilities, and of this many alternatives. */
  constructor(
    private readonly sampling: Sampling,
    prompt: readonly number[],
    private readonly topLogprobs: number | undefined = undefined,
    private readonly random: Random = new Random(sampling.seed),
  ) {
    this.penalizesSeen = sampling.repetitionPenalty !== 1;
    if (this.penalizesSeen) for (const id of prompt) this.seen.add(id);
  }

  /**
   * The next token of `logits`, which is overwritten; `forbidden` ids (end tokens that are ignored) never come. A guess
   * with its distribution is accepted or replaced so that the token is distributed as without one.
   */
  next(
    logits: Float32Array,
    constraint?: TokenConstraint,
    endIds: readonly number[] = [],
    guess?: Guess,
  ): GeneratedToken {
    const score = this.topLogprobs === undefined ? undefined : new Scores(logits, this.topLogprobs);
    this.penalize(logits);
    if (constraint) mask(logits, constraint, endIds);
    const id = this.isGreedy ? argmax(logits) : this.draw(logits, guess);
    this.counts.set(id, (this.counts.get(id) ?? 0) + 1);
    if (this.penalizesSeen) this.seen.add(id);
    return score ? { id, logprob: score.of(id), top: score.top } : { id, logprob: Number.NaN, top: [] };
  }

  /**
   * A draft model's guess from its `logits` (kept as they are): drawn from its distribution under this request's
   * temperature and truncation. Where the same seed has to give the same text (or there is one text), its likeliest
   * token, to be compared with the one that comes.
   */
  guess(logits: Float32Array): Guess {
    if (this.isGreedy || this.sampling.seed !== undefined) return { id: argmax(logits) };
    const draft = truncate(logits.slice(), this.sampling);
    return { id: this.pick(draft), draft };
  }

  private get isGreedy(): boolean {
    return this.sampling.temperature === 0 || this.sampling.topK === 1;
  }

  private penalize(logits: Float32Array): void {
    const { logitBias, repetitionPenalty, presencePenalty, frequencyPenalty } = this.sampling;
    for (const id of this.seen) {
      if (id < logits.length)
        logits[id] = logits[id] > 0 ? logits[id] / repetitionPenalty : logits[id] * repetitionPenalty;
    }
    if (presencePenalty !== 0 || frequencyPenalty !== 0) {
      for (const [id, count] of this.counts) logits[id] -= presencePenalty + count * frequencyPenalty;
    }
    if (logitBias) for (const [id, bias] of Object.entries(logitBias)) logits[Number(id)] += bias;
  }

  private draw(logits: Float32Array, guess: Guess | undefined): number {
    const target = truncate(logits, this.sampling);
    if (!guess?.draft) return this.pick(target);
    // Leviathan et al. 2023 (arXiv 2211.17192), algorithm 1: x ~ q stays with probability min(1, p(x) / q(x)) ...
    const { id, draft } = guess;
    if (this.random.uniform() * draft.probability(id) < target.probability(id)) return id;
    const rest = target.without(draft); // ... else p' = norm(max(0, p - q))
    return rest.total > 0 ? this.pick(rest) : id; // nothing left: p and q differ by rounding only
  }

  /** The candidate under a uniform draw. */
  private pick({ weights, total, ids }: Candidates): number {
    let left = this.random.uniform() * total;
    let last = 0;
    const count = ids?.length ?? weights.length;
    for (let i = 0; i < count; i++) {
      const id = ids ? ids[i] : i;
      if (weights[id] === 0) continue;
      left -= weights[id];
      last = id;
      if (left < 0) break;
    }
    return last; // rounding may leave a rest after the last candidate
  }
}

/** A token that may come next, said before the model is asked. */
export interface Guess {
  readonly id: number;
  /** What it was drawn from; without, it is only compared with the token that comes. */
  readonly draft?: Candidates;
}

/** The tokens that may be drawn. */
class Candidates {
  private members: ReadonlySet<number> | undefined;

  constructor(
    /** Of every token of the vocabulary, relative to the likeliest; those of tokens that are no candidates mean nothing. */
    readonly weights: Float32Array,
    /** Of the candidates together. */
    readonly total: number,
    /** The candidates; without, all tokens. */
    readonly ids?: readonly number[],
  ) {}

  probability(id: number): number {
    if (this.ids) this.members ??= new Set(this.ids);
    return !this.members || this.members.has(id) ? this.weights[id] / this.total : 0;
  }

  /** What is left of each probability after the other's, in this one's memory. */
  without(other: Candidates): Candidates {
    const { weights, ids } = this;
    let total = 0;
    const count = ids?.length ?? weights.length;
    for (let i = 0; i < count; i++) {
      const id = ids ? ids[i] : i;
      weights[id] = Math.max(0, weights[id] / this.total - other.probability(id));
      total += weights[id];
    }
    return new Candidates(weights, total, ids);
  }
}

/** Temperature, top-k, top-p, min-p; the row's memory becomes the weights, relative to the likeliest token's. */
function truncate(logits: Float32Array, { temperature, topK, topP, minP }: Sampling): Candidates {
  const max = logits[argmax(logits)];
  if (topK > 0 && topK < logits.length) {
    const kept = largest(logits, topK);
    let total = 0;
    for (const id of kept) {
      logits[id] = Math.exp((logits[id] - max) / temperature);
      total += logits[id];
    }
    const next = kept.values();
    return nucleus(logits, () => next.next().value, topP * total, minP);
  }
  const total = exponentiate(logits, max, temperature);
  if (topP >= 1 && minP <= 0) return new Candidates(logits, total);
  // Tokens below (1 - topP) / vocab of the mass weigh less than 1 - topP together, so the nucleus is above it.
  const heap = new CandidateHeap(logits, Math.max(minP, ((1 - topP) * total) / logits.length));
  return nucleus(logits, () => (heap.size > 0 ? heap.pop() : undefined), topP * total, minP);
}

/** The likeliest tokens, as `next` gives them, until they weigh `mass` or the next one less than `minP`; one at least. */
function nucleus(weights: Float32Array, next: () => number | undefined, mass: number, minP: number): Candidates {
  const kept: number[] = [];
  let total = 0;
  for (let id = next(); id !== undefined; id = next()) {
    if (kept.length > 0 && (total >= mass || weights[id] < minP)) break;
    kept.push(id);
    total += weights[id];
  }
  return new Candidates(weights, total, kept);
}

/** Index of the largest logit, the first of equals; errors: `engine` when no token is possible. */
export function argmax(logits: Float32Array): number {
  let best = -1;
  let max = Number.NEGATIVE_INFINITY;
  for (let id = 0; id < logits.length; id++) {
    if (logits[id] > max) {
      max = logits[id];
      best = id;
    }
  }
  if (best >= 0 && max < Number.POSITIVE_INFINITY) return best;
  throw new NibbleError(
    "engine",
    best < 0
      ? "No token can follow: every logit is -infinity or not a number. The weights or the constraint are damaged."
      : "A logit is infinite: the activations overflowed. Use a float32 graph.",
  );
}

function mask(logits: Float32Array, constraint: TokenConstraint, endIds: readonly number[]): void {
  const allowed = constraint.allowed();
  const ends = constraint.done ? endIds.map((id) => [id, logits[id]] as const) : [];
  // by words: inside a string nearly every token is allowed, between two of them hardly any
  for (let start = 0; start < logits.length; start += 32) {
    const bits = allowed[start >> 5] | 0;
    if (bits === -1) continue;
    const end = Math.min(start + 32, logits.length);
    for (let id = start; id < end; id++) if (((bits >>> (id & 31)) & 1) === 0) logits[id] = Number.NEGATIVE_INFINITY;
  }
  for (const [id, logit] of ends) logits[id] = logit;
}

/** Log-probabilities of a row as the model gave it. */
export class Scores {
  readonly top: readonly TokenLogprob[];
  private readonly logSum: number;
  private readonly logits: Float32Array;

  constructor(logits: Float32Array, count: number) {
    const max = logits[argmax(logits)];
    this.logSum = max + Math.log(exponentiate(logits.slice(), max, 1));
    this.logits = logits.slice(); // the sampler works in place; copied only where log-probabilities were asked for
    this.top = largest(logits, count).map((id) => ({ id, logprob: logits[id] - this.logSum }));
  }

  of(id: number): number {
    return this.logits[id] - this.logSum;
  }
}

/** Up to here a list in order is faster than a heap of the whole vocabulary: once it is full it hardly ever changes. */
const SHORT_LIST = 256;

/** Ids of the `count` largest values, largest first, smaller ids first among equals. */
export function largest(values: Float32Array, count: number): number[] {
  if (count > SHORT_LIST) {
    const heap = new CandidateHeap(values, Number.NEGATIVE_INFINITY);
    return Array.from({ length: Math.min(count, heap.size) }, () => heap.pop());
  }
  const ids: number[] = [];
  if (count === 0) return ids;
  let least = Number.NEGATIVE_INFINITY;
  for (let id = 0; id < values.length; id++) {
    const value = values[id];
    if (!(value > least || (ids.length < count && !Number.isNaN(value)))) continue;
    if (ids.length >= count) ids.pop();
    let at = ids.length;
    while (at > 0 && values[ids[at - 1]] < value) at--;
    ids.splice(at, 0, id);
    least = values[ids[ids.length - 1]];
  }
  return ids;
}

/** A max-heap of ids by value, smaller ids first among equals: building is O(n), each pop O(log n). */
class CandidateHeap {
  private readonly ids: Int32Array;
  size = 0;

  constructor(
    private readonly values: Float32Array,
    floor: number,
  ) {
    let count = 0;
    for (let id = 0; id < values.length; id++) if (values[id] >= floor) count++;
    this.ids = new Int32Array(count);
    for (let id = 0; id < values.length; id++) if (values[id] >= floor) this.ids[this.size++] = id;
    for (let i = (this.size >> 1) - 1; i >= 0; i--) this.sink(i);
  }

  pop(): number {
    const top = this.ids[0];
    this.ids[0] = this.ids[--this.size];
    this.sink(0);
    return top;
  }

  private before(a: number, b: number): boolean {
    const difference = this.values[a] - this.values[b];
    return difference > 0 || (difference === 0 && a < b);
  }

  private sink(start: number): void {
    const { ids, size } = this;
    const id = ids[start];
    let i = start;
    for (;;) {
      let child = 2 * i + 1;
      if (child >= size) break;
      if (child + 1 < size && this.before(ids[child + 1], ids[child])) child++;
      if (!this.before(ids[child], id)) break;
      ids[i] = ids[child];
      i = child;
    }
    ids[i] = id;
  }
}
