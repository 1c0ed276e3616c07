/** Matrices of int8 with one scale per row in the graph: as products on integer kernels and as a table of embeddings. */
import type { Value } from "../onnx/graph.ts";
import {
  type IntegerPart,
  integerProduct,
  planesAfter,
  productParts,
  type RoundedTokens,
  roundTokens,
} from "../onnx/integer-product.ts";
import * as ops from "../onnx/ops.ts";
import type { QuantizedMatrix } from "../tensor/quantized.ts";
import type { ModelBuilder } from "./model-builder.ts";
import type { QuantizedWeight } from "./weights.ts";

interface IntegerMatrix {
  /** (cols, rows) int8: products read it so, and an embedding that shares it gathers columns. */
  readonly values: Value;
  /** (rows) float32 */
  readonly rowScales: Value;
}

/** x times the transpose of the matrices of `tensors`, stacked; x is rounded once for all that read it. */
export function integerLinear(
  m: ModelBuilder,
  x: Value,
  tensors: readonly string[],
  weights: readonly QuantizedWeight[],
  bias: Value | undefined,
): Value {
  const { g } = m;
  const planes = planesAfter(g.nodes.find(({ outputs }) => outputs.includes(x.name))?.opType);
  const mayBeEmpty = g.nodes.some(({ opType }) => opType === "NonZero"); // an expert that no token was routed to
  const rounded = m.once<RoundedTokens>(`rounded/${x.name}`, () => roundTokens(g, x, { planes, mayBeEmpty }));
  const { values, rowScales } = store(m, tensors, weights);
  const rows = values.shape[1] as number;
  const parts = m.once(`parts/${values.name}`, () => {
    const ranges = productParts(rows);
    if (ranges.length === 1) return [{ weight: values, rowScales }];
    // cut when the file is opened, since an embedding that shares the matrix reads all of it
    return ranges.map(([start, end]): IntegerPart => {
      const cut = (value: Value, axis: number) =>
        ops.slice(g, value, g.ints([start]), g.ints([end]), axis, end - start);
      return { weight: cut(values, 1), rowScales: cut(rowScales, 0) };
    });
  });
  return integerProduct(g, rounded, parts, bias);
}

/** ids (batch, seq) -> (batch, seq, cols) */
export function integerEmbedding(m: ModelBuilder, tensor: string, weight: QuantizedWeight, ids: Value): Value {
  const { g } = m;
  const { values, rowScales } = store(m, [tensor], [weight]);
  const [gathered] = g.node("Gather", [values, ids], [{ type: "int8", shape: [weight.cols, ...ids.shape] }], {
    attributes: { axis: 1 },
  });
  const codes = ops.cast(g, ops.transpose(g, gathered, [1, 2, 0]), "float32");
  return ops.mul(g, codes, ops.unsqueeze(g, ops.gather(g, rowScales, ids), -1));
}

function store(m: ModelBuilder, tensors: readonly string[], weights: readonly QuantizedWeight[]): IntegerMatrix {
  const { g } = m;
  const name = tensors.join("+");
  const rows = weights.reduce((sum, weight) => sum + weight.rows, 0);
  const [{ cols }] = weights;
  const load = () => Promise.all(weights.map((weight) => weight.load()));
  return {
    values: g.initializer(`${name}/int8`, "int8", [cols, rows], async () => int8Columns(await load())),
    rowScales: g.initializer(`${name}/rowScales`, "float32", [rows], async () => {
      const scales = Float32Array.from((await load()).flatMap((matrix) => [...matrix.scales]));
      return new Uint8Array(scales.buffer);
    }),
  };
}

/** Written a tile of rows at a time: the transposed writes then fill whole cache lines. */
const TILE_ROWS = 64;

/** Codes (rows, cols) of stacked matrices -> int8 (cols, rows), less the symmetric zero point. */
function int8Columns(matrices: readonly QuantizedMatrix[]): Uint8Array {
  const rows = matrices.reduce((sum, matrix) => sum + matrix.rows, 0);
  const [{ cols }] = matrices;
  const out = new Int8Array(rows * cols);
  let first = 0;
  for (const { rows: own, codes } of matrices) {
    for (let start = 0; start < own; start += TILE_ROWS) {
      const end = Math.min(own, start + TILE_ROWS);
      for (let col = 0; col < cols; col++) {
        for (let row = start; row < end; row++) out[col * rows + first + row] = codes[row * cols + col] - INT8_ZERO;
      }
    }
    first += own;
  }
  return new Uint8Array(out.buffer);
}

const INT8_ZERO = 128;
