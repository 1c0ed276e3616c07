/**
 * Expected Attention (Devoto et al. 2025, arXiv 2510.00636): queries to come are taken as normally distributed like
 * those so far, turned to the mean of the positions ahead; a token is worth E[exp(q k scale)] times its value's length.
 * Of the queries' covariance the diagonal is used: exp(mean k s + sum of variance k^2 s^2 / 2).
 */
import type { EvictionPolicy } from "./eviction.ts";

/** Positions ahead that the rotation is averaged over; the paper's 512. */
export const AHEAD = 512;

export const expected: EvictionPolicy = {
  name: "expected",
  needs: "queries",
  score(keys, values, { heads, kvHeads, tokens, headDim, scale, queryMean, queryVariance }) {
    const group = heads / kvHeads;
    const scores = new Float32Array(kvHeads * tokens);
    for (let kvHead = 0; kvHead < kvHeads; kvHead++) {
      const logits = new Float64Array(group * tokens);
      for (let g = 0; g < group; g++) {
        const query = (kvHead * group + g) * headDim;
        let largest = Number.NEGATIVE_INFINITY;
        for (let t = 0; t < tokens; t++) {
          let logit = 0;
          for (let c = 0; c < headDim; c++) {
            const k = keys[(kvHead * tokens + t) * headDim + c] * scale;
            logit += queryMean[query + c] * k + 0.5 * queryVariance[query + c] * k * k;
          }
          logits[g * tokens + t] = logit;
          largest = Math.max(largest, logit);
        }
        let sum = 0;
        for (let t = 0; t < tokens; t++) sum += Math.exp(logits[g * tokens + t] - largest);
        for (let t = 0; t < tokens; t++) {
          scores[kvHead * tokens + t] += Math.exp(logits[g * tokens + t] - largest) / sum / group;
        }
      }
      for (let t = 0; t < tokens; t++) {
        const value = values.subarray((kvHead * tokens + t) * headDim, (kvHead * tokens + t + 1) * headDim);
        scores[kvHead * tokens + t] *= Math.sqrt(value.reduce((sum, x) => sum + x * x, 0));
      }
    }
    return scores;
  },
};
