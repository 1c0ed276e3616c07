/** Bytes of ONNX files as models, and bytes that are none. */
import { expect, test } from "vitest";
import { decodeModel, encodeModel, type ModelProto } from "../../src/onnx/proto.ts";

const name = "folder/onnx/model.onnx";
const bytes = encodeModel({
  irVersion: 10n,
  producerName: "nibble",
  graph: { name: "g", node: [{ opType: "Relu", name: "relu", input: ["x"], output: ["y"] }] },
} as unknown as ModelProto);

test("what was written is read", () => {
  expect(decodeModel(bytes, name).graph.node[0]).toMatchObject({ opType: "Relu", input: ["x"], output: ["y"] });
});

test("a file cut short, or of another kind, is refused with its name and size", () => {
  const page = new TextEncoder().encode("<!doctype html><title>Not found</title>");
  for (const wrong of [bytes.slice(0, bytes.length - 3), page]) {
    expect(() => decodeModel(wrong, name)).toThrow(
      expect.objectContaining({
        code: "bad_file",
        message: expect.stringMatching(new RegExp(`^${name} is no whole ONNX file \\(.+; ${wrong.length} bytes\\)`)),
      }),
    );
  }
});
