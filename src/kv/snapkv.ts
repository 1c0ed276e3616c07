/**
 * SnapKV (Li et al. 2024, arXiv 2404.14469): attention of the newest queries, pooled over neighbouring tokens so that
 * what surrounds a match stays with it.
 */
import type { EvictionPolicy } from "./eviction.ts";

/** Queries that are observed; the paper's 16 to 64. */
export const OBSERVED = 32;
/** The paper's kernel size: 7 tokens, 3 to each side. */
const REACH = 3;

export const snapkv: EvictionPolicy = {
  name: "snapkv",
  needs: "recent attention",
  score(_keys, _values, { kvHeads, tokens, attention }) {
    const scores = new Float32Array(kvHeads * tokens);
    for (let head = 0; head < kvHeads; head++) {
      const row = attention.subarray(head * tokens, (head + 1) * tokens);
      for (let t = 0; t < tokens; t++) {
        let most = 0;
        for (let near = Math.max(0, t - REACH); near <= Math.min(tokens - 1, t + REACH); near++) {
          most = Math.max(most, row[near]);
        }
        scores[head * tokens + t] = most;
      }
    }
    return scores;
  },
};
