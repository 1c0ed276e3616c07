/**
 * KeyDiff (Park et al. 2025, arXiv 2504.15364): keys that point where the others do are dropped first. Needs no
 * attention scores, and keeps what is unlike the rest: names, numbers, text that is to be repeated.
 */
import type { EvictionPolicy } from "./eviction.ts";

export const keydiff: EvictionPolicy = {
  name: "keydiff",
  score(keys, _values, { kvHeads, tokens, headDim }) {
    const scores = new Float32Array(kvHeads * tokens);
    for (let head = 0; head < kvHeads; head++) {
      const norms = new Float32Array(tokens);
      const anchor = new Float32Array(headDim); // sum of the keys, each of length 1
      for (let t = 0; t < tokens; t++) {
        const key = keys.subarray((head * tokens + t) * headDim, (head * tokens + t + 1) * headDim);
        norms[t] = Math.sqrt(key.reduce((sum, x) => sum + x * x, 0)) || 1;
        for (let c = 0; c < headDim; c++) anchor[c] += key[c] / norms[t];
      }
      // the anchor's own length is one factor for all
      for (let t = 0; t < tokens; t++) {
        let along = 0;
        for (let c = 0; c < headDim; c++) along += keys[(head * tokens + t) * headDim + c] * anchor[c];
        scores[head * tokens + t] = -along / norms[t];
      }
    }
    return scores;
  },
};
