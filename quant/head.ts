/**
 * Embedding and head as layers of their own: one matrix where the family ties them, two where it does not.
 *
 * GPTQ weighs a tied table's errors by the head's inputs alone. Looked up as an embedding they count in every direction
 * alike, but adding that to the second moment bought nothing: SmolLM2 at 4 bits, KL on 4 windows, as head, as embedding
 * and as both: 0.0164, 0.0073, 0.0235; with 0.3 mean(diag H) on the diagonal 0.0183, 0.0058, 0.0238. Nor did AWQ's factors
 * (exponent 0.5: 0.0204, 0.0073, 0.0276).
 */
import type { Tensor } from "onnxruntime-common";
import type { Model } from "../src/arch/index.ts";
import { floatWeights } from "../src/arch/weights.ts";
import type { Checkpoint } from "../src/checkpoint/checkpoint.ts";
import { headGraph } from "../src/export/graphs.ts";
import { fullKv } from "../src/kv/full.ts";
import { toBytes } from "../src/onnx/external-data.ts";
import type { Graph } from "../src/onnx/graph.ts";
import type { MatrixProducts } from "../src/tensor/linalg.ts";
import type { QuantizedMatrix } from "../src/tensor/quantized.ts";
import { type Activations, BlockRunner } from "./block-runner.ts";
import { SecondMoment } from "./calibrate.ts";
import { gptqMatrix } from "./gptq.ts";
import { searchGrid } from "./grid.ts";
import type { QuantizeTools } from "./quantize.ts";
import type { HeadFormat, Recipe } from "./recipes.ts";
import { rtnMatrix } from "./rtn.ts";
import { type GridSpec, type Matrix, roundScaleToF16 } from "./types.ts";

/** Bits from which rounding is so fine that GPTQ gains nothing measurable (8-bit head alone: KL 0.0002). */
const PLAIN_BITS = 8;
/** Rows quantized at once: GPTQ keeps an error for every weight. */
const CHUNK_ROWS = 8192;

/** Embedding and, where it is another tensor, the head, by full name, where the recipe does not leave them float. */
export function tablesOf({ arch, config }: Model, { head, plan }: Recipe): ReadonlyMap<string, HeadFormat> {
  const formats = new Map<string, HeadFormat>();
  for (const name of [arch.embeddingName, arch.headName(config)]) {
    const format = plan ? plan[name] : head;
    if (format) formats.set(`${name}.weight`, format);
  }
  return formats;
}

/**
 * One of them. `hidden` are the windows' hidden states after the last block, quantized; `float` those of the float model,
 * whose logits the head then aims at. SmolLM2, linears and tied 4-bit table, shipped text, KL on 8 windows of WikiText-2 test:
 * 0.0987, with an asymmetry of 0.5 0.0919, of 1 0.0980; in groups of 16 instead of 32 0.0897.
 */
export async function quantizeTable(
  model: Model,
  recipe: Recipe,
  format: HeadFormat,
  tensor: string,
  hidden: readonly Activations[],
  float: readonly Tensor[] | undefined,
  tools: QuantizeTools,
): Promise<QuantizedMatrix> {
  const { arch, config, checkpoint } = model;
  const isHead = tensor === `${arch.headName(config)}.weight`;
  const [rows, cols] = checkpoint.tensors.get(tensor)!.shape;
  const groupSize = format.groupSize === "row" ? cols : format.groupSize;
  const spec: GridSpec = { ...format, groupSize, roundScale: roundScaleToF16 };
  const calibrate = isHead && hidden.length > 0 && recipe.rounding === "gptq" && format.bits < PLAIN_BITS;
  const statistics = calibrate ? await headStatistics(model, cols, hidden, tools, float) : undefined;
  const rule = recipe.searchGrid && format.bits < PLAIN_BITS ? searchGrid : undefined;
  const parts: QuantizedMatrix[] = [];
  for (let start = 0; start < rows; start += CHUNK_ROWS) {
    tools.signal?.throwIfAborted();
    const part: Matrix = {
      rows: Math.min(CHUNK_ROWS, rows - start),
      cols,
      data: await rowsOf(checkpoint, tensor, start),
    };
    if (statistics) {
      const { damping, asymmetry } = recipe;
      const dYX = await missingOutputs(part, statistics, tools.products);
      parts.push(await gptqMatrix(part, spec, { ...statistics, dYX }, tools.products, { damping, asymmetry }));
    } else parts.push(rtnMatrix(part, spec, rule));
  }
  return stack(parts);
}

/** CHUNK_ROWS rows from `start` on, or what is left. */
async function rowsOf(checkpoint: Checkpoint, tensor: string, start: number): Promise<Float32Array> {
  const [rows, cols] = checkpoint.tensors.get(tensor)!.shape;
  const end = Math.min(rows, start + CHUNK_ROWS);
  if (checkpoint.readRows) return (await checkpoint.readRows(tensor, start, end)).data;
  return (await checkpoint.readTensor(tensor)).data.slice(start * cols, end * cols);
}

/** W (FᵀX - XᵀX) / tokens: what the float model's logits are beyond those of its head on quantized states, times Xᵀ. */
async function missingOutputs(
  { rows, cols, data }: Matrix,
  { H, FX }: HeadStatistics,
  products: MatrixProducts,
): Promise<Float32Array | undefined> {
  if (!FX) return undefined;
  const drift = FX.map((value, i) => value - H[i]);
  return products.f32(data, drift, { m: rows, k: cols, n: cols });
}

type HeadStatistics = ReturnType<SecondMoment["statistics"]>;

/**
 * The second moment of final normed hidden states, and its product with the float model's; `hidden` and `float` are those
 * after the last block.
 */
export async function headStatistics(
  model: Model,
  cols: number,
  hidden: readonly Activations[],
  tools: QuantizeTools,
  float?: readonly Tensor[],
): Promise<HeadStatistics> {
  const options = { weights: floatWeights(model.checkpoint), kv: fullKv({ cached: false }), maxPositions: 1 };
  const session = await tools.ort.InferenceSession.create(await toBytes(normOnly(headGraph(model, options).graph)));
  try {
    const moment = new SecondMoment(cols, tools.products);
    const normed = async (hidden_states: Tensor) => (await session.run({ hidden_states })).normed.data as Float32Array;
    for (const [i, batch] of hidden.entries()) {
      const X = await normed(batch.get(BlockRunner.input)!);
      await moment.add(X, float && (await normed(float[i])));
    }
    return moment.statistics();
  } finally {
    await session.release();
  }
}

/** The head's graph without the head: only what makes "normed". */
function normOnly(graph: Graph): Graph {
  const wanted = new Set(["normed"]);
  graph.nodes = graph.nodes
    .toReversed()
    .filter((node) => {
      if (!node.outputs.some((name) => wanted.has(name))) return false;
      for (const name of node.inputs) wanted.add(name);
      return true;
    })
    .toReversed();
  for (const name of graph.initializers.keys()) if (!wanted.has(name)) graph.initializers.delete(name);
  graph.outputs.splice(0, graph.outputs.length, ...graph.outputs.filter(({ name }) => name === "normed"));
  return graph;
}

function stack(parts: readonly QuantizedMatrix[]): QuantizedMatrix {
  const [first] = parts;
  if (parts.length === 1) return first;
  const rows = parts.reduce((sum, part) => sum + part.rows, 0);
  const join = <T extends Uint8Array | Float32Array>(make: (length: number) => T, of: (m: QuantizedMatrix) => T): T => {
    const whole = make(parts.reduce((sum, part) => sum + of(part).length, 0));
    let at = 0;
    for (const part of parts) {
      whole.set(of(part), at);
      at += of(part).length;
    }
    return whole;
  };
  return {
    ...first,
    rows,
    codes: join(
      (n) => new Uint8Array(n),
      (m) => m.codes,
    ),
    scales: join(
      (n) => new Float32Array(n),
      (m) => m.scales,
    ),
    ...(first.scaleGrid && {
      scaleGrid: {
        ...first.scaleGrid,
        factors: join(
          (n) => new Float32Array(n),
          (m) => m.scaleGrid!.factors,
        ),
      },
    }),
    zeros:
      first.zeros &&
      join(
        (n) => new Uint8Array(n),
        (m) => m.zeros!,
      ),
  };
}
