/** Second moments of what each linear sees, gathered while activations stream by in batches. */
import { NibbleError } from "../src/errors.ts";
import type { GramSum, MatrixProducts } from "../src/tensor/linalg.ts";
import type { Tokenizer } from "../src/tokenizer/tokenizer.ts";
import type { InputStatistics } from "./types.ts";

/** Sums over batches of XᵀX and, beside it, of FᵀX: what the float prefix has for the same tokens. */
export class SecondMoment {
  private readonly gram: GramSum;
  private cross: Float32Array | undefined;
  private tokens = 0;
  private compared = 0;

  constructor(
    readonly cols: number,
    private readonly products: MatrixProducts,
  ) {
    this.gram = products.gramSum(cols);
  }

  /** X (tokens, cols) from the quantized prefix; F (tokens, features) goes with it where there is something to compare. */
  async add(X: Float32Array, F?: Float32Array): Promise<void> {
    const { cols } = this;
    const tokens = X.length / cols;
    if (tokens === 0) return; // an expert that no token of this batch was routed to
    await this.gram.add(X, tokens);
    this.tokens += tokens;
    if (!F) return;
    const features = F.length / tokens;
    const shape = { m: features, k: tokens, n: cols, transA: true };
    this.cross = await this.products.f32(F, X, shape, this.cross);
    this.compared += tokens;
  }

  statistics(): InputStatistics & { readonly FX?: Float32Array } {
    const { tokens, cross } = this;
    const { XX, abs } = this.gram.total();
    return {
      tokens,
      H: divide(XX, tokens),
      meanAbs: divide(abs, tokens),
      // part of the tokens compared would be another mean than that of H
      FX: cross && this.compared === tokens ? divide(cross, tokens) : undefined,
    };
  }
}

/** The diagonal alone, which is all that rounding to nearest asks for: no products. */
export class ChannelMoment {
  private readonly squares: Float32Array;
  private readonly abs: Float32Array;
  private tokens = 0;

  constructor(readonly cols: number) {
    this.squares = new Float32Array(cols);
    this.abs = new Float32Array(cols);
  }

  /** X (tokens, cols) */
  add(X: Float32Array): void {
    const { cols, squares, abs } = this;
    for (let i = 0; i < X.length; ) {
      for (let col = 0; col < cols; col++, i++) {
        const x = X[i];
        squares[col] += x * x;
        abs[col] += Math.abs(x);
      }
    }
    this.tokens += X.length / cols;
  }

  statistics(): InputStatistics & { readonly FX?: undefined } {
    const { tokens, squares, abs } = this;
    return { tokens, H: divide(squares, tokens), meanAbs: divide(abs, tokens) };
  }
}

/** In place. */
function divide(sums: Float32Array, count: number): Float32Array {
  const share = 1 / Math.max(1, count);
  for (let i = 0; i < sums.length; i++) sums[i] *= share;
  return sums;
}

/**
 * (tokens) what an error of each token counts for in the residual stream (tokens, features): 1 / rms, since whatever reads
 * the stream normalizes it. A few tokens are a thousand times larger in some layers (Sun et al. 2024, arXiv 2402.17762): in
 * SmolLM2's down_proj of block 11 they are 99.8 % of the plain second moment, and no other token would have a say.
 */
export function streamShares(stream: Float32Array, features: number): Float64Array {
  return Float64Array.from({ length: stream.length / features }, (_, token) => {
    let squares = 0;
    for (let i = token * features; i < (token + 1) * features; i++) squares += stream[i] * stream[i];
    return squares > 0 ? Math.sqrt(features / squares) : 0;
  });
}

/** X (tokens, cols) with each token times its share, in `out`, which may be X. */
export function scaledTokens(
  X: Float32Array,
  shares: Float64Array,
  out: Float32Array = new Float32Array(X.length),
): Float32Array {
  const cols = X.length / shares.length;
  for (const [token, share] of shares.entries()) {
    for (let i = token * cols; i < (token + 1) * cols; i++) out[i] = X[i] * share;
  }
  return out;
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
