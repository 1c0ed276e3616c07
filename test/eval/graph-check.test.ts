import * as ort from "onnxruntime-node";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { rtnMatrix } from "../../quant/rtn.ts";
import { roundScaleToF16 } from "../../quant/types.ts";
import { resolveModel } from "../../src/arch/index.ts";
import { floatWeights, type Weights } from "../../src/arch/weights.ts";
import { checkGraph } from "../../src/eval/graph-check.ts";
import { exportModel } from "../../src/export/export.ts";
import type { FolderSink } from "../../src/files.ts";
import { nodeSink } from "../../src/node/folder-sink.ts";
import { openInMemory } from "../fixtures/open-in-memory.ts";
import { temporaryFolder } from "../fixtures/temporary-folder.ts";
import { repoPath } from "../helpers.ts";

const folder = temporaryFolder("model");
let out: FolderSink;
beforeEach(async () => {
  out = await nodeSink(folder);
});
afterEach(() => out.abort());

const ids = [1, 403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421];
const model = resolveModel(await openInMemory(repoPath("models", "stories260k")));
const float = floatWeights(model.checkpoint);

/** Every projection at 4 bits, embedding and head at 8, plain rounding. */
function rounded(groupSize: number, symmetric: boolean): Weights {
  return {
    ...float,
    quantized: (tensor) => {
      if (!/(proj|embed_tokens)\.weight$/.test(tensor)) return undefined;
      const [rows, cols] = float.shape(tensor);
      const bits = tensor.includes("embed") ? 8 : 4;
      const spec = { bits, groupSize, symmetric, roundScale: roundScaleToF16 };
      return {
        rows,
        cols,
        bits,
        groupSize,
        symmetric,
        load: async () => rtnMatrix({ rows, cols, data: await float.load(tensor) }, spec),
      };
    },
  };
}

describe("stories260K, exported and compared with the float graph on the same values", () => {
  test.each([
    [16, true],
    [16, false],
    [32, true],
    [32, false],
    [128, false],
  ])("4 bits in groups of %i, symmetric %s: ragged groups and heads of 8 included", async (groupSize, symmetric) => {
    const weights = rounded(groupSize, symmetric);
    const manifest = await exportModel({ model, weights }, out, { dtype: "q4" });
    const { graphError, activationRounding } = await checkGraph(ort, out.written, manifest, model, weights, ids);
    expect(graphError).toBeLessThan(1e-4);
    expect(activationRounding).toBeGreaterThan(0); // accuracy_level 4 is in the file
    expect(activationRounding).toBeLessThan(0.1);
  });

  test.each([
    ["fp32", 1e-4],
    ["fp16", 0.02],
  ] as const)("%s without quantization", async (dtype, tolerance) => {
    const manifest = await exportModel({ model, weights: float }, out, { dtype });
    const { graphError } = await checkGraph(ort, out.written, manifest, model, float, ids);
    expect(graphError).toBeLessThan(tolerance);
  });

  test("a file that holds other weights than it should is refused", async () => {
    const manifest = await exportModel({ model, weights: rounded(32, true) }, out, { dtype: "q4" });
    await expect(checkGraph(ort, out.written, manifest, model, rounded(32, false), ids)).rejects.toMatchObject({
      code: "verification",
    });
  });
});
