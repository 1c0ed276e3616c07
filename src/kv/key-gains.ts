/**
 * What each channel of a key is multiplied by before it gets codes, and a query's divided by: scores stay as they are,
 * their error does not. A rotated row with one scale has errors of one size in all channels, in proportion to what the
 * row holds in all; an error in channel i reaches the score as large as the query there. With k_i the spread of keys and
 * q_i the mean square of queries, gains g_i leave an error of
 *   sum g_i^2 k_i * sum q_i / g_i^2,   least (Cauchy and Schwarz) where g_i^4 = q_i / k_i.
 * Against no gains that is a share (sum sqrt(q_i k_i))^2 / (sum q_i * sum k_i): 0.72 on SmolLM2, 0.51 on
 * Qwen2.5-Coder-0.5B, mean of their heads. As SmoothQuant (Xiao et al. 2022, arXiv 2211.10438) does between
 * activations and weights, by size instead of by energy.
 */

export interface KeyEnergies {
  /** Variance of what is coded, (kvHeads * headDim). */
  readonly spread: Float32Array;
  /** Mean square of the queries that read it, in the same layout. */
  readonly querySquares: Float32Array;
}

/** Of the mean over a head, what each channel has at least: calibration did not see everything. */
const LEAST_SHARE = 1e-3;

/** (kvHeads * headDim); a head's keys keep their mean square. */
export function keyGains({ spread, querySquares }: KeyEnergies, headDim: number): Float32Array {
  const gains = new Float32Array(spread.length);
  for (let start = 0; start < spread.length; start += headDim) {
    const keys = floored(spread.subarray(start, start + headDim));
    const queries = floored(querySquares.subarray(start, start + headDim));
    const squares = keys.map((k, i) => Math.sqrt(queries[i] / k));
    const before = keys.reduce((sum, k) => sum + k, 0);
    const after = keys.reduce((sum, k, i) => sum + k * squares[i], 0);
    for (const [i, square] of squares.entries()) gains[start + i] = Math.sqrt((square * before) / after);
  }
  return gains;
}

/** Nothing is 0; a head that is all 0 is all 1. */
function floored(energies: Float32Array): Float64Array {
  const mean = energies.reduce((sum, x) => sum + x, 0) / energies.length;
  return Float64Array.from(energies, (x) => (mean > 0 ? Math.max(x, LEAST_SHARE * mean) : 1));
}
