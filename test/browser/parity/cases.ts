/**
 * Single operators as models, cut out of graphs that are exported: each with the inputs that it met while the whole graph
 * ran, a prompt and a step with the cache, on Node's CPU provider with nothing fused.
 */
import * as ort from "onnxruntime-node";
import {
  decodeModel,
  encodeModel,
  type ModelProto,
  type NodeProto,
  type TensorProto,
  type ValueInfoProto,
} from "../../../src/onnx/proto.ts";

export interface CaseTensor {
  readonly type: ort.Tensor.Type;
  readonly dims: readonly number[];
  readonly bytes: Uint8Array;
}

export interface OperatorCase {
  /** "MatMulNBits bits=4 block_size=32 float32,uint8!,float32!,uint8!": an input with ! is a constant. */
  readonly key: string;
  readonly opType: string;
  readonly model: Uint8Array;
  readonly feeds: Readonly<Record<string, CaseTensor>>;
  readonly outputs: readonly string[];
}

/** Attributes that are a size or a number of the model's, not another way to compute. */
const SIZES = new Set([
  ..."N K num_heads kv_num_heads scale epsilon alpha rotary_embedding_dim to axis perm value".split(" "),
]);
/** Of these only whether they are there. */
const SWITCHES = new Set(["local_window_size", "softcap"]);

/** TensorProto.DataType -> how the runtime's JavaScript API calls it. */
const TYPES: Readonly<Record<number, ort.Tensor.Type>> = {
  1: "float32",
  2: "uint8",
  3: "int8",
  6: "int32",
  7: "int64",
  9: "bool",
  10: "float16",
};
const codeOf = (type: ort.Tensor.Type) => Number(Object.entries(TYPES).find(([, name]) => name === type)![0]);

function attributesOf({ attribute }: NodeProto): string[] {
  return attribute.flatMap(({ name, i, f, s, ints }) => {
    if (SWITCHES.has(name)) return [name];
    if (SIZES.has(name)) return [];
    return [`${name}=${s ? new TextDecoder().decode(s) : (i ?? f ?? ints)}`];
  });
}

function keyOf(node: NodeProto, typeOf: (name: string) => string): string {
  return [
    node.opType,
    ...attributesOf(node).sort(),
    node.input.map((name) => (name ? typeOf(name) : "-")).join(","),
  ].join(" ");
}

const bytesOf = (tensor: ort.Tensor): Uint8Array => {
  const { buffer, byteOffset, byteLength } = tensor.data as Uint8Array;
  return new Uint8Array(buffer, byteOffset, byteLength).slice();
};

type Values = ReadonlyMap<string, ort.Tensor>;
export type Feeds = Readonly<Record<string, ort.Tensor>>;

/** A run that gives out every value between the nodes too. */
async function everyValue(model: ModelProto, feedsOf: (input: ort.InferenceSession.ValueMetadata) => ort.Tensor) {
  const named = new Set(model.graph.output.map(({ name }) => name));
  const between = model.graph.node.flatMap(({ output }) => output).filter((name) => name !== "" && !named.has(name));
  const output = [...model.graph.output, ...between.map((name): ValueInfoProto => ({ name }))];
  const session = await ort.InferenceSession.create(encodeModel({ ...model, graph: { ...model.graph, output } }), {
    graphOptimizationLevel: "disabled",
  });
  const feeds = Object.fromEntries(session.inputMetadata.map((input) => [input.name, feedsOf(input)]));
  const results = (await session.run(feeds)) as Record<string, ort.Tensor>;
  await session.release();
  return new Map([...Object.entries(feeds), ...Object.entries(results)]);
}

function feeder(ids: readonly number[], past: Values | undefined) {
  const before = past ? past.get("input_ids")!.dims[1] : 0;
  const int64 = (values: readonly number[], dims: number[]) =>
    new ort.Tensor("int64", BigInt64Array.from(values, BigInt), dims);
  return (input: ort.InferenceSession.ValueMetadata): ort.Tensor => {
    const { name } = input;
    if (name === "input_ids") return int64(ids, [1, ids.length]);
    if (name === "position_ids") {
      return int64(
        ids.map((_, i) => before + i),
        [1, ids.length],
      );
    }
    if (name === "attention_mask") return int64(Array(before + ids.length).fill(1), [1, before + ids.length]);
    if (name === "num_logits_to_keep") return int64([1], []);
    const kept = past?.get(name.replace("past_key_values", "present").replace("past_conv", "present_conv"));
    if (kept) return kept;
    if (!input.isTensor) throw new Error(`${name} is no tensor`);
    const dims = input.shape.map((size, axis) => (typeof size === "number" ? size : axis === 0 ? 1 : 0));
    const length = dims.reduce((a, b) => a * b, 1);
    return input.type === "int8"
      ? new ort.Tensor("int8", new Int8Array(length), dims)
      : new ort.Tensor("float32", new Float32Array(length), dims);
  };
}

/** Initializers, and what nodes make of nothing but those: a runtime folds it when it opens the file. */
function constantsOf({ graph }: ModelProto, values: Values): Map<string, TensorProto> {
  const constants = new Map(graph.initializer.map((tensor) => [tensor.name!, tensor]));
  for (const { input, output } of graph.node) {
    if (!input.every((name) => name === "" || constants.has(name))) continue;
    for (const name of output) {
      const value = values.get(name);
      if (!value) continue;
      const dims = value.dims.map(BigInt);
      constants.set(name, { name, dataType: codeOf(value.type), dims, rawData: bytesOf(value) });
    }
  }
  return constants;
}

function operatorCase(model: ModelProto, node: NodeProto, constants: Map<string, TensorProto>, values: Values) {
  const used = [...new Set(node.input.filter((name) => name !== ""))];
  const initializer = used.flatMap((name) => constants.get(name) ?? []);
  const variable = used.filter((name) => !constants.has(name));
  const infoOf = (name: string): ValueInfoProto => {
    const { type, dims } = values.get(name)!;
    const shape = { dim: dims.map((size) => ({ dimValue: BigInt(size) })) };
    return { name, type: { tensorType: { elemType: codeOf(type), shape } } };
  };
  const outputs = node.output.filter((name) => name !== "");
  // Of an output only the type: what a cache grows to is not what the runtime infers from the past's own length.
  const typeOnly = (name: string): ValueInfoProto => {
    return { name, type: { tensorType: { elemType: codeOf(values.get(name)!.type) } } };
  };
  const graph = {
    name: node.opType,
    node: [node],
    initializer,
    input: variable.map(infoOf),
    output: outputs.map(typeOnly),
  };
  const feeds = Object.fromEntries(
    variable.map((name) => {
      const tensor = values.get(name)!;
      return [name, { type: tensor.type, dims: tensor.dims, bytes: bytesOf(tensor) }];
    }),
  );
  return { opType: node.opType, model: encodeModel({ ...model, graph }), feeds, outputs };
}

/** Adds a case for every node of a graph that is unlike those `found` so far. */
export async function collectCases(
  bytes: Uint8Array,
  ids: readonly number[],
  found: Map<string, OperatorCase>,
): Promise<void> {
  const model = decodeModel(bytes);
  let past: Values | undefined;
  for (const tokens of [ids.slice(0, -1), ids.slice(-1)]) {
    const values = await everyValue(model, feeder(tokens, past));
    addCases(model, values, past ? "step" : "prompt", found);
    past = values;
  }
}

/** The same from the feeds of a prompt and of a step, for graphs that take more than tokens and a past. */
export async function collectFrom(
  model: ModelProto,
  [prompt, step]: readonly Feeds[],
  found: Map<string, OperatorCase>,
): Promise<void> {
  for (const [when, feeds] of Object.entries({ prompt, step })) {
    addCases(model, await everyValue(model, ({ name }) => feeds[name]), when, found);
  }
}

function addCases(model: ModelProto, values: Values, when: string, found: Map<string, OperatorCase>): void {
  const constants = constantsOf(model, values);
  const typeOf = (name: string) => {
    const constant = constants.get(name);
    return constant ? `${TYPES[constant.dataType!]}!` : values.get(name)!.type;
  };
  for (const node of model.graph.node) {
    const key = `${keyOf(node, typeOf)} ${when}`;
    if (!found.has(key)) found.set(key, { key, ...operatorCase(model, node, constants, values) });
  }
}

const ARRAYS: Readonly<Record<string, (buffer: ArrayBuffer) => ort.Tensor.DataType>> = {
  float32: (buffer) => new Float32Array(buffer),
  float16: (buffer) => new Uint16Array(buffer),
  int64: (buffer) => new BigInt64Array(buffer),
  int32: (buffer) => new Int32Array(buffer),
  int8: (buffer) => new Int8Array(buffer),
  uint8: (buffer) => new Uint8Array(buffer),
  bool: (buffer) => new Uint8Array(buffer),
};

/** A case on Node's CPU provider: its outputs. */
export async function runCase({ model, feeds, outputs }: OperatorCase): Promise<ort.Tensor[]> {
  const session = await ort.InferenceSession.create(model);
  const tensors = Object.entries(feeds).map(
    ([name, { type, dims, bytes }]) =>
      [name, new ort.Tensor(type, ARRAYS[type](bytes.slice().buffer as ArrayBuffer), dims)] as const,
  );
  const results = (await session.run(Object.fromEntries(tensors))) as Record<string, ort.Tensor>;
  await session.release();
  return outputs.map((name) => results[name]);
}
