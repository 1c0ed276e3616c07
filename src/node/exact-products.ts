/**
 * Whether the CPU adds up products of uint8 and int8 exactly. On x86 without VNNI, ONNX Runtime's kernel adds two of them
 * in 16 bits, which ends at 32,767 of the 64,770 that they can be.
 */
import { Graph, inlineGraphProto, modelHeader } from "../onnx/graph.ts";
import * as ops from "../onnx/ops.ts";
import type { Ort } from "../onnx/ort.ts";
import { encodeModel } from "../onnx/proto.ts";

/** As many rows, columns and results as kernels of whole registers take. */
const SIZE = 64;
const LARGEST_CODE = 255;
const LARGEST_WEIGHT = 127;

/** One product of the largest numbers that there are: 4 ms with its session. */
export async function addsExactly({ InferenceSession, Tensor }: Ort): Promise<boolean> {
  const g = new Graph("exact");
  const codes = g.input("codes", "uint8", [SIZE, SIZE]);
  const weights = g.initializer("weights", "int8", [SIZE, SIZE], new Int8Array(SIZE * SIZE).fill(LARGEST_WEIGHT));
  const [sums] = g.node("MatMulInteger", [codes, weights], [{ type: "int32", shape: [SIZE, SIZE] }]);
  g.output(ops.cast(g, sums, "float32"), "sums");
  const session = await InferenceSession.create(encodeModel({ ...modelHeader, graph: inlineGraphProto(g) }));
  try {
    const feed = new Tensor("uint8", new Uint8Array(SIZE * SIZE).fill(LARGEST_CODE), [SIZE, SIZE]);
    const { data } = (await session.run({ codes: feed })).sums;
    return (data as Float32Array).every((sum) => sum === SIZE * LARGEST_CODE * LARGEST_WEIGHT);
  } finally {
    await session.release();
  }
}
