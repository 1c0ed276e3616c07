/**
 * The WebGPU provider's own int8 cache (onnxruntime pull request 32284): of each token and head a float32 scale and one
 * byte a channel, made and read by its attention; nothing is calibrated, any graph with a float cache can have it. Its
 * rows are told as elements of the float type that the graph computes in:
 *   past_key_values.N.key/value   (1, kvHeads, length, (4 + headDim) / element bytes)
 * The provider has to be told when a session is made (`KV_BITS`), and the cache has to be preallocated and in place.
 */
import { NibbleError } from "../errors.ts";
import type { ModelProto, ValueInfoProto } from "../onnx/proto.ts";
import { attentionNodes, INPUT } from "./attention-nodes.ts";

/** Of a session's configuration: how many bits a cached number has. */
export const KV_BITS = { key: "ep.webgpuexecutionprovider.kvCacheQuantizationBits", value: "8" } as const;

const SCALE_BYTES = 4;
const SMALLEST_HEAD = 8;

/** The model with such a cache; errors: `unsupported` with what rules it out. */
export function withGpuInt8(model: ModelProto): ModelProto {
  const what = "--kv int8 on WebGPU";
  const nodes = attentionNodes(model, what);
  const refuse = (why: string): never => {
    throw new NibbleError("unsupported", `${what}: ${why}. Leave kv out for the float cache.`, { param: "kv" });
  };
  for (const { node, layer, headDim, window, cacheType } of nodes) {
    if (cacheType !== "float32" && cacheType !== "float16") refuse(`the graph's cache is ${cacheType} already`);
    if (headDim < SMALLEST_HEAD || (headDim & (headDim - 1)) !== 0) {
      refuse(`a head has ${headDim} channels; the provider takes powers of 2 from ${SMALLEST_HEAD} on`);
    }
    if (window !== undefined) refuse(`layer ${layer} looks back ${window} tokens only`);
    if (node.input[INPUT.headSink]) refuse(`layer ${layer} has attention sinks of its own`);
  }
  const widths = new Map<string, number>();
  for (const { node, headDim, cacheType } of nodes) {
    const width = (SCALE_BYTES + headDim) / (cacheType === "float16" ? 2 : 4);
    const names = [node.input[INPUT.pastKey], node.input[INPUT.pastValue], ...node.output.slice(1, 3)];
    for (const name of names) widths.set(name, width);
  }
  const resized = (info: ValueInfoProto): ValueInfoProto => {
    const width = widths.get(info.name);
    return width === undefined ? info : withLastSize(info, width);
  };
  const { graph } = model;
  return { ...model, graph: { ...graph, input: graph.input.map(resized), output: graph.output.map(resized) } };
}

function withLastSize(info: ValueInfoProto, size: number): ValueInfoProto {
  const tensor = info.type!.tensorType!;
  const dim = [...(tensor.shape?.dim ?? [])];
  dim[dim.length - 1] = { dimValue: BigInt(size) };
  return { ...info, type: { ...info.type!, tensorType: { ...tensor, shape: { ...tensor.shape, dim } } } };
}
