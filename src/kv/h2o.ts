/**
 * H2O (Zhang et al. 2023, arXiv 2306.14048): half of the budget goes to the newest tokens, half to the heavy hitters,
 * which got most attention from all queries so far.
 */
import type { EvictionPolicy } from "./eviction.ts";

export const h2o: EvictionPolicy = {
  name: "h2o",
  needs: "all attention",
  score(_keys, _values, { kvHeads, tokens, budget, attention }) {
    const scores = attention.slice();
    const recent = Math.floor(budget / 2);
    for (let head = 0; head < kvHeads; head++) {
      scores.fill(Number.POSITIVE_INFINITY, head * tokens + Math.max(0, tokens - recent), (head + 1) * tokens);
    }
    return scores;
  },
};
