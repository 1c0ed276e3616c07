/**
 * The integer twin of a graph with MatMulNBits, for ONNX Runtime's WASM provider, whose 4-bit kernel unpacks to float32
 * at every call. Made once from the same download: codes and group scales become int8 with one scale per row, products
 * those of `integer-product.ts`.
 */
import { NibbleError } from "../errors.ts";
import type { ByteSink } from "../files.ts";
import { storedAt } from "../onnx/external-data.ts";
import { ConstantFolder, type ConstantTensor, withoutUnused } from "../onnx/fold-constants.ts";
import { elementCode, Graph, type Initializer, toGraphProto, type Value } from "../onnx/graph.ts";
import {
  type IntegerPart,
  integerProduct,
  oneTokenProduct,
  planesAfter,
  productParts,
  type RoundedTokens,
  roundTokens,
} from "../onnx/integer-product.ts";
import type { AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto } from "../onnx/proto.ts";
import { f16ToF32 } from "../tensor/dtypes.ts";
import { int8Columns, type PackedMatrix } from "./int8-columns.ts";

/** ONNX Runtime maps external tensors; 64 keeps every vector load aligned. */
const ALIGNMENT = 64;
/** TensorProto.DataType */
const FLOAT = 1;
const INT8 = 3;
const INT64 = 7;
const FLOAT16 = 10;

export interface IntegerGraphIo {
  /** The bytes of an initializer, wherever the file keeps them. */
  read(tensor: TensorProto): Promise<Uint8Array>;
  /** Where large tensors of the new graph go, the ones that stay as they are included: one file serves it. */
  readonly sink: ByteSink;
  /** The name of that file beside the new graph. */
  readonly location: string;
  readonly onMatrix?: (done: number, total: number) => void;
}

/** The same model with every MatMulNBits replaced; `model` is left as it is. */
export async function toIntegerGraph(model: ModelProto, io: IntegerGraphIo): Promise<ModelProto> {
  const { graph } = model;
  const constants = new ConstantFolder(model, io.read);
  const data = new DataFile(io);
  const added = new Map<string, TensorProto>();
  const makers = new Map(graph.node.flatMap((one) => one.output.map((name) => [name, one.opType] as const)));
  const known = new Set(graph.initializer.map(({ name }) => name));
  const weights = new Map<string, readonly IntegerPart[]>();
  const tokens = new Map<string, RoundedTokens>();
  // An expert that no token was routed to reads none.
  const mayBeEmpty = graph.node.some(({ opType }) => opType === "NonZero");
  const total = graph.node.filter(({ opType }) => opType === "MatMulNBits").length;
  let done = 0;

  const constant = async (name: string): Promise<ConstantTensor> => {
    const value = await constants.value(name);
    if (!value) throw new NibbleError("unsupported", `${name}: a MatMulNBits weight that is computed at run time.`);
    return value;
  };
  const floats = async (name: string): Promise<Float32Array> => {
    const { dataType, bytes } = await constant(name);
    const { buffer } = new Uint8Array(bytes); // aligned
    if (dataType === FLOAT) return new Float32Array(buffer);
    if (dataType === FLOAT16) return f16ToF32(new Uint16Array(buffer));
    throw new NibbleError("unsupported", `${name}: scales of ONNX type ${dataType}; float32 or float16 is known.`);
  };

  const anyTokens: NodeProto[] = [];
  const oneToken: NodeProto[] = [];
  for (const original of graph.node) {
    if (constants.unpacked.has(original.output[0])) continue;
    if (original.opType !== "MatMulNBits") {
      anyTokens.push(original);
      oneToken.push(original);
      continue;
    }
    const [x, codes, scales, zeros, , biasName] = original.input;
    const shape = {
      rows: attribute(original, "N"),
      cols: attribute(original, "K"),
      bits: attribute(original, "bits"),
      groupSize: attribute(original, "block_size"),
    };
    let parts = weights.get(codes);
    if (!parts) {
      const zeroBytes = zeros ? (await constant(zeros)).bytes : undefined;
      const matrix = { ...shape, codes: (await constant(codes)).bytes, scales: await floats(scales), zeros: zeroBytes };
      parts = await appendParts(`${codes}/int8`, matrix, data, added);
      weights.set(codes, parts);
    }
    const input: Value = { name: x, type: "float32", shape: ["batch", "seq", shape.cols] };
    const bias: Value | undefined = biasName ? { name: biasName, type: "float32", shape: [shape.rows] } : undefined;
    const planes = planesAfter(makers.get(x));
    const [y] = original.output;
    /** Nodes of a product, of which the last gives what the original gave. */
    const append = (to: NodeProto[], build: (g: Graph) => Value) => {
      const product = new Graph("product");
      const made = build(product);
      for (const constant of product.initializers.values()) {
        if (!known.has(constant.name)) added.set(constant.name, inlineTensor(constant));
      }
      to.push(...toGraphProto(product, inlineTensor).node.map((step) => renamed(step, { [made.name]: y })));
    };
    append(anyTokens, (g) => {
      let rounded = tokens.get(x);
      if (!rounded) {
        g.scope = `${x}/int8`;
        rounded = roundTokens(g, input, { planes, mayBeEmpty });
        tokens.set(x, rounded);
      }
      g.scope = `${y}/int8`;
      return integerProduct(g, rounded, parts, bias);
    });
    append(oneToken, (g) => {
      g.scope = `${y}/int8`;
      return oneTokenProduct(g, input, planes, parts, bias);
    });
    io.onMatrix?.(++done, total);
  }

  const outputs = graph.output.map(({ name }) => name);
  const branches = [oneToken, anyTokens].map((nodes) => withoutUnused(nodes, outputs));
  const used = new Set(branches.flat().flatMap(({ input }) => input));
  // of one token an expert gets one or none; a graph of something else than tokens stays one
  const chooses = !mayBeEmpty && graph.input.some(({ name }) => name === TOKENS);
  const node = chooses ? byTokens(graph, branches[0], branches[1]) : branches[1];
  if (chooses) added.set(ONE.name!, ONE);
  const kept: TensorProto[] = [];
  for (const tensor of graph.initializer) {
    if (!used.has(tensor.name!)) continue;
    kept.push(tensor.dataLocation === 1 ? await data.append(headOf(tensor), await io.read(tensor)) : tensor);
  }
  for (const name of constants.unpacked) {
    if (!used.has(name)) continue;
    const { dataType, dims, bytes } = (await constants.value(name))!;
    kept.push(await data.append({ name, dataType, dims: dims.map(BigInt) }, bytes));
  }
  return { ...model, graph: { ...graph, node, initializer: [...kept, ...added.values()] } };
}

/** Writes a matrix as int8, in the parts that it is multiplied in. */
async function appendParts(
  name: string,
  matrix: PackedMatrix,
  data: DataFile,
  added: Map<string, TensorProto>,
): Promise<IntegerPart[]> {
  const { rows, cols } = matrix;
  const parts: IntegerPart[] = [];
  for (const [start, end] of productParts(rows)) {
    const part = start === 0 && end === rows ? name : `${name}/${start}`;
    const { values, rowScales } = int8Columns(matrix, start, end);
    const dims = [BigInt(cols), BigInt(end - start)];
    added.set(part, await data.append({ name: part, dataType: INT8, dims }, new Uint8Array(values.buffer)));
    const head = { name: `${part}/rowScales`, dataType: FLOAT, dims: [BigInt(end - start)] };
    added.set(head.name, await data.append(head, new Uint8Array(rowScales.buffer)));
    parts.push({
      weight: { name: part, type: "int8", shape: [cols, end - start] },
      rowScales: { name: head.name, type: "float32", shape: [end - start] },
    });
  }
  return parts;
}

/** A small constant inside the graph. */
function inlineTensor({ name, type, shape, data }: Initializer): TensorProto {
  return { name, dataType: elementCode(type), dims: shape.map(BigInt), rawData: data as Uint8Array };
}

function renamed(node: NodeProto, names: Readonly<Record<string, string>>): NodeProto {
  const change = (name: string) => names[name] ?? name;
  return { ...node, input: node.input.map(change), output: node.output.map(change) };
}

const TOKENS = "input_ids";
const ONE: TensorProto = {
  name: "tokens/one",
  dataType: INT64,
  dims: [],
  rawData: new Uint8Array(BigInt64Array.of(1n).buffer),
};

/** Nodes that choose a branch by the number of tokens; both branches read the same weights. */
function byTokens(graph: GraphProto, one: readonly NodeProto[], any: readonly NodeProto[]): NodeProto[] {
  const branch = (name: string, nodes: readonly NodeProto[]) => {
    // a branch has names of its own for what it gives
    const names = Object.fromEntries(graph.output.map((output) => [output.name, `${name}/${output.name}`]));
    const output = graph.output.map((value) => ({ ...value, name: names[value.name] }));
    return { name, node: nodes.map((node) => renamed(node, names)), initializer: [], input: [], output };
  };
  const step = (opType: string, input: string[], output: string[], attribute: AttributeProto[] = []): NodeProto => ({
    opType,
    name: `tokens/${opType}`,
    input,
    output,
    attribute,
  });
  return [
    step("Size", [TOKENS], ["tokens/count"]),
    step("Equal", ["tokens/count", ONE.name!], ["tokens/isOne"]),
    step(
      "If",
      ["tokens/isOne"],
      graph.output.map(({ name }) => name),
      [
        { name: "then_branch", type: 5, g: branch("oneToken", one) },
        { name: "else_branch", type: 5, g: branch("anyTokens", any) },
      ],
    ),
  ];
}

function attribute(node: NodeProto, name: string): number {
  const value = node.attribute.find((one) => one.name === name)?.i;
  if (value === undefined) throw new NibbleError("bad_file", `${node.name}: MatMulNBits without ${name}.`);
  return Number(value);
}

function headOf({ name, dataType, dims }: TensorProto): TensorProto {
  return { name, dataType, dims };
}

/** The data file of the new graph, front to back. */
class DataFile {
  private offset = 0;

  constructor(private readonly io: IntegerGraphIo) {}

  async append(head: TensorProto, bytes: Uint8Array): Promise<TensorProto> {
    const start = Math.ceil(this.offset / ALIGNMENT) * ALIGNMENT;
    if (start > this.offset) await this.io.sink.write(new Uint8Array(start - this.offset));
    await this.io.sink.write(bytes);
    this.offset = start + bytes.byteLength;
    return storedAt(head, { location: this.io.location, offset: start, sizeBytes: bytes.byteLength });
  }
}
