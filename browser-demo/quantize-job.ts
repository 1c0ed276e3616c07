/** Quantize in the page: the steps of `nibble quantize` with onnxruntime-web's WASM and OPFS in the places of Node's. */
import { tokenWindows } from "../quant/calibrate.ts";
import { ortProducts } from "../quant/products.ts";
import { quantizeModel } from "../quant/quantize.ts";
import { method } from "../quant/recipes.ts";
import { decodeLayer, type LayerStore } from "../quant/record.ts";
import { resolveModel } from "../src/arch/index.ts";
import { openHfFolder } from "../src/checkpoint/hf-folder.ts";
import { exportModel } from "../src/export/export.ts";
import { loadTokenizer } from "../src/tokenizer/hf-tokenizer.ts";
import { chooseBuild, probeDevice } from "../src/web/device.ts";
import { blobFolder } from "../src/web/dropped.ts";
import { opfsSink } from "../src/web/opfs.ts";
import { loadOrt } from "../src/web/ort.ts";
import type { Context } from "../src/web/rpc.ts";
import { ModelStore, type StoredModel } from "../src/web/store.ts";
import type { QuantizeEvent, QuantizeRequest } from "./protocol.ts";

/** Tokens of a calibration window: as the command line's, so that equal text gives equal statistics. */
const SEQUENCE_LENGTH = 512;

export async function quantizeHere(request: QuantizeRequest, context: Context<QuantizeEvent>): Promise<StoredModel> {
  const { name, files, ortUrl, texts } = request;
  const { signal, emit } = context;
  const ort = await loadOrt(chooseBuild(await probeDevice(), "wasm"), ortUrl);
  const checkpoint = await openHfFolder(blobFolder(name, files));
  const id = `${name}-${request.method}-${request.bits}bit`;
  const store = await ModelStore.open();
  await store.delete(id);
  const out = await opfsSink(await store.directory(id), "files");
  try {
    const model = resolveModel(checkpoint);
    const recipe = method(request.method, { bits: request.bits, groupSize: request.groupSize });
    const windows =
      recipe.windows === 0
        ? []
        : tokenWindows(loadTokenizer(checkpoint.sideFiles), {
            texts,
            sequenceLength: SEQUENCE_LENGTH,
            windows: recipe.windows,
          });
    const report = ({ stage, done, total }: QuantizeEvent) => emit({ stage, done, total });
    const quantized = await quantizeModel(model, recipe, windows, {
      ort,
      products: ortProducts(ort),
      store: reportLayers(emit),
      onProgress: report,
      signal,
    });
    const { weights, recipe: record } = quantized;
    await exportModel({ model, weights, recipe: record }, out, { dtype: "q4", onProgress: report, signal });
    await out.commit();
    return await store.adopt(id, "made in this page");
  } catch (error) {
    await out.abort();
    await store.delete(id);
    throw error;
  } finally {
    await checkpoint.dispose();
  }
}

/** Keeps nothing: looks at each finished layer for its errors. */
function reportLayers(emit: (event: QuantizeEvent) => void): LayerStore {
  return {
    get: async () => undefined,
    async put(key, bytes) {
      for (const [linear, { report }] of decodeLayer(bytes).linears) {
        emit({
          stage: key.replace(/\.bin$/, ""),
          done: 0,
          total: 0,
          layer: { name: linear, error: report.relativeError },
        });
      }
    },
  };
}
