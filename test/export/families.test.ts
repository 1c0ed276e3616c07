/** Every golden model at 4 bits: the exported graph on MatMulNBits gives the logits of its own dequantized weights. */
import * as ort from "onnxruntime-node";
import { afterAll, describe, expect, test } from "vitest";
import { ortProducts } from "../../quant/products.ts";
import { quantizeModel } from "../../quant/quantize.ts";
import { awq } from "../../quant/recipes.ts";
import { decoderGraph } from "../../src/export/graphs.ts";
import { fullKv } from "../../src/kv/full.ts";
import { toBytes } from "../../src/onnx/external-data.ts";
import { Decoder, floats, maxDifference, openModel, readGolden } from "../arch/golden-model.ts";
import { goldenModels } from "../helpers.ts";

/** accuracy_level 0 computes in float32: sums in another order are all that differs. */
const TOLERANCE = 1e-3;

const folders = goldenModels();
const products = ortProducts(ort);
afterAll(() => products.dispose());

describe.each([...folders])("%s", (_, folder) => {
  test("at 4 bits with folds computes what its dequantized weights compute", async () => {
    const model = await openModel(folder);
    const { inputIds, logits: float } = await readGolden(folder);
    const { weights, dequantized } = await quantizeModel(model, awq(), [inputIds], { ort, products });
    const options = { kv: fullKv(), maxPositions: 64, accuracyLevel: 0, fuseLinears: true };
    const graph = decoderGraph(model, { ...options, weights });
    const operators = graph.nodes.map(({ opType }) => opType);
    expect(operators.filter((type) => type === "MatMulNBits").length).toBeGreaterThan(3 * model.config.layers);

    const quantized = await logitsOf(await toBytes(graph), inputIds);
    const decoder = await Decoder.of(model, dequantized);
    const reference = floats((await decoder.run([[...inputIds]], [inputIds.map(() => 1)])).logits);
    expect(maxDifference(quantized, reference)).toBeLessThan(TOLERANCE);
    expect(maxDifference(quantized, float.data)).toBeGreaterThan(100 * TOLERANCE); // these are 4 bits indeed
    await decoder.dispose();
    await model.checkpoint.dispose();
  });
});

async function logitsOf(bytes: Uint8Array, ids: readonly number[]): Promise<Float32Array> {
  const decoder = new Decoder(await ort.InferenceSession.create(bytes));
  const { logits } = await decoder.run([[...ids]], [ids.map(() => 1)]);
  await decoder.dispose();
  return floats(logits);
}
