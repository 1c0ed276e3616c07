/**
 * The integer twin of a graph with MatMulNBits, for ONNX Runtime's WASM provider, whose 4-bit kernel unpacks to float32
 * at every call. Made once from the same download:
 *
 *   W (rows, cols)     codes and group scales -> int8 with one scale per row, stored (cols, rows) for MatMulInteger
 *   x (.., cols)       per token: m = max|x|, u = round(127 x / m) + 128 as uint8
 *   y (.., rows)       (u - 128) W8, times the row's scale / 127, times m
 *
 * One scale per token, made of plain operators: the stock DynamicQuantizeLinear takes one per tensor and costs ten times
 * the drift. uint8 by int8: int8 by int8 has no fast kernel in WASM.
 */
import { NibbleError } from "../errors.ts";
import type { ByteSink } from "../files.ts";
import { ConstantFolder, type ConstantTensor, withoutUnused } from "../onnx/fold-constants.ts";
import type { AttributeProto, ModelProto, NodeProto, TensorProto } from "../onnx/proto.ts";
import { f16ToF32 } from "../tensor/dtypes.ts";
import { int8Columns, type PackedMatrix } from "./int8-columns.ts";

const INT8_MAX = 127;
const UINT8_ZERO = 128;
/** A token of zeros has no scale; this one keeps its codes at zero. */
const SMALLEST_MAX = 1e-20;
/** ONNX Runtime maps external tensors; 64 keeps every vector load aligned. */
const ALIGNMENT = 64;
/**
 * A head is cut into products of so many columns. The kernel copies strips of its matrix at every call, and in a
 * matrix of 49,152 columns every row of a strip lies on another page: 12 ms a token on SmolLM2, 4 in parts.
 */
const PART_ROWS = 1536;
/** Matrices up to so many rows stay whole. */
const WHOLE_ROWS = 8192;
/** TensorProto.DataType */
const FLOAT = 1;
const UINT8 = 2;
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
  const weights = new Map<string, readonly string[]>();
  const tokens = new Map<string, QuantizedTokens>();
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

  const node: NodeProto[] = [];
  for (const original of graph.node) {
    if (constants.unpacked.has(original.output[0])) continue;
    if (original.opType !== "MatMulNBits") {
      node.push(original);
      continue;
    }
    const [x, codes, scales, zeros, , bias] = original.input;
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
    let quantized = tokens.get(x);
    if (!quantized) {
      quantized = quantizeTokens(x, added, mayBeEmpty);
      tokens.set(x, quantized);
      node.push(...quantized.nodes);
    }
    node.push(...multiply(original, quantized, parts, bias));
    io.onMatrix?.(++done, total);
  }

  const live = withoutUnused(
    node,
    graph.output.map(({ name }) => name),
  );
  const used = new Set(live.flatMap(({ input }) => input));
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
  return { ...model, graph: { ...graph, node: live, initializer: [...kept, ...added.values()] } };
}

/** Writes a matrix as int8, whole or in parts of rows; the names of the parts, each with its "/scales". */
async function appendParts(
  name: string,
  matrix: PackedMatrix,
  data: DataFile,
  added: Map<string, TensorProto>,
): Promise<string[]> {
  const { rows, cols } = matrix;
  const partRows = rows > WHOLE_ROWS ? PART_ROWS : rows;
  const names: string[] = [];
  for (let start = 0; start < rows; start += partRows) {
    const part = partRows === rows ? name : `${name}/${start}`;
    const end = Math.min(rows, start + partRows);
    const { values, rowScales } = int8Columns(matrix, start, end);
    const dims = [BigInt(cols), BigInt(end - start)];
    added.set(part, await data.append({ name: part, dataType: INT8, dims }, new Uint8Array(values.buffer)));
    const scales = rowScales.map((scale) => scale / INT8_MAX); // of the token's half
    const head = { name: `${part}/scales`, dataType: FLOAT, dims: [BigInt(end - start)] };
    added.set(head.name, await data.append(head, new Uint8Array(scales.buffer)));
    names.push(part);
  }
  return names;
}

interface QuantizedTokens {
  /** uint8 codes, and the greatest magnitude of each token (.., 1) */
  readonly codes: string;
  readonly bounds: string;
  readonly nodes: readonly NodeProto[];
}

/**
 * The nodes that round an activation; every matrix that reads it shares them.
 * @param mayBeEmpty x can have no rows: ONNX Runtime 1.30 reduces (0, cols) to itself, not to (0, 1), so that is cut.
 */
function quantizeTokens(x: string, added: Map<string, TensorProto>, mayBeEmpty: boolean): QuantizedTokens {
  const scalar = (name: string, value: number) => {
    added.set(name, { name, dataType: FLOAT, dims: [], rawData: new Uint8Array(Float32Array.of(value).buffer) });
    return name;
  };
  const whole = (name: string, value: bigint) => {
    added.set(name, { name, dataType: INT64, dims: [1n], rawData: new Uint8Array(BigInt64Array.of(value).buffer) });
    return name;
  };
  const last = whole("int8/last", -1n);
  scalar("int8/whole", 1); // tokens' scales are not one number: they follow the product
  const zero = "int8/zero";
  added.set(zero, { name: zero, dataType: UINT8, dims: [], rawData: Uint8Array.of(UINT8_ZERO) });
  const at = (part: string) => `${x}/int8/${part}`;
  const step = (opType: string, input: string[], part: string, attributes: AttributeProto[] = []): NodeProto => ({
    opType,
    name: at(opType),
    input,
    output: [at(part)],
    attribute: attributes,
  });
  return {
    codes: at("codes"),
    bounds: at("bound"),
    nodes: [
      step("Abs", [x], "abs"),
      step("ReduceMax", [at("abs"), last], "max", [int("keepdims", 1)]),
      ...(mayBeEmpty ? [step("Slice", [at("max"), whole("int8/first", 0n), whole("int8/one", 1n), last], "one")] : []),
      step("Max", [at(mayBeEmpty ? "one" : "max"), scalar("int8/smallest", SMALLEST_MAX)], "bound"),
      step("Div", [x, at("bound")], "share"),
      step("QuantizeLinear", [at("share"), scalar("int8/step", 1 / INT8_MAX), zero], "codes"),
    ],
  };
}

/** The product of rounded tokens and the parts of a matrix, back in floats under the original's name. */
function multiply(
  original: NodeProto,
  { codes, bounds }: QuantizedTokens,
  parts: readonly string[],
  bias?: string,
): NodeProto[] {
  const [y] = original.output;
  const at = (part: string | number) => `${y}/int8/${part}`;
  const node = (
    opType: string,
    input: string[],
    output: string,
    more: Pick<NodeProto, "domain"> & { attribute?: AttributeProto[] } = {},
  ): NodeProto => ({ opType, name: `${output}/${opType}`, input, output: [output], attribute: [], ...more });
  const products = parts.map((part, i) => {
    const input = [codes, part, "int8/whole", `${part}/scales`, "int8/zero"];
    return node("MatMulIntegerToFloat", input, at(i), { domain: "com.microsoft" });
  });
  const names = products.map(({ output }) => output[0]);
  if (names.length > 1) products.push(node("Concat", names, at("row"), { attribute: [int("axis", -1)] }));
  const row = products.at(-1)!.output[0];
  if (!bias) return [...products, node("Mul", [row, bounds], y)];
  return [...products, node("Mul", [row, bounds], at("product")), node("Add", [at("product"), bias], y)];
}

function int(name: string, value: number): AttributeProto {
  return { name, type: 2, i: BigInt(value) };
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
    const externalData = [
      { key: "location", value: this.io.location },
      { key: "offset", value: String(start) },
      { key: "length", value: String(bytes.byteLength) },
    ];
    return { ...head, dataLocation: 1, externalData };
  }
}
