/** What an .onnx file says about itself, before anything is loaded: its interface, its weights, its cache. */
import { NibbleError } from "../errors.ts";
import { type FolderSource, readAll } from "../files.ts";
import { cacheNeed } from "../kv/cache-need.ts";
import { decodeModel, type ModelProto, type TensorProto, type ValueInfoProto } from "../onnx/proto.ts";
import { type WeightFormat, weightFormats } from "./weight-formats.ts";

/** TensorProto.DataType: name and bits per element (ONNX IR specification). */
const elementTypes: Readonly<Record<number, readonly [string, number]>> = {
  1: ["float32", 32],
  2: ["uint8", 8],
  3: ["int8", 8],
  4: ["uint16", 16],
  5: ["int16", 16],
  6: ["int32", 32],
  7: ["int64", 64],
  9: ["bool", 8],
  10: ["float16", 16],
  11: ["float64", 64],
  12: ["uint32", 32],
  13: ["uint64", 64],
  16: ["bfloat16", 16],
  21: ["uint4", 4],
  22: ["int4", 4],
};

export interface ValueDescription {
  readonly name: string;
  readonly type: string;
  readonly shape: readonly (number | string)[];
}

export interface WeightDescription extends ValueDescription {
  readonly sizeBytes: number;
}

export interface GraphDescription {
  /** Inside the folder: "onnx/model_q4.onnx". */
  readonly path: string;
  readonly inputs: readonly ValueDescription[];
  readonly outputs: readonly ValueDescription[];
  readonly weights: readonly WeightDescription[];
  readonly weightBytes: number;
  /** Of one token in the cache, all layers, as the graph's inputs declare it. */
  readonly kvBytesPerToken: number;
  /** Of a sequence beside that: the full-precision tail of a cache in two tiers. */
  readonly kvFixedBytes: number;
  /** Its number format, as `--kv` names it: "fp32", "int8". */
  readonly kvFormat: string | undefined;
  /** How often each operator occurs. */
  readonly operators: Readonly<Record<string, number>>;
  /** Of its quantized products. */
  readonly formats: readonly WeightFormat[];
}

export async function describeGraph(folder: FolderSource, path: string): Promise<GraphDescription> {
  const source = await folder.open(path);
  let model: ModelProto;
  try {
    model = decodeModel(await readAll(source), `${folder.name}/${path}`);
  } finally {
    await source.close?.();
  }
  const { graph } = model;
  if (!graph) throw new NibbleError("bad_file", `${folder.name}/${path} holds no graph.`);
  const inputs = graph.input.map(describeValue);
  const { format, bytesPerToken, fixedBytes } = cacheNeed(model);
  const operators: Record<string, number> = {};
  for (const { opType } of graph.node) operators[opType] = (operators[opType] ?? 0) + 1;
  const weights = graph.initializer.map(describeWeight);
  return {
    path,
    inputs,
    outputs: graph.output.map(describeValue),
    weights,
    weightBytes: weights.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0),
    kvBytesPerToken: bytesPerToken,
    kvFixedBytes: fixedBytes,
    kvFormat: format === "none" ? undefined : format,
    operators,
    formats: weightFormats(graph.node, graph.initializer),
  };
}

function describeValue({ name, type }: ValueInfoProto): ValueDescription {
  const { elemType = 0, shape } = type?.tensorType ?? {};
  return {
    name,
    type: elementTypes[elemType]?.[0] ?? `type ${elemType}`,
    shape: (shape?.dim ?? []).map(({ dimValue, dimParam }) => dimParam || Number(dimValue ?? 0)),
  };
}

function describeWeight({ name = "", dims = [], dataType = 0 }: TensorProto): WeightDescription {
  const [type, bits] = elementTypes[dataType] ?? [`type ${dataType}`, 0];
  const shape = dims.map(Number);
  const elements = shape.reduce((product, dim) => product * dim, 1);
  return { name, type, shape, sizeBytes: Math.ceil((elements * bits) / 8) };
}
