/**
 * Greedy answers of two kernels, caches, batches or providers: another CPU sums in another order, so two tokens that are
 * nearly as likely may change places, and everything after them. Such answers are alike up to a close call.
 */
import { expect } from "vitest";
import type { GeneratedToken } from "../src/runtime/engine.ts";

/**
 * In nats, of stories260K: kernels for one and for several rows add in another order, and a rounded activation (accuracy
 * level 4) or cache entry may then fall on the other side.
 */
export const CLOSE_CALL = 0.05;
/** The same where a cache is rounded to other numbers. */
export const ROUNDED_CALL = 0.5;

export interface Greedy {
  readonly ids: readonly number[];
  /** Of each: by how much its log-probability is ahead of the next likely one's. */
  readonly leads: readonly number[];
}

/** What an engine says, asked with `topLogprobs: 2`. */
export async function greedyOf(
  pieces: AsyncIterable<{ readonly logprobs?: readonly GeneratedToken[] }>,
): Promise<Greedy> {
  const ids: number[] = [];
  const leads: number[] = [];
  for await (const { logprobs = [] } of pieces) {
    for (const { id, top } of logprobs) {
      ids.push(id);
      leads.push(top[0].logprob - top[1].logprob);
    }
  }
  return { ids, leads };
}

/** Fails unless `ids` are the reference's, or part from them at a close call; returns how many tokens both say. */
export function expectAlike(reference: Greedy, ids: readonly number[], closeCall = CLOSE_CALL, what = ""): number {
  const parted = ids.findIndex((id, step) => id !== reference.ids[step]);
  if (parted < 0) expect(ids, what).toHaveLength(reference.ids.length);
  else expect(reference.leads[parted], `${what}: ahead by, at token ${parted}`).toBeLessThan(closeCall);
  return parted < 0 ? ids.length : parted;
}
