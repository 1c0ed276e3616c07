/** Seeded numbers for property tests: mulberry32 and Box-Muller. */
export function random(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

export function normals(count: number, next: () => number): Float32Array {
  return Float32Array.from(
    { length: count },
    () => Math.sqrt(-2 * Math.log(1 - next())) * Math.cos(2 * Math.PI * next()),
  );
}

/** (tokens, cols) activations whose channels are correlated and of very different size. */
export function correlatedInputs(tokens: number, cols: number, next: () => number): Float32Array {
  const rank = Math.max(2, cols >> 2);
  const mix = normals(rank * cols, next);
  const size = Float64Array.from({ length: cols }, () => Math.exp(1.5 * (next() - 0.5) * 2));
  const X = new Float32Array(tokens * cols);
  for (let t = 0; t < tokens; t++) {
    const z = normals(rank, next);
    const noise = normals(cols, next);
    for (let c = 0; c < cols; c++) {
      let sum = 0.5 * noise[c];
      for (let r = 0; r < rank; r++) sum += (z[r] * mix[r * cols + c]) / Math.sqrt(rank);
      X[t * cols + c] = sum * size[c];
    }
  }
  return X;
}

/** XᵀX / tokens in float64. */
export function secondMoment(X: Float32Array, tokens: number, cols: number): Float64Array {
  const H = new Float64Array(cols * cols);
  for (let t = 0; t < tokens; t++) {
    for (let a = 0; a < cols; a++) {
      const x = X[t * cols + a] / tokens;
      for (let b = 0; b < cols; b++) H[a * cols + b] += x * X[t * cols + b];
    }
  }
  return H;
}
