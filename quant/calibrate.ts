/** Second moments of what each linear sees, gathered while activations stream by in batches. */
import { NibbleError } from "../src/errors.ts";
import type { MatrixProducts } from "../src/tensor/linalg.ts";
import type { Tokenizer } from "../src/tokenizer/tokenizer.ts";
import type { InputStatistics } from "./types.ts";

/** Sums XᵀX over batches: each batch in float32 (ONNX Runtime), the sum of batches in float64. */
export class SecondMoment {
  private readonly sum: Float64Array;
  private readonly drift: Float64Array | undefined;
  private readonly abs: Float64Array;
  private residual: Float64Array | undefined;
  private tokens = 0;

  constructor(
    readonly cols: number,
    private readonly products: MatrixProducts,
    withDrift = false,
  ) {
    this.sum = new Float64Array(cols * cols);
    this.abs = new Float64Array(cols);
    this.drift = withDrift ? new Float64Array(cols * cols) : undefined;
  }

  /**
   * X (tokens, cols) from the quantized prefix; `float` the same tokens from the float one. `residual`: how far the
   * quantized residual stream (tokens, rows) is from the float one.
   */
  async add(X: Float32Array, float?: Float32Array, residual?: Float32Array): Promise<void> {
    const { cols, sum, abs, drift } = this;
    const tokens = X.length / cols;
    if (tokens === 0) return; // an expert that no token of this batch was routed to
    const XX = await this.products.gram(X, tokens, cols);
    for (let i = 0; i < sum.length; i++) sum[i] += XX[i];
    for (let at = 0; at < X.length; at += cols) {
      for (let c = 0; c < cols; c++) abs[c] += Math.abs(X[at + c]);
    }
    // routed experts may see other tokens in the two prefixes; there is nothing to compare then
    if (drift && float && float.length === X.length) {
      const delta = new Float32Array(X.length);
      for (let i = 0; i < delta.length; i++) delta[i] = float[i] - X[i];
      const dXX = await this.products.f32(delta, X, { m: cols, k: tokens, n: cols, transA: true });
      for (let i = 0; i < drift.length; i++) drift[i] += dXX[i];
    }
    if (residual && residual.length % tokens === 0) {
      const rows = residual.length / tokens;
      const dRX = await this.products.f32(residual, X, { m: rows, k: tokens, n: cols, transA: true });
      this.residual ??= new Float64Array(rows * cols);
      for (let i = 0; i < dRX.length; i++) this.residual[i] += dRX[i];
    }
    this.tokens += tokens;
  }

  statistics(): InputStatistics {
    const { tokens } = this;
    const mean = (sums: Float64Array) => sums.map((x) => x / Math.max(1, tokens));
    return {
      tokens,
      H: mean(this.sum),
      meanAbs: mean(this.abs),
      dXX: this.drift && mean(this.drift),
      dRX: this.residual && mean(this.residual),
    };
  }
}

export interface CalibrationText {
  readonly texts: readonly string[];
  readonly sequenceLength: number;
  /** How many windows at most. */
  readonly windows: number;
}

/**
 * Token windows of equal length: the texts one after the other, without special tokens (the rule of the perplexity
 * files), cut every `sequenceLength` tokens. Windows are taken evenly from all of the text, so that a mixed set stays
 * mixed; the rest is dropped. Error `bad_option` where there is not one whole window.
 */
export function tokenWindows(
  tokenizer: Pick<Tokenizer, "encode">,
  { texts, sequenceLength, windows }: CalibrationText,
): number[][] {
  const ids: number[] = [];
  for (const text of texts) {
    for (const id of tokenizer.encode(text, { addSpecialTokens: false })) ids.push(id);
  }
  const available = Math.floor(ids.length / sequenceLength);
  if (available === 0) {
    throw new NibbleError(
      "bad_option",
      `The calibration text has ${ids.length} tokens; at least one window of ${sequenceLength} is needed. Give more text or a smaller sequence length.`,
      { param: "calibration" },
    );
  }
  const count = Math.min(windows, available);
  return Array.from({ length: count }, (_, i) => {
    const start = Math.floor((i * available) / count) * sequenceLength;
    return ids.slice(start, start + sequenceLength);
  });
}
