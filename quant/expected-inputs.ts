/**
 * How strongly each input channel of a block's linears is driven, as far as the weights alone tell it, for methods that
 * see no text (data-free equalization: Nagel et al. 2019, arXiv 1906.04721; here it feeds AWQ's search).
 *   behind a norm     E x[c]² = gain[c]² + bias[c]²: what the norm hands on has unit size in every channel
 *   behind a linear   E x[c]² = Σ W[r, k]² E u[k]² of the row r that makes the channel, u its own inputs, taken as uncorrelated
 */
import type { ScalingGroup } from "../src/arch/architecture.ts";
import type { Weights } from "../src/arch/weights.ts";
import type { Matrix } from "./types.ts";

export class ExpectedInputs {
  /** (rows) E y[r]² by linear. */
  private readonly outputs = new Map<string, Float64Array>();

  constructor(
    private readonly weights: Weights,
    private readonly groups: readonly ScalingGroup[],
  ) {}

  /** (cols) of the linears of one site, which are seen in the order in which they run; undefined where nothing is known. */
  async of(linears: readonly string[], matrices: readonly Matrix[]): Promise<Float64Array | undefined> {
    const group = this.groups.find(({ to }) => linears.every((linear) => to.includes(linear)));
    if (!group) return undefined;
    const { from, source = (channel: number) => channel } = group;
    const made = "norm" in from ? await this.normed(from) : this.outputs.get(from.linear);
    if (!made) return undefined;
    const driven = Float64Array.from({ length: matrices[0].cols }, (_, col) => made[source(col)]);
    for (const [i, linear] of linears.entries()) this.outputs.set(linear, outputSquares(matrices[i], driven));
    return driven;
  }

  private async normed({
    norm,
    gainOffset = 0,
  }: Extract<ScalingGroup["from"], { norm: string }>): Promise<Float64Array> {
    const gains = await this.weights.load(`${norm}.weight`);
    const biases = this.weights.has(`${norm}.bias`) ? await this.weights.load(`${norm}.bias`) : undefined;
    return Float64Array.from(gains, (gain, c) => (gain + gainOffset) ** 2 + (biases ? biases[c] ** 2 : 0));
  }
}

function outputSquares({ rows, cols, data }: Matrix, driven: Float64Array): Float64Array {
  const squares = new Float64Array(rows);
  for (let row = 0; row < rows; row++) {
    for (let col = 0; col < cols; col++) squares[row] += data[row * cols + col] ** 2 * driven[col];
  }
  return squares;
}
