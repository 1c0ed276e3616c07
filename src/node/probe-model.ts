/** A model of one node, run to see whether a way to ONNX Runtime works; ends with an error where the answer is wrong. */
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { InferenceSession } from "onnxruntime-common";
import type { Ort } from "../onnx/ort.ts";
import { encodeModel } from "../onnx/proto.ts";

const FLOAT = 1;

/** x + x, into memory of the runtime's and into the caller's. */
export async function probe(ort: Ort, options: InferenceSession.SessionOptions): Promise<void> {
  const folder = await mkdtemp(join(tmpdir(), "nibble-probe-"));
  try {
    const value = (name: string) => ({
      name,
      type: { tensorType: { elemType: FLOAT, shape: { dim: [{ dimValue: 3n }] } } },
    });
    const path = join(folder, "add.onnx");
    const graph = {
      name: "probe",
      node: [{ opType: "Add", input: ["x", "x"], output: ["y"], attribute: [], name: "add", domain: "" }],
      input: [value("x")],
      output: [value("y")],
      initializer: [],
    };
    await writeFile(path, encodeModel({ irVersion: 8n, opsetImport: [{ domain: "", version: 13n }], graph } as never));
    const session = await ort.InferenceSession.create(path, options);
    for (let run = 0; run < 3; run++) {
      const x = new ort.Tensor("float32", Float32Array.of(1, run, -2), [3]);
      const given = new ort.Tensor("float32", new Float32Array(3), [3]);
      const { y: made } = await session.run({ x }, ["y"]);
      await session.run({ x }, { y: given });
      for (const { data } of [made, given]) {
        const got = Array.from(data as Float32Array).join();
        if (got !== `2,${2 * run},-4`) throw new Error(`x + x came out as ${got}`);
      }
    }
    await session.release();
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}
