/**
 * Endless text at constant memory: the first tokens (attention sinks) and a window of recent ones, after StreamingLLM
 * (Xiao et al. 2023, arXiv 2309.17453).
 *
 * Keys are stored rotated, so tokens cannot move to other positions in the cache. Instead, when the budget is full the
 * sinks and the newer half are computed again from position 0: positions stay within the budget for ever, any graph and
 * any number format works, and what a token costs more is half a budget of prefill per half a budget of tokens.
 */
import { NibbleError } from "../errors.ts";

/** StreamingLLM's: four initial tokens carry the attention mass that a window without them loses. */
export const SINK_TOKENS = 4;
/** Below it hardly more than the sinks would be left. */
const MIN_BUDGET = 64;
/** Tokens where nothing is said: a few screens of text. */
export const DEFAULT_BUDGET = 1024;

export interface WindowPolicy {
  /** Tokens in the cache at most. */
  readonly budget: number;
}

/** Errors: `bad_option` for a budget that is too small or beyond what the model takes. */
export function windowPolicy(budget: number, contextLength: number): WindowPolicy {
  if (Number.isSafeInteger(budget) && budget >= MIN_BUDGET && budget <= contextLength) return { budget };
  throw new NibbleError(
    "bad_option",
    `--kv-policy window: a budget of ${budget} tokens; it takes ${MIN_BUDGET} to ${contextLength}.`,
    { param: "kvBudget" },
  );
}

/** The tokens that stay when the cache is full; `tokens` itself where it fits with room for one more. */
export function windowTokens(tokens: readonly number[], { budget }: WindowPolicy): number[] {
  if (tokens.length <= budget) return [...tokens];
  const recent = Math.floor(budget / 2);
  return [...tokens.slice(0, SINK_TOKENS), ...tokens.slice(-recent)];
}
