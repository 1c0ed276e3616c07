/** Which weights a pruner takes: a share of them, or n of every m neighbours, chosen by score. */
import { NibbleError } from "../src/errors.ts";

/** A share of the weights (0.5), or n zeros in every m consecutive inputs of a row (2:4). */
export type Sparsity = number | { readonly n: number; readonly m: number };

/** "0.5", "2:4", "4:8". Error `bad_option` for anything else. */
export function parseSparsity(text: string): Sparsity {
  const pattern = /^(\d+):(\d+)$/.exec(text.trim());
  const sparsity = pattern ? { n: Number(pattern[1]), m: Number(pattern[2]) } : Number(text.trim() || Number.NaN);
  checkSparsity(sparsity);
  return sparsity;
}

/** Error `bad_option` where nothing or everything would be pruned, or m is no width of a pattern. */
export function checkSparsity(sparsity: Sparsity): void {
  const fits =
    typeof sparsity === "number"
      ? sparsity > 0 && sparsity < 1
      : sparsity.n >= 1 && sparsity.n < sparsity.m && sparsity.m <= MAX_PATTERN;
  if (fits) return;
  const found = typeof sparsity === "number" ? sparsity : `${sparsity.n}:${sparsity.m}`;
  throw new NibbleError(
    "bad_option",
    `sparsity is ${found}; it is a share between 0 and 1 (0.5), or n:m for n zeros in every m neighbours (2:4, m at most ${MAX_PATTERN}).`,
    { param: "sparsity" },
  );
}

/** No hardware has wider patterns than 16, and SparseGPT chooses within blocks of this many columns. */
const MAX_PATTERN = 128;

/** Marks the `count` lowest scores with 1, among equal ones the first. */
export function markLowest(scores: Float64Array, count: number): Uint8Array {
  const mask = new Uint8Array(scores.length);
  if (count <= 0) return mask;
  const threshold = scores.slice().sort()[count - 1];
  let left = count;
  for (const [i, score] of scores.entries()) {
    if (score < threshold) {
      mask[i] = 1;
      left--;
    }
  }
  for (let i = 0; left > 0; i++) {
    if (scores[i] !== threshold) continue;
    mask[i] = 1;
    left--;
  }
  return mask;
}

/** n:m on one row of scores; the last group may be narrower than m and loses its share, rounded down. */
export function markPattern(scores: Float64Array, { n, m }: { readonly n: number; readonly m: number }): Uint8Array {
  const mask = new Uint8Array(scores.length);
  for (let start = 0; start < scores.length; start += m) {
    const group = scores.subarray(start, Math.min(scores.length, start + m));
    mask.set(markLowest(group, Math.floor((group.length * n) / m)), start);
  }
  return mask;
}
