/** An ONNX graph under construction: values with shapes, nodes, initializers whose bytes may be read only when written. */
import { NibbleError } from "../errors.ts";
import type { GraphProto, NodeProto, TensorProto, ValueInfoProto } from "./proto.ts";

/** Names as ONNX Runtime's JavaScript API has them. */
export type ElementType = "float32" | "float16" | "float64" | "int64" | "int32" | "int8" | "uint8" | "bool";

/** TensorProto.DataType of each, and bytes per element. */
const elementTypes: Readonly<Record<ElementType, { code: number; sizeBytes: number }>> = {
  float32: { code: 1, sizeBytes: 4 },
  uint8: { code: 2, sizeBytes: 1 },
  int8: { code: 3, sizeBytes: 1 },
  int32: { code: 6, sizeBytes: 4 },
  int64: { code: 7, sizeBytes: 8 },
  bool: { code: 9, sizeBytes: 1 },
  float16: { code: 10, sizeBytes: 2 },
  float64: { code: 11, sizeBytes: 8 },
};

export function elementCode(type: ElementType): number {
  return elementTypes[type].code;
}

export function elementSize(type: ElementType): number {
  return elementTypes[type].sizeBytes;
}

/** A fixed size, or the name of one that is known only when the graph runs. */
export type Dim = number | string;

export interface Value {
  readonly name: string;
  readonly type: ElementType;
  readonly shape: readonly Dim[];
}

export interface Initializer extends Value {
  readonly shape: readonly number[];
  readonly sizeBytes: number;
  /** Little-endian, row-major; a function where reading waits until the graph is written. */
  readonly data: Uint8Array | (() => Promise<Uint8Array>);
}

/** An attribute: plain numbers are ints, `float(x)` marks floats. */
export type Attribute = number | string | readonly number[] | { readonly float: number } | GraphProto;

export function float(value: number): { readonly float: number } {
  return { float: value };
}

export interface Node {
  readonly opType: string;
  /** "" is ai.onnx. */
  readonly domain: string;
  readonly name: string;
  /** "" is an input left out. */
  readonly inputs: readonly string[];
  readonly outputs: readonly string[];
  readonly attributes: Readonly<Record<string, Attribute>>;
}

export interface NodeOptions {
  readonly domain?: "" | "com.microsoft";
  readonly attributes?: Readonly<Record<string, Attribute | undefined>>;
}

/** ai.onnx opset that every runtime we target has kernels for; com.microsoft is version 1. */
export const OPSET = 21;
const IR_VERSION = 10;

export class Graph {
  readonly inputs: Value[] = [];
  readonly outputs: Value[] = [];
  /** Replaced as a whole by passes such as `fuse`. */
  nodes: Node[] = [];
  readonly initializers = new Map<string, Initializer>();
  /** Type and shape of everything that a node made, by name. */
  readonly values = new Map<string, Value>();
  private readonly taken = new Set<string>();
  /** Where new nodes and values belong, "layers.3": a prefix that keeps names readable in Netron. */
  scope = "";

  constructor(readonly name: string) {}

  /** `base` under the current scope, numbered where it is taken. */
  freshName(base: string): string {
    const scoped = this.scope ? `${this.scope}/${base}` : base;
    let name = scoped;
    for (let n = 1; this.taken.has(name); n++) name = `${scoped}_${n}`;
    this.taken.add(name);
    return name;
  }

  input(name: string, type: ElementType, shape: readonly Dim[]): Value {
    const existing = this.inputs.find((value) => value.name === name);
    if (existing) return existing;
    this.taken.add(name);
    const value = { name, type, shape };
    this.inputs.push(value);
    return value;
  }

  /** Declares `value` as a result, under `name` where it needs another. */
  output(value: Value, name = value.name): Value {
    if (name === value.name) {
      this.outputs.push(value);
      return value;
    }
    const renamed = { ...value, name };
    this.taken.add(name);
    this.nodes.push({
      opType: "Identity",
      domain: "",
      name: `${name}/Identity`,
      inputs: [value.name],
      outputs: [name],
      attributes: {},
    });
    this.values.set(name, renamed);
    this.outputs.push(renamed);
    return renamed;
  }

  /** Adds a node and returns its outputs; `outputs[i].name` is taken as given, "" makes a fresh name. */
  node(
    opType: string,
    inputs: readonly (Value | undefined)[],
    outputs: readonly { readonly type: ElementType; readonly shape: readonly Dim[]; readonly name?: string }[],
    { domain = "", attributes = {} }: NodeOptions = {},
  ): Value[] {
    const name = this.freshName(opType);
    const results = outputs.map((output, i) => {
      const outputName = output.name ?? this.freshName(`${opType}:${i}`);
      this.taken.add(outputName);
      const value = { name: outputName, type: output.type, shape: output.shape };
      this.values.set(outputName, value);
      return value;
    });
    const given = inputs.map((value) => value?.name ?? "");
    while (given.at(-1) === "") given.pop();
    const set = Object.entries(attributes).filter((entry): entry is [string, Attribute] => entry[1] !== undefined);
    this.nodes.push({
      opType,
      domain,
      name,
      inputs: given,
      outputs: results.map((result) => result.name),
      attributes: Object.fromEntries(set),
    });
    return results;
  }

  /** A constant tensor; the same name twice is the same tensor. */
  initializer(
    name: string,
    type: ElementType,
    shape: readonly number[],
    data: Initializer["data"] | ArrayBufferView,
  ): Value {
    const existing = this.initializers.get(name);
    if (existing) return existing;
    const sizeBytes = shape.reduce((product, dim) => product * dim, 1) * elementSize(type);
    const bytes =
      typeof data === "function" || data instanceof Uint8Array
        ? data
        : new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
    if (bytes instanceof Uint8Array && bytes.byteLength !== sizeBytes) {
      throw new NibbleError(
        "bad_weights",
        `${name}: ${bytes.byteLength} bytes given for ${type} [${shape.join(", ")}], which takes ${sizeBytes}.`,
      );
    }
    const initializer = { name, type, shape, sizeBytes, data: bytes };
    this.taken.add(name);
    this.initializers.set(name, initializer);
    return initializer;
  }

  /** A small int64 constant (shapes, axes), shared by value. */
  ints(values: readonly number[], shape: readonly number[] = [values.length]): Value {
    const name = `const/i64/${shape.length ? "" : "scalar/"}${values.join(",")}`;
    return this.initializer(name, "int64", shape, BigInt64Array.from(values, BigInt));
  }

  /** A scalar float constant of the given type. */
  scalar(value: number, type: "float32" | "float16" = "float32"): Value {
    const name = `const/${type}/${value}`;
    if (type === "float32") return this.initializer(name, type, [], Float32Array.of(value));
    const half = this.initializer(`const/float32/${value}`, "float32", [], Float32Array.of(value));
    return this.node("Cast", [half], [{ type, shape: [] }], { attributes: { to: elementCode(type) } })[0];
  }
}

/** The graph as a GraphProto; `tensor` decides where each initializer's bytes are. */
export function toGraphProto(graph: Graph, tensor: (initializer: Initializer) => TensorProto): GraphProto {
  return {
    name: graph.name,
    node: graph.nodes.map(toNodeProto),
    initializer: [...graph.initializers.values()].map(tensor),
    input: graph.inputs.map(toValueInfo),
    output: graph.outputs.map(toValueInfo),
  };
}

/** The graph with all constants inside. */
export function inlineGraphProto(graph: Graph): GraphProto {
  return toGraphProto(graph, ({ name, type, shape, data }) => ({
    name,
    dataType: elementCode(type),
    dims: shape.map(BigInt),
    rawData: data as Uint8Array,
  }));
}

/** Fields of the ModelProto around a graph; versions are not written, so equal graphs give equal bytes. */
export const modelHeader = {
  irVersion: BigInt(IR_VERSION),
  producerName: "nibble",
  opsetImport: [
    { domain: "", version: BigInt(OPSET) },
    { domain: "com.microsoft", version: 1n },
  ],
};

function toValueInfo({ name, type, shape }: Value): ValueInfoProto {
  const dim = shape.map((size) => (typeof size === "number" ? { dimValue: BigInt(size) } : { dimParam: size }));
  return { name, type: { tensorType: { elemType: elementCode(type), shape: { dim } } } };
}

function toNodeProto(node: Node): NodeProto {
  return {
    opType: node.opType,
    domain: node.domain,
    name: node.name,
    input: [...node.inputs],
    output: [...node.outputs],
    attribute: Object.entries(node.attributes).map(([name, value]) => {
      if (typeof value === "number") return { name, type: 2, i: BigInt(value) };
      if (typeof value === "string") return { name, type: 3, s: new TextEncoder().encode(value) };
      if (Array.isArray(value)) return { name, type: 7, ints: value.map(BigInt) };
      if ("float" in value) return { name, type: 1, f: value.float };
      return { name, type: 5, g: value as GraphProto };
    }),
  };
}
