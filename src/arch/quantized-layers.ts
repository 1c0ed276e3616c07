/** A quantized matrix in the graph: as a product (MatMulNBits) and as a table of embeddings (plain operators). */
import { NibbleError } from "../errors.ts";
import type { Graph, Value } from "../onnx/graph.ts";
import * as ops from "../onnx/ops.ts";
import { f32ToF16 } from "../tensor/dtypes.ts";
import { containerBits, packCodes, packZeros } from "../tensor/pack.ts";
import { type QuantizedMatrix, scaleCodes, scaleZero } from "../tensor/quantized.ts";
import { integerEmbedding, integerLinear } from "./integer-layers.ts";
import type { ModelBuilder } from "./model-builder.ts";
import { byte, centredCodes, storedCodes } from "./stored-width.ts";
import type { QuantizedWeight } from "./weights.ts";

interface StoredMatrix {
  /** (rows, blocks, blockSize * container / 8) uint8 */
  readonly codes: Value;
  /** (rows, blocks) in the activations' type: computed once, when the file is opened */
  readonly scales: Value;
  /** (rows, ceil(blocks * container / 8)) uint8 */
  readonly zeros: Value | undefined;
}

/** x times the transpose of the matrices of `names`, stacked. */
export function quantizedLinear(
  m: ModelBuilder,
  x: Value,
  names: readonly string[],
  weights: readonly QuantizedWeight[],
): Value {
  const { g } = m;
  const tensors = names.map((name) => `${name}.weight`);
  const [{ bits, cols, groupSize, inputBits }] = weights;
  const rows = weights.reduce((sum, weight) => sum + weight.rows, 0);
  const biases = names.map((name) => `${name}.bias`).filter((name) => m.weights.has(name));
  if (biases.length > 0 && biases.length < names.length) {
    throw new NibbleError(
      "unsupported",
      `${names.join(", ")}: only ${biases.join(", ")} exist; fused linears need all biases or none.`,
    );
  }
  const bias =
    biases.length === 0
      ? undefined
      : g.initializer(biases.join("+"), m.activations, [rows], async () => {
          const parts = await Promise.all(biases.map((name) => m.weights.load(name)));
          return m.toBytes(Float32Array.from(parts.flatMap((part) => [...part])));
        });
  if (inputBits) return integerLinear(m, x, tensors, weights, bias);
  const stored = storeMatrices(m, tensors, weights);
  return ops.matMulNBits(g, x, stored.codes, stored.scales, stored.zeros, bias, {
    rows,
    cols,
    bits: containerBits(bits),
    blockSize: groupSize,
    accuracyLevel: m.options.accuracyLevel ?? 4,
  });
}

/**
 * Rows of a quantized table by plain operators: gather codes, scales and zero points, unpack, scale. Runs on every
 * provider; GatherBlockQuantized has no CPU kernel in onnxruntime-web's asyncify and jspi builds.
 */
export function embeddingLookup(m: ModelBuilder, tensor: string, weight: QuantizedWeight, ids: Value): Value {
  const { g } = m;
  if (weight.inputBits) return integerEmbedding(m, tensor, weight, ids);
  const { cols, groupSize } = weight;
  const bits = containerBits(weight.bits);
  const blocks = Math.ceil(cols / groupSize);
  const { codes, scales, zeros } = storeMatrices(m, [tensor], [weight]);
  const [batch, seq] = ids.shape;
  const outer = [batch, seq, blocks];
  const float = (x: Value) => ops.cast(g, x, m.activations);
  const code = float(unpack(g, ops.gather(g, codes, ids), bits, groupSize)); // (batch, seq, blocks, groupSize)
  const scale = ops.unsqueeze(g, ops.gather(g, scales, ids), -1); // (batch, seq, blocks, 1)
  let zero = g.scalar(2 ** (bits - 1), m.activations);
  if (zeros) {
    const rowBytes = zeros.shape[1] as number;
    const packed = ops.reshape(g, ops.gather(g, zeros, ids), [0, 0, 1, rowBytes], [batch, seq, 1, rowBytes]);
    const wide = unpack(g, packed, bits, (rowBytes * 8) / bits); // (batch, seq, 1, blocks or a few more)
    const cut = wide.shape[3] === blocks ? wide : ops.slice(g, wide, g.ints([0]), g.ints([blocks]), 3, blocks);
    zero = float(ops.reshape(g, cut, [0, 0, blocks, 1], [...outer, 1]));
  }
  const values = ops.mul(g, ops.sub(g, code, zero), scale);
  const padded = ops.reshape(g, values, [0, 0, blocks * groupSize], [batch, seq, blocks * groupSize]);
  return blocks * groupSize === cols ? padded : ops.slice(g, padded, g.ints([0]), g.ints([cols]), 2, cols);
}

/** uint8 (..., bytes) -> uint8 codes (..., count), low bits first. */
function unpack(g: Graph, packed: Value, bits: number, count: number): Value {
  if (bits === 8) return packed;
  const fields = Array.from({ length: 8 / bits }, (_, i) => {
    const shifted = i === 0 ? packed : ops.bitShift(g, packed, byte(g, i * bits), "RIGHT");
    const last = (i + 1) * bits === 8;
    return ops.unsqueeze(g, last ? shifted : ops.bitwiseAnd(g, shifted, byte(g, 2 ** bits - 1)), -1);
  });
  const outer = packed.shape.slice(0, -1);
  return ops.reshape(g, ops.concat(g, fields, -1), [...outer.map(() => 0), count], [...outer, count]);
}

/** Matrices stacked, as MatMulNBits reads them, stored at their own width; one copy for every operator that reads it. */
function storeMatrices(m: ModelBuilder, tensors: readonly string[], weights: readonly QuantizedWeight[]): StoredMatrix {
  return m.once(`stored/${tensors.join("+")}`, () => store(m, tensors, weights));
}

function store(m: ModelBuilder, tensors: readonly string[], weights: readonly QuantizedWeight[]): StoredMatrix {
  const { g } = m;
  const [{ bits, cols, groupSize, symmetric }] = weights;
  if (groupSize < 16 || groupSize > 256 || groupSize & (groupSize - 1)) {
    throw new NibbleError(
      "bad_option",
      `${tensors[0]}: group size ${groupSize}; MatMulNBits takes 16, 32, 64, 128 or 256.`,
    );
  }
  const blocks = Math.ceil(cols / groupSize);
  const rows = weights.reduce((sum, weight) => sum + weight.rows, 0);
  const name = tensors.join("+");
  const joined = (part: (matrix: QuantizedMatrix) => Uint8Array) => async () => {
    const parts: Uint8Array[] = [];
    for (const weight of weights) parts.push(part(await weight.load()));
    return parts.length === 1 ? parts[0] : joinBytes(parts);
  };
  const container = containerBits(bits);
  const codeShape = [rows, blocks, (groupSize * container) / 8];
  const zeroShape = [rows, Math.ceil((blocks * container) / 8)];
  const codes = storedCodes(g, `${name}/codes`, bits, codeShape, joined(packCodes));
  return {
    codes: symmetric ? centredCodes(g, codes, bits) : codes,
    scales: storeScales(m, name, [rows, blocks], weights[0], joined),
    zeros: symmetric
      ? undefined
      : storedCodes(
          g,
          `${name}/zeros`,
          bits,
          zeroShape,
          joined((matrix) => packZeros(matrix)!),
        ),
  };
}

/** (rows, blocks) in the activations' type: each a float, or a code times its row's factor. */
function storeScales(
  m: ModelBuilder,
  name: string,
  shape: readonly [number, number],
  { scaleBits = 16, symmetric }: QuantizedWeight,
  joined: (part: (matrix: QuantizedMatrix) => Uint8Array) => () => Promise<Uint8Array>,
): Value {
  const { g } = m;
  const bytesOf = ({ buffer, byteOffset, byteLength }: Float32Array | Uint16Array) =>
    new Uint8Array(buffer, byteOffset, byteLength);
  if (scaleBits === 16) {
    const type = m.options.scaleType ?? "float16";
    const load = joined(({ scales }) => bytesOf(type === "float16" ? f32ToF16(scales) : scales));
    return m.castOnce(g.initializer(`${name}/scales`, type, shape, load));
  }
  const codes = storedCodes(
    g,
    `${name}/scaleCodes`,
    scaleBits,
    shape,
    joined((matrix) => scaleCodes(matrix, matrix.scaleGrid!)),
  );
  const factors = g.initializer(
    `${name}/scaleFactors`,
    "float16",
    [shape[0], 1],
    joined(({ scaleGrid }) => bytesOf(f32ToF16(scaleGrid!.factors))),
  );
  const zero = scaleZero(scaleBits, symmetric);
  const float = ops.cast(g, codes, "float32");
  const centred = zero === 0 ? float : ops.sub(g, float, g.scalar(zero));
  // 8 bits times the 11 of a float16 are exact in float32
  const step = ops.mul(g, ops.cast(g, factors, "float32"), g.scalar(2 ** -scaleBits));
  return m.castOnce(ops.mul(g, centred, step));
}

function joinBytes(parts: readonly Uint8Array[]): Uint8Array {
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.byteLength, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.byteLength;
  }
  return whole;
}
