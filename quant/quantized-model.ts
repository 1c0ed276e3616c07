/** A model some of whose matrices are quantized: what export, evaluation and tuning take. */
import type { Model } from "../src/arch/index.ts";
import { floatWeights, type QuantizedWeight, type Weights } from "../src/arch/weights.ts";
import { dequantize, type QuantizedMatrix } from "../src/tensor/quantized.ts";
import { blockSizeOf, inBlocks } from "./pack.ts";
import type { Recipe } from "./recipes.ts";
import type { LayerRecord, LinearReport } from "./record.ts";
import type { TuneReport } from "./tune.ts";
import { roundScaleToF16 } from "./types.ts";

export class QuantizedModel {
  /** By full tensor name: "model.layers.0.mlp.up_proj.weight". */
  readonly matrices = new Map<string, QuantizedMatrix>();
  /** Float tensors that folding changed. */
  readonly floats = new Map<string, Float32Array>();
  readonly reports = new Map<string, LinearReport>();
  /** Added to nibble.json: how the calibration text was named and hashed. */
  calibration: Readonly<Record<string, unknown>> | undefined;
  /** What tuning reached, where there was any. */
  tuned: TuneReport | undefined;

  constructor(
    readonly model: Model,
    readonly plan: Recipe,
  ) {}

  addLayer({ linears, floats }: LayerRecord): void {
    for (const [linear, { matrix, rowScales, report }] of linears) {
      this.matrices.set(`${linear}.weight`, rowScales ? divideRows(matrix, rowScales) : matrix);
      this.reports.set(linear, report);
    }
    for (const [tensor, data] of floats) this.floats.set(tensor, data);
  }

  addHead(matrices: ReadonlyMap<string, QuantizedMatrix>): void {
    for (const [tensor, matrix] of matrices) this.matrices.set(tensor, matrix);
  }

  /** What the reader should be told. */
  get notes(): readonly string[] {
    const { unreached } = this;
    if (unreached === 0) return [];
    return [
      `${unreached} of ${this.reports.size} matrices belong to experts that no token of the calibration text reached; ` +
        "they are rounded to nearest. More text, or text nearer to the model's use, reaches more of them.",
    ];
  }

  private get unreached(): number {
    return [...this.reports.values()].filter((report) => report.unreached).length;
  }

  /** What nibble.json says of the recipe. */
  get recipe(): Readonly<Record<string, unknown>> {
    const { plan, calibration, tuned, unreached } = this;
    return {
      ...plan,
      ...(calibration && { calibration }),
      ...(tuned && { tuned }),
      ...(unreached > 0 && { unreachedMatrices: unreached }),
    };
  }

  /** Codes as they are exported. */
  get weights(): Weights {
    const { inputBits } = this.plan;
    return this.weightsWith((matrix) => {
      if (inputBits) return { ...matrix, symmetric: true, inputBits, load: async () => matrix };
      const { rows, cols, bits, zeros, scaleGrid } = matrix;
      return {
        rows,
        cols,
        bits,
        groupSize: blockSizeOf(matrix),
        symmetric: !zeros,
        scaleBits: scaleGrid?.bits ?? 16,
        load: async () => inBlocks(matrix),
      };
    });
  }

  /** The same function with every matrix as float values: for measuring rounding apart from the runtime's arithmetic. */
  get dequantized(): Weights {
    const weights = this.weightsWith(() => undefined);
    const load = async (tensor: string) => {
      const matrix = this.matrices.get(tensor);
      return matrix ? dequantize(matrix) : weights.load(tensor);
    };
    return { ...weights, load };
  }

  private weightsWith(form: (matrix: QuantizedMatrix) => QuantizedWeight | undefined): Weights {
    const base = floatWeights(this.model.checkpoint);
    return {
      has: base.has,
      shape: base.shape,
      load: async (tensor) => this.floats.get(tensor) ?? base.load(tensor),
      quantized: (tensor) => {
        const matrix = this.matrices.get(tensor);
        return matrix && form(matrix);
      },
    };
  }
}

/** A matrix whose row r is divided by scales[r]: codes stay, its scales move, rounded as they are stored. */
export function divideRows(matrix: QuantizedMatrix, rowScales: Float64Array): QuantizedMatrix {
  const groups = matrix.scales.length / matrix.rows;
  const { scaleGrid } = matrix;
  if (!scaleGrid) {
    const scales = matrix.scales.map((scale, i) => roundScaleToF16(scale / rowScales[Math.floor(i / groups)]));
    return { ...matrix, scales };
  }
  const factors = scaleGrid.factors.map((factor, row) => roundScaleToF16(factor / rowScales[row]));
  const scales = matrix.scales.map((scale, i) => {
    const row = Math.floor(i / groups);
    return scaleGrid.factors[row] === 0 ? 0 : (scale / scaleGrid.factors[row]) * factors[row];
  });
  return { ...matrix, scales, scaleGrid: { ...scaleGrid, factors } };
}
