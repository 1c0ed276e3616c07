/**
 * A model some of whose matrices are quantized: what export, evaluation and tuning take. It knows what there is; codes are
 * read from the store of finished layers when somebody asks for them, one layer at a time.
 */
import type { Model } from "../src/arch/index.ts";
import { dequantizedWeights, floatWeights, type QuantizedWeight, type Weights } from "../src/arch/weights.ts";
import { NibbleError } from "../src/errors.ts";
import type { QuantizedMatrix, ScaleBits } from "../src/tensor/quantized.ts";
import { blockSizeOf, inBlocks } from "./pack.ts";
import type { Recipe } from "./recipes.ts";
import { decodeLayer, type LayerRecord, type LayerStore, type LinearReport } from "./record.ts";
import type { TuneReport } from "./tune.ts";
import { roundScaleToF16 } from "./types.ts";

/** The plan by itself, as `--plan` takes it. */
const PLAN_FILE = "plan.json";

/** What is known of a matrix while its codes lie in the store. */
export interface StoredMatrix extends Pick<QuantizedMatrix, "rows" | "cols" | "bits" | "groupSize"> {
  readonly symmetric: boolean;
  readonly scaleBits: ScaleBits;
  load(): Promise<QuantizedMatrix>;
}

export class QuantizedModel {
  /** By full tensor name: "model.layers.0.mlp.up_proj.weight". */
  readonly matrices = new Map<string, StoredMatrix>();
  /** Float tensors that folding or pruning changed. */
  readonly floats = new Map<string, () => Promise<Float32Array>>();
  readonly reports = new Map<string, LinearReport>();
  /** Added to nibble.json: how the calibration text was named and hashed. */
  calibration: Readonly<Record<string, unknown>> | undefined;
  /** What tuning reached, where there was any. */
  tuned: TuneReport | undefined;
  /** The layer that was asked for last: a graph asks for codes, scales and zero points one after the other. */
  private latest: { readonly key: string; readonly record: Promise<LayerRecord> } | undefined;

  constructor(
    readonly model: Model,
    readonly plan: Recipe,
  ) {}

  /** A layer that `store` holds under `key`. */
  addLayer({ linears, floats }: LayerRecord, key: string, store: LayerStore): void {
    for (const [linear, { matrix, report }] of linears) {
      this.matrices.set(`${linear}.weight`, {
        ...headOf(matrix),
        load: async () => {
          const { matrix, rowScales } = (await this.record(key, store)).linears.get(linear)!;
          return rowScales ? divideRows(matrix, rowScales) : matrix;
        },
      });
      if (report) this.reports.set(linear, report);
    }
    for (const tensor of floats.keys()) {
      this.floats.set(tensor, async () => (await this.record(key, store)).floats.get(tensor)!);
    }
  }

  /** A matrix that stays in memory. */
  setMatrix(tensor: string, matrix: QuantizedMatrix): void {
    this.matrices.set(tensor, { ...headOf(matrix), load: async () => matrix });
  }

  private record(key: string, store: LayerStore): Promise<LayerRecord> {
    if (this.latest?.key !== key) {
      const record = store.get(key).then((bytes) => {
        if (bytes) return decodeLayer(bytes);
        throw new NibbleError("not_found", `${key} of the finished layers is gone; quantize again.`);
      });
      this.latest = { key, record };
    }
    return this.latest.record;
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

  /** Files that go along with the model. */
  get extras(): Readonly<Record<string, unknown>> {
    const { plan } = this.plan;
    return plan ? { [PLAN_FILE]: { plan } } : {};
  }

  /** Codes as they are exported. */
  get weights(): Weights {
    const { inputBits } = this.plan;
    return this.weightsWith((stored) => {
      if (inputBits) return { ...stored, symmetric: true, inputBits };
      return { ...stored, groupSize: blockSizeOf(stored), load: async () => inBlocks(await stored.load()) };
    });
  }

  /** The same function with every matrix as float values: for measuring rounding apart from the runtime's arithmetic. */
  get dequantized(): Weights {
    return dequantizedWeights(this.weights);
  }

  private weightsWith(form: (matrix: StoredMatrix) => QuantizedWeight | undefined): Weights {
    const base = floatWeights(this.model.checkpoint);
    return {
      has: base.has,
      shape: base.shape,
      load: (tensor) => this.floats.get(tensor)?.() ?? base.load(tensor),
      ...(base.loadRows && {
        loadRows: async (tensor: string, start: number, end: number) => {
          const changed = await this.floats.get(tensor)?.();
          if (!changed) return base.loadRows!(tensor, start, end);
          const length = changed.length / base.shape(tensor)[0];
          return changed.subarray(start * length, end * length);
        },
      }),
      quantized: (tensor) => {
        const matrix = this.matrices.get(tensor);
        return matrix && form(matrix);
      },
    };
  }
}

function headOf({ rows, cols, bits, groupSize, zeros, scaleGrid }: QuantizedMatrix): Omit<StoredMatrix, "load"> {
  return { rows, cols, bits, groupSize, symmetric: !zeros, scaleBits: scaleGrid?.bits ?? 16 };
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
