/** The integer twin of a graph, in memory. */
import { toIntegerGraph } from "../../../src/export/integer-graph.ts";
import type { ModelProto, TensorProto } from "../../../src/onnx/proto.ts";

/** As the page makes it for WASM, with its weights inside. */
export async function integerTwin(model: ModelProto): Promise<ModelProto> {
  const parts: Uint8Array[] = [];
  const sink = { write: async (bytes: Uint8Array) => void parts.push(bytes.slice()), close: async () => undefined };
  const read = async ({ rawData }: TensorProto) => rawData!;
  const twin = await toIntegerGraph(model, { read, sink, location: "data" });
  const data = Buffer.concat(parts);
  const inline = (tensor: TensorProto): TensorProto => {
    const field = (key: string) => tensor.externalData?.find((entry) => entry.key === key)?.value;
    if (tensor.dataLocation !== 1) return tensor;
    const start = Number(field("offset"));
    const { name, dataType, dims } = tensor;
    return { name, dataType, dims, rawData: new Uint8Array(data.subarray(start, start + Number(field("length")))) };
  };
  return { ...twin, graph: { ...twin.graph, initializer: twin.graph.initializer.map(inline) } };
}

/** A twin's graph of any number of tokens, and the one of one token where it has that, as graphs of their own. */
export function branchesOf(model: ModelProto): { readonly anyTokens: ModelProto; readonly oneToken?: ModelProto } {
  const choice = model.graph.node.find(({ opType }) => opType === "If");
  if (!choice) return { anyTokens: model };
  const branch = (name: string): ModelProto => {
    const { node, output } = choice.attribute.find((one) => one.name === name)!.g!;
    const names = new Map(output.map((value, at) => [value.name, choice.output[at]]));
    const own = (value: string) => names.get(value) ?? value;
    const nodes = node.map((one) => ({ ...one, input: one.input.map(own), output: one.output.map(own) }));
    return { ...model, graph: { ...model.graph, node: nodes } };
  };
  return { oneToken: branch("then_branch"), anyTokens: branch("else_branch") };
}
