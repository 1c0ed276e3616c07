/**
 * Caches that forget: once a budget is full, each KV head keeps the tokens that a policy scores highest. The first
 * tokens and the newest ones always stay. Keys keep the rotation of their own positions, so what is left of the cache
 * is what masked attention over the whole text would see; the graph takes positions as an input for that.
 *
 * A policy is one file with a `score`, after kvpress' interface (NVIDIA/kvpress, ScorerPress).
 */
import { NibbleError } from "../errors.ts";
import { expected } from "./expected.ts";
import { h2o } from "./h2o.ts";
import { keydiff } from "./keydiff.ts";
import { snapkv } from "./snapkv.ts";

/** What a policy may look at beside keys and values; one layer of one sequence. */
export interface ScoreContext {
  readonly heads: number;
  readonly kvHeads: number;
  /** In the cache, in the order of the text. */
  readonly tokens: number;
  readonly headDim: number;
  /** Of the scores. */
  readonly scale: number;
  /** Tokens that will stay. */
  readonly budget: number;
  /** Attention that each token got, summed over queries and the heads of its group (kvHeads, tokens). */
  readonly attention: Float32Array;
  /** Of the queries so far, turned to the mean of the positions ahead, (heads * headDim) each. */
  readonly queryMean: Float32Array;
  readonly queryVariance: Float32Array;
}

export interface EvictionPolicy {
  readonly name: "h2o" | "snapkv" | "keydiff" | "expected";
  /** What the graph has to give out: attention of every query or of the newest ones, or moments of the queries. */
  readonly needs?: "all attention" | "recent attention" | "queries";
  /** keys and values (kvHeads, tokens, headDim) -> (kvHeads, tokens); the highest stay. */
  score(keys: Float32Array, values: Float32Array, context: ScoreContext): Float32Array;
}

export const EVICTION_POLICIES: readonly EvictionPolicy[] = [h2o, snapkv, keydiff, expected];

/** First tokens that always stay (StreamingLLM's attention sinks), and newest ones. */
export const FIRST = 4;
export const NEWEST = 32;
/** Tokens that come in between two selections, so that a step seldom pays for one. */
export const BETWEEN = 64;
const MIN_BUDGET = 64;

export interface EvictionPlan {
  readonly policy: EvictionPolicy["name"];
  /** Tokens that each head keeps at a selection. */
  readonly budget: number;
}

/** Errors: `bad_option` for a budget that is too small or beyond what the model takes. */
export function evictionPlan(policy: EvictionPolicy["name"], budget: number, contextLength: number): EvictionPlan {
  if (Number.isSafeInteger(budget) && budget >= MIN_BUDGET && budget <= contextLength) return { policy, budget };
  throw new NibbleError(
    "bad_option",
    `--kv-policy ${policy}: a budget of ${budget} tokens; it takes ${MIN_BUDGET} to ${contextLength}.`,
    { param: "kvBudget" },
  );
}

export function evictionPolicy(name: EvictionPolicy["name"]): EvictionPolicy {
  return EVICTION_POLICIES.find((policy) => policy.name === name)!;
}

/** Places of the tokens that one head keeps, ascending: the first, the newest, and the best scored of the others. */
export function keptTokens(scores: Float32Array, budget: number): Int32Array {
  const tokens = scores.length;
  if (tokens <= budget) return Int32Array.from({ length: tokens }, (_, i) => i);
  const middle = Array.from({ length: tokens - FIRST - NEWEST }, (_, i) => FIRST + i);
  middle.sort((a, b) => scores[b] - scores[a] || b - a); // of equals the newer one stays
  const kept = [
    ...Array.from({ length: FIRST }, (_, i) => i),
    ...middle.slice(0, budget - FIRST - NEWEST),
    ...Array.from({ length: NEWEST }, (_, i) => tokens - NEWEST + i),
  ];
  return Int32Array.from(kept).sort();
}
