/**
 * A decoder's graph for pieces of prompts, in which products with 4-bit weights are products of integers: ONNX Runtime's
 * 4-bit kernel multiplies many rows at the speed of float32, its int8 one three times as fast (512 rows of SmolLM2, 2
 * threads of a CPU with AVX-512 VNNI: 430 against 1,500 billion operations a second).
 *   x (1, seq, cols)   rotated in blocks of 64 columns, rounded to 8 bits with one scale a token
 *   W (rows, cols)     codes and group scales, rotated alike, rounded to 8 bits with one scale a row
 * With the rotation 8 bits are enough. KL to the float model, WikiText-2 test (`test/bench/twin-drift.ts`): SmolLM2 by
 * `default` 0.0937 as stored, 0.0944 so, 0.1027 unrotated (12 windows); Qwen2.5-Coder-0.5B by `fast` 0.0696, 0.0710,
 * 0.0795 (8 windows).
 */
import { computesInFloat32 } from "../onnx/by-rows.ts";
import { storedAt } from "../onnx/external-data.ts";
import { ConstantFolder, type MemoryFile, type ReadTensor } from "../onnx/fold-constants.ts";
import { elementCode, Graph, inlineGraphProto, type Value } from "../onnx/graph.ts";
import { integerProduct, type RoundedTokens, roundTokens } from "../onnx/integer-product.ts";
import * as ops from "../onnx/ops.ts";
import type { ModelProto, NodeProto, TensorProto } from "../onnx/proto.ts";
import type { PackedMatrix } from "./int8-columns.ts";
import { BLOCK, blockRotation, rotatedColumns } from "./rotated-columns.ts";

export interface IntegerPrompts {
  /** For `byRows`; the model itself where none of its products can be replaced. */
  readonly model: ModelProto;
  /** Its new weights. */
  readonly files: readonly MemoryFile[];
}

/** Bytes of int8 weights that `withIntegerProducts` makes. */
export function integerProductBytes(model: ModelProto): number {
  const matrices = new Map(integerProducts(model).map((node) => [node.input[CODES], node]));
  return [...matrices.values()].reduce((sum, node) => sum + attribute(node, "N") * attribute(node, "K"), 0);
}

/** `model` is left as it is. @param read the bytes of its initializers */
export async function withIntegerProducts(model: ModelProto, read: ReadTensor): Promise<IntegerPrompts> {
  const products = new Set(integerProducts(model));
  const constants = new ConstantFolder(model, read);
  const g = new Graph("prompts");
  const files: MemoryFile[] = [];
  const stored = new Map<string, TensorProto>();
  const rounded = new Map<string, RoundedTokens>();
  const store = (name: string, dataType: number, dims: readonly number[], data: Uint8Array): void => {
    const path = `prompts/${files.length}`;
    files.push({ path, data });
    const head = { name, dataType, dims: dims.map(BigInt) };
    stored.set(name, storedAt(head, { location: path, offset: 0, sizeBytes: data.byteLength }));
  };

  /** Where the new nodes of a product start among those of `g`. */
  const starts = new Map<NodeProto, number>();
  for (const node of products) {
    const [x, codes] = node.input;
    const [rows, cols] = [attribute(node, "N"), attribute(node, "K")];
    const weight: Value = { name: `${codes}/rotated`, type: "int8", shape: [cols, rows] };
    const rowScales: Value = { name: `${codes}/rowScales`, type: "float32", shape: [rows] };
    if (!stored.has(weight.name)) {
      const matrix = await packedMatrix(node, constants);
      if (!matrix) continue;
      const columns = rotatedColumns(matrix);
      store(weight.name, INT8, [cols, rows], new Uint8Array(columns.values.buffer));
      store(rowScales.name, FLOAT, [rows], new Uint8Array(columns.rowScales.buffer));
    }
    starts.set(node, g.nodes.length);
    let tokens = rounded.get(x);
    if (!tokens) {
      g.scope = `${x}/rotated`;
      tokens = roundTokens(g, rotated(g, { name: x, type: "float32", shape: ["batch", "seq", cols] }));
      rounded.set(x, tokens);
    }
    g.scope = `${node.output[0]}/int8`;
    const bias: Value | undefined = node.input[BIAS]
      ? { name: node.input[BIAS], type: "float32", shape: [rows] }
      : undefined;
    const product = integerProduct(g, tokens, [{ weight, rowScales }], bias);
    g.nodes[g.nodes.length - 1] = { ...g.nodes[g.nodes.length - 1], outputs: [node.output[0]] };
    g.values.delete(product.name);
  }
  if (starts.size === 0) return { model, files };

  const added = inlineGraphProto(g);
  const ends = [...starts.values(), g.nodes.length];
  const made = new Map([...starts.keys()].map((node, i) => [node, added.node.slice(ends[i], ends[i + 1])]));
  const node = model.graph.node.flatMap((one) => made.get(one) ?? [one]);
  const there = new Set(model.graph.initializer.map(({ name }) => name));
  const initializer = [
    ...model.graph.initializer,
    ...added.initializer.filter(({ name }) => !there.has(name)),
    ...stored.values(),
  ];
  return { model: { ...model, graph: { ...model.graph, node, initializer } }, files };
}

/** Places among the inputs of MatMulNBits. */
const CODES = 1;
const SCALES = 2;
const ZEROS = 3;
const ORDER = 4;
const BIAS = 5;

/** TensorProto.DataType */
const FLOAT = elementCode("float32");
const UINT8 = elementCode("uint8");
const INT8 = elementCode("int8");

/**
 * Products that integers can replace: 4-bit codes whose file lets activations be rounded. Not the head, which computes
 * one row of a prompt, nor any of a model with experts, which get few rows each.
 */
function integerProducts(model: ModelProto): NodeProto[] {
  const { node } = model.graph;
  if (!computesInFloat32(model) || node.some(({ opType }) => opType === "NonZero")) return [];
  const read = new Set<string>();
  const found: NodeProto[] = [];
  for (const one of node.toReversed()) {
    const isProduct = one.opType === "MatMulNBits";
    const isRead = one.output.some((name) => read.has(name));
    if (isProduct || isRead) for (const name of one.input) read.add(name);
    if (isProduct && isRead && isRoundable(one)) found.push(one);
  }
  return found.reverse();
}

function isRoundable(node: NodeProto): boolean {
  const wholeBlocks = attribute(node, "K") % BLOCK === 0 && attribute(node, "N") >= BLOCK;
  return attribute(node, "bits") === 4 && attribute(node, "accuracy_level") === 4 && wholeBlocks && !node.input[ORDER];
}

/** Undefined where something of it is computed at run time, or stored in a way that Nibble does not write. */
async function packedMatrix(node: NodeProto, constants: ConstantFolder): Promise<PackedMatrix | undefined> {
  const [codes, scales] = [await constants.value(node.input[CODES]), await constants.value(node.input[SCALES])];
  const zeros = node.input[ZEROS] ? await constants.value(node.input[ZEROS]) : undefined;
  if (codes?.dataType !== UINT8 || scales?.dataType !== FLOAT) return undefined;
  if (node.input[ZEROS] && zeros?.dataType !== UINT8) return undefined;
  return {
    rows: attribute(node, "N"),
    cols: attribute(node, "K"),
    bits: 4,
    groupSize: attribute(node, "block_size"),
    codes: codes.bytes,
    scales: new Float32Array(new Uint8Array(scales.bytes).buffer), // aligned
    zeros: zeros?.bytes,
  };
}

function attribute(node: NodeProto, name: string): number {
  return Number(node.attribute.find((one) => one.name === name)?.i ?? 0);
}

/** x (batch, seq, cols) */
function rotated(g: Graph, x: Value): Value {
  const [batch, seq, cols] = x.shape;
  const H = g.initializer(`const/float32/rotation/${BLOCK}`, "float32", [BLOCK, BLOCK], blockRotation());
  const blocks = ops.reshape(g, x, [0, 0, -1, BLOCK], [batch, seq, (cols as number) / BLOCK, BLOCK]);
  return ops.reshape(g, ops.matMul(g, blocks, H), [0, 0, -1], x.shape);
}
