/** The int8 cache of the WebGPU provider: what its rows are told as, and which graphs it takes. Its numbers: test/browser/kv.test.ts. */
import { beforeAll, expect, test } from "vitest";
import { attentionNodes, sizes } from "../../src/kv/attention-nodes.ts";
import { withGpuInt8 } from "../../src/kv/gpu-int8.ts";
import type { ModelProto } from "../../src/onnx/proto.ts";
import { storiesGraph } from "./stories.ts";

const FLOAT16 = 10;
let graph: ModelProto;

beforeAll(async () => {
  graph = await storiesGraph();
});

/** Every cache of the graph with this element type and head size. */
function withCaches({ elemType, headDim }: { elemType?: number; headDim?: number }): ModelProto {
  const changed = <T extends ModelProto["graph"]["input"][number]>(info: T): T => {
    if (!/^(past|present)/.test(info.name)) return info;
    const tensor = info.type!.tensorType!;
    const dim = tensor.shape!.dim.map((size, axis) => (axis === 3 && headDim ? { dimValue: BigInt(headDim) } : size));
    return { ...info, type: { tensorType: { elemType: elemType ?? tensor.elemType, shape: { dim } } } };
  };
  return {
    ...graph,
    graph: { ...graph.graph, input: graph.graph.input.map(changed), output: graph.graph.output.map(changed) },
  };
}

function withAttribute(name: string, value: bigint): ModelProto {
  const node = graph.graph.node.map((one) =>
    one.opType === "GroupQueryAttention"
      ? { ...one, attribute: [...one.attribute.filter((a) => a.name !== name), { name, type: 2, i: value }] }
      : one,
  );
  return { ...graph, graph: { ...graph.graph, node } };
}

test.each([
  ["float32", undefined, 16, (4 + 16) / 4],
  ["float16", FLOAT16, 64, (4 + 64) / 2],
])("a %s cache's rows become a scale and a byte a channel, everything else stays", (_, elemType, headDim, elements) => {
  const before = withCaches({ elemType, headDim });
  const after = withGpuInt8(before);
  const caches = attentionNodes(graph, "test").length * 2;
  for (const part of ["input", "output"] as const) {
    const changed = after.graph[part].filter((info, i) => info !== before.graph[part][i]);
    expect(changed.map(({ name }) => name.split(".")[0])).toEqual(
      Array<string>(caches).fill(part === "input" ? "past_key_values" : "present"),
    );
    for (const info of changed) expect(sizes(info)[3]).toBe(elements);
  }
  expect(after.graph.node).toBe(before.graph.node);
});

test("what the provider cannot keep is refused by name", () => {
  expect(() => withGpuInt8(withCaches({ headDim: 96 }))).toThrow(/a head has 96 channels.*powers of 2/);
  expect(() => withGpuInt8(withCaches({ headDim: 4 }))).toThrow(/a head has 4 channels/);
  expect(() => withGpuInt8(withCaches({ elemType: 3 }))).toThrow(/the graph's cache is int8 already/);
  expect(() => withGpuInt8(withAttribute("local_window_size", 64n))).toThrow(/looks back 64 tokens only/);
});
