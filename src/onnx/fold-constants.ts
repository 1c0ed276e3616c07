/**
 * Computes nodes on constants before a session opens: what ONNX Runtime does when it opens a file whose codes and scales
 * are stored at their own width (src/arch/stored-width.ts), but one tensor at a time, so that no intermediate outlives its
 * use. Only values that come from uint8 constants are computed; other constants (float16 scales behind a Cast) are left
 * to the runtime. An operator or a type that is not in the table below is left to it as well.
 */
import { NibbleError } from "../errors.ts";
import { f16ToF32, f32ToF16 } from "../tensor/dtypes.ts";
import { storedAt } from "./external-data.ts";
import { modelHeader } from "./graph.ts";
import type { ModelProto, NodeProto, TensorProto } from "./proto.ts";

/** TensorProto.DataType */
const FLOAT = 1;
const UINT8 = 2;
const INT64 = 7;
const FLOAT16 = 10;

/** Smaller tensors stay in the graph: shape inference needs them there, and V8 may move them. */
const INLINE_BYTES = 1024;

export interface ConstantTensor {
  /** TensorProto.DataType */
  readonly dataType: number;
  readonly dims: readonly number[];
  /** Little-endian, row-major. */
  readonly bytes: Uint8Array;
}

/** A file of tensors in memory, as ONNX Runtime's `externalData` takes it. */
export interface MemoryFile {
  readonly path: string;
  readonly data: Uint8Array;
}

/** The bytes of an initializer, wherever the file keeps them. */
export type ReadTensor = (tensor: TensorProto) => Promise<Uint8Array>;

/** Types that an operator is computed in; the first input decides. */
const operators: Readonly<Record<string, readonly number[]>> = {
  BitShift: [UINT8],
  BitwiseAnd: [UINT8],
  BitwiseOr: [UINT8],
  Add: [UINT8],
  Concat: [UINT8],
  Reshape: [UINT8],
  Slice: [UINT8],
  Cast: [UINT8, FLOAT, FLOAT16],
  Mul: [FLOAT],
  Sub: [FLOAT],
};

export class ConstantFolder {
  private readonly initializers: ReadonlyMap<string, TensorProto>;
  /** The nodes that can be computed, by their output. */
  private readonly computed = new Map<string, NodeProto>();
  /** Those whose value depends on a uint8 constant. */
  private readonly fromBytes = new Set<string>();
  private readonly readers = new Map<string, number>();
  private readonly kept = new Map<string, Promise<ConstantTensor>>();
  /** Initializers that were read while a value is computed: a plane is read by every piece. */
  private readonly planes = new Map<string, Uint8Array>();

  constructor(
    private readonly model: ModelProto,
    private readonly read: ReadTensor,
  ) {
    const { graph } = model;
    this.initializers = new Map(graph.initializer.map((tensor) => [tensor.name!, tensor]));
    const types = new Map(graph.initializer.map(({ name, dataType }) => [name!, dataType]));
    const isBytes = (name: string) => this.fromBytes.has(name) || this.initializers.get(name)?.dataType === UINT8;
    for (const node of graph.node) {
      for (const name of node.input) this.readers.set(name, (this.readers.get(name) ?? 0) + 1);
      const type = types.get(node.input[0]);
      if (node.output.length !== 1 || type === undefined || node.domain) continue;
      if (!operators[node.opType]?.includes(type) || !node.input.every((name) => types.has(name))) continue;
      const [output] = node.output;
      this.computed.set(output, node);
      types.set(output, node.opType === "Cast" ? Number(attributeOf(node, "to")) : type);
      if (node.input.some(isBytes)) this.fromBytes.add(output);
    }
  }

  /** Values that a file of Nibble's stores narrower than they are used; none where another tool made it. */
  get unpacked(): ReadonlySet<string> {
    return this.model.producerName === modelHeader.producerName ? this.fromBytes : new Set();
  }

  /** The value of a constant, stored or computed; undefined where it depends on inputs. */
  async value(name: string): Promise<ConstantTensor | undefined> {
    const stored = this.initializers.get(name);
    if (stored) {
      return { dataType: stored.dataType!, dims: (stored.dims ?? []).map(Number), bytes: await this.read(stored) };
    }
    const node = this.computed.get(name);
    if (!node) return undefined;
    if ((this.readers.get(name) ?? 0) < 2) return this.compute(node);
    let value = this.kept.get(name);
    if (!value) {
      value = this.compute(node);
      this.kept.set(name, value);
    }
    return value;
  }

  private async compute(node: NodeProto): Promise<ConstantTensor> {
    if (node.opType === "BitwiseOr") return this.joinedPlanes(node);
    const inputs: ConstantTensor[] = [];
    for (const name of node.input) inputs.push((await this.value(name))!);
    return computeNode(node, inputs);
  }

  /** Planes put together where the result is, without the tensors between: Or(Concat(And(Shift(plane), mask), ...), ...). */
  private async joinedPlanes(node: NodeProto): Promise<ConstantTensor> {
    const dims = await this.dimsOf(node.output[0]);
    const bytes = new Uint8Array(productOf(dims));
    await this.orInto(node.output[0], bytes);
    this.planes.clear();
    return { dataType: UINT8, dims, bytes };
  }

  /** Sets, in bytes that start as zeros, the bits that a value has. */
  private async orInto(name: string, out: Uint8Array): Promise<void> {
    const node = this.computed.get(name);
    if (node?.opType === "BitwiseOr") {
      for (const input of node.input) await this.orInto(input, out);
    } else if (node?.opType === "Concat" && attributeOf(node, "axis") === 0n) {
      let start = 0;
      for (const input of node.input) {
        const end = start + productOf(await this.dimsOf(input));
        await this.orInto(input, out.subarray(start, end));
        start = end;
      }
    } else if (node?.opType === "BitwiseAnd" && (await this.isByte(node.input[1]))) {
      const mask = await this.byteOf(node.input[1]);
      const shift = this.computed.get(node.input[0]);
      const by = shift?.opType === "BitShift" && (await this.isByte(shift.input[1])) ? shift : undefined;
      const distance = by ? await this.byteOf(by.input[1]) : 0;
      const left = by && attributeOf(by, "direction") === "LEFT";
      const bytes = await this.planeOf(by ? by.input[0] : node.input[0]);
      // a shift of whole words moves bits into the next byte, unless the mask takes them off
      const kept = left ? mask & (0xff << distance) : mask & (0xff >> distance);
      orMoved(bytes, left ? 0 : distance, left ? distance : 0, kept, out);
    } else {
      const bytes = await this.planeOf(name);
      if (bytes.length !== out.length) throw new NibbleError("unsupported", `${name}: planes of two sizes.`);
      orMoved(bytes, 0, 0, 0xff, out);
    }
  }

  private async planeOf(name: string): Promise<Uint8Array> {
    const bytes = this.planes.get(name) ?? (await this.value(name))!.bytes;
    this.planes.set(name, bytes);
    return bytes;
  }

  private async isByte(name: string): Promise<boolean> {
    return productOf(await this.dimsOf(name)) === 1;
  }

  private async byteOf(name: string): Promise<number> {
    return (await this.planeOf(name))[0];
  }

  /** The shape of a constant, without its values where they are planes put together. */
  private async dimsOf(name: string): Promise<readonly number[]> {
    const stored = this.initializers.get(name);
    if (stored) return (stored.dims ?? []).map(Number);
    const node = this.computed.get(name)!;
    if (node.opType === "Concat") {
      const parts = await Promise.all(node.input.map((input) => this.dimsOf(input)));
      const axis = Number(attributeOf(node, "axis"));
      const at = axis < 0 ? parts[0].length + axis : axis;
      return parts[0].with(
        at,
        parts.reduce((sum, dims) => sum + dims[at], 0),
      );
    }
    if (["BitwiseAnd", "BitwiseOr", "BitShift"].includes(node.opType)) return this.dimsOf(node.input[0]);
    return (await this.value(name))!.dims;
  }

  /** The model on computed constants, and the bytes of all its large tensors, each a file of its own. */
  async fold(): Promise<{ readonly model: ModelProto; readonly files: readonly MemoryFile[] }> {
    const { graph } = this.model;
    const node = withoutUnused(
      graph.node.filter(({ output }) => !this.unpacked.has(output[0])),
      graph.output.map(({ name }) => name),
    );
    const used = new Set(node.flatMap(namesRead));
    for (const { name } of graph.output) used.add(name);
    const files: MemoryFile[] = [];
    const external = (head: TensorProto, data: Uint8Array): TensorProto => {
      if (data.byteLength < INLINE_BYTES) return { ...head, rawData: data };
      const path = `folded/${files.length}`;
      files.push({ path, data });
      return storedAt(head, { location: path, offset: 0, sizeBytes: data.byteLength });
    };
    const initializer: TensorProto[] = [];
    for (const tensor of graph.initializer) {
      if (!used.has(tensor.name!)) continue;
      const { name, dataType, dims } = tensor;
      initializer.push(
        tensor.dataLocation === 1 ? external({ name, dataType, dims }, await this.read(tensor)) : tensor,
      );
    }
    for (const name of this.unpacked) {
      if (!used.has(name)) continue;
      const { dataType, dims, bytes } = (await this.value(name))!;
      this.kept.delete(name);
      initializer.push(external({ name, dataType, dims: dims.map(BigInt) }, bytes));
    }
    return { model: { ...this.model, graph: { ...graph, node, initializer } }, files };
  }
}

/** Nodes that something still reads, in their order. */
export function withoutUnused(nodes: readonly NodeProto[], outputs: readonly string[]): NodeProto[] {
  const needed = new Set(outputs);
  const live: NodeProto[] = [];
  for (const node of nodes.toReversed()) {
    if (!node.output.some((name) => needed.has(name))) continue;
    for (const name of namesRead(node)) needed.add(name);
    live.push(node);
  }
  return live.reverse();
}

/** What a node reads: its inputs, and in its branches values of the graph around them. */
export function namesRead(node: NodeProto): string[] {
  const inside = node.attribute.flatMap(({ g }) => g?.node.flatMap(namesRead) ?? []);
  return [...node.input, ...inside];
}

function attributeOf(node: NodeProto, name: string): bigint | string | undefined {
  const found = node.attribute.find((attribute) => attribute.name === name);
  return found?.s ? new TextDecoder().decode(found.s) : found?.i;
}

function computeNode(node: NodeProto, inputs: readonly ConstantTensor[]): ConstantTensor {
  const [a, b] = inputs;
  switch (node.opType) {
    case "Cast":
      return cast(a, Number(attributeOf(node, "to")));
    case "Concat":
      return concat(inputs, Number(attributeOf(node, "axis")));
    case "Reshape":
      return { ...a, dims: reshaped(a, integers(b)) };
    case "Slice":
      return slice(a, inputs.slice(1).map(integers));
    case "Mul":
      return floats(a, b, multiply);
    case "Sub":
      return floats(a, b, subtract);
    case "BitShift": {
      const by = scalarByte(node, b);
      return attributeOf(node, "direction") === "LEFT"
        ? moved(a, 0, by, spread((0xff << by) & 0xff))
        : moved(a, by, 0, spread(0xff >> by));
    }
    case "BitwiseAnd":
      return moved(a, 0, 0, spread(scalarByte(node, b)));
    default: {
      const addend = scalarByte(node, b); // Add
      const bytes = new Uint8Array(a.bytes.length);
      for (let i = 0; i < bytes.length; i++) bytes[i] = a.bytes[i] + addend;
      return { ...a, bytes };
    }
  }
}

const WORD_BYTES = 4;

/** A byte in each of the four bytes of a word. */
const spread = (value: number) => Math.imul(value, 0x01010101);

/** A copy where bytes do not start at a word; `slice` would not do, Node's Buffer gives a view. */
function aligned(bytes: Uint8Array): Uint8Array {
  return bytes.byteOffset % WORD_BYTES === 0 ? bytes : new Uint8Array(bytes);
}

/** Bytes as words, filled up with zeros; a copy where they do not lie so. */
function wordsOf(bytes: Uint8Array): Uint32Array {
  const words = Math.ceil(bytes.length / WORD_BYTES);
  const fits = bytes.byteOffset % WORD_BYTES === 0 && bytes.byteOffset + words * WORD_BYTES <= bytes.buffer.byteLength;
  if (fits) return new Uint32Array(bytes.buffer, bytes.byteOffset, words);
  const copy = new Uint32Array(words);
  new Uint8Array(copy.buffer).set(bytes);
  return copy;
}

/** Every byte shifted and masked, four at a time; the mask also takes off what came from the next byte. */
function moved({ dims, bytes }: ConstantTensor, right: number, left: number, mask: number): ConstantTensor {
  const from = wordsOf(bytes);
  const out = new Uint32Array(from.length);
  for (let i = 0; i < out.length; i++) out[i] = ((from[i] >>> right) << left) & mask;
  return { dataType: UINT8, dims, bytes: new Uint8Array(out.buffer, 0, bytes.length) };
}

/** The same into `out`, which keeps the bits that it has. */
function orMoved(bytes: Uint8Array, right: number, left: number, mask: number, out: Uint8Array): void {
  const isAligned = out.byteOffset % WORD_BYTES === 0 && out.length % WORD_BYTES === 0;
  if (!isAligned) {
    for (let i = 0; i < out.length; i++) out[i] |= ((bytes[i] >> right) << left) & mask;
    return;
  }
  const from = wordsOf(bytes);
  const to = new Uint32Array(out.buffer, out.byteOffset, out.length / WORD_BYTES);
  const wide = spread(mask);
  for (let i = 0; i < to.length; i++) to[i] |= ((from[i] >>> right) << left) & wide;
}

function scalarByte(node: NodeProto, tensor: ConstantTensor): number {
  if (tensor.bytes.length !== 1) throw unexpected(node, "a second operand that is no single byte");
  return tensor.bytes[0];
}

function unexpected(node: NodeProto, what: string): NibbleError {
  return new NibbleError("unsupported", `${node.name ?? node.opType}: ${node.opType} on constants with ${what}.`);
}

const productOf = (dims: readonly number[]) => dims.reduce((product, size) => product * size, 1);

function integers({ dataType, bytes }: ConstantTensor): number[] {
  if (dataType !== INT64) throw new NibbleError("bad_file", "A shape or a range that is not of int64.");
  return Array.from(new BigInt64Array(new Uint8Array(bytes).buffer), Number);
}

function reshaped({ dims }: ConstantTensor, shape: readonly number[]): number[] {
  const known = shape.map((size, i) => (size === 0 ? dims[i] : size));
  const rest = productOf(dims) / productOf(known.filter((size) => size !== -1));
  return known.map((size) => (size === -1 ? rest : size));
}

function concat(inputs: readonly ConstantTensor[], axis: number): ConstantTensor {
  const [{ dataType, dims }] = inputs;
  const at = axis < 0 ? dims.length + axis : axis;
  const size = inputs.reduce((sum, input) => sum + input.dims[at], 0);
  const outer = productOf(dims.slice(0, at));
  const rowBytes = inputs.map(({ bytes }) => bytes.length / outer);
  const bytes = new Uint8Array(inputs.reduce((sum, input) => sum + input.bytes.length, 0));
  let to = 0;
  for (let row = 0; row < outer; row++) {
    for (const [i, input] of inputs.entries()) {
      bytes.set(input.bytes.subarray(row * rowBytes[i], (row + 1) * rowBytes[i]), to);
      to += rowBytes[i];
    }
  }
  return { dataType, dims: dims.with(at, size), bytes };
}

/** Of the first axis, which is where the exporter cuts. */
function slice({ dataType, dims, bytes }: ConstantTensor, [starts, ends, axes]: readonly number[][]): ConstantTensor {
  if (axes[0] !== 0 || axes.length !== 1) {
    throw new NibbleError("unsupported", "A Slice of constants along another axis than the first.");
  }
  const rowBytes = bytes.length / dims[0];
  const [start, end] = [Math.min(starts[0], dims[0]), Math.min(ends[0], dims[0])];
  return { dataType, dims: dims.with(0, end - start), bytes: bytes.subarray(start * rowBytes, end * rowBytes) };
}

function cast({ dataType, dims, bytes }: ConstantTensor, to: number): ConstantTensor {
  const { buffer, byteOffset, byteLength } = aligned(bytes);
  const asFloats =
    dataType === UINT8
      ? new Float32Array(bytes)
      : dataType === FLOAT16
        ? f16ToF32(new Uint16Array(buffer, byteOffset, byteLength / 2))
        : new Float32Array(buffer, byteOffset, byteLength / WORD_BYTES);
  if (to !== FLOAT && to !== FLOAT16) throw new NibbleError("unsupported", `A Cast of constants to ONNX type ${to}.`);
  const typed = to === FLOAT16 ? f32ToF16(asFloats) : asFloats;
  return { dataType: to, dims, bytes: new Uint8Array(typed.buffer, typed.byteOffset, typed.byteLength) };
}

/** Two operands of one shape, or the second smaller: (rows, 1) beside (rows, cols), or one number. */
function floats(a: ConstantTensor, b: ConstantTensor, operation: FloatOperation): ConstantTensor {
  const [x, y] = [a, b].map((tensor) => {
    const { buffer, byteOffset, byteLength } = aligned(tensor.bytes);
    return new Float32Array(buffer, byteOffset, byteLength / WORD_BYTES);
  });
  const each = x.length / y.length;
  const perRow =
    b.dims.length === a.dims.length && b.dims.every((size, i) => size === a.dims[i] || i === a.dims.length - 1);
  if (y.length !== 1 && !(perRow && Number.isInteger(each))) {
    throw new NibbleError("unsupported", `Constants of shapes [${a.dims.join(", ")}] and [${b.dims.join(", ")}].`);
  }
  const out = new Float32Array(x.length);
  operation(x, y, y.length === 1 ? x.length : each, out);
  return { dataType: FLOAT, dims: a.dims, bytes: new Uint8Array(out.buffer) };
}

type FloatOperation = (x: Float32Array, y: Float32Array, each: number, out: Float32Array) => void;

/** Each number of y meets the next `each` of x. */
const multiply: FloatOperation = (x, y, each, out) => {
  for (let row = 0, i = 0; row < y.length; row++) for (const end = i + each; i < end; i++) out[i] = x[i] * y[row];
};

const subtract: FloatOperation = (x, y, each, out) => {
  for (let row = 0, i = 0; row < y.length; row++) for (const end = i + each; i < end; i++) out[i] = x[i] - y[row];
};
