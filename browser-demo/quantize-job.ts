/** Quantize in the page: the steps of `nibble quantize` with onnxruntime-web's WASM and OPFS in the places of Node's. */
import { tokenWindows } from "../quant/calibrate.ts";
import { ortProducts } from "../quant/products.ts";
import { quantizeModel } from "../quant/quantize.ts";
import { method } from "../quant/recipes.ts";
import { decodeLayer, type LayerStore, memoryLayerStore } from "../quant/record.ts";
import { type Model, resolveModel } from "../src/arch/index.ts";
import { openHfFolder } from "../src/checkpoint/hf-folder.ts";
import { NibbleError } from "../src/errors.ts";
import { exportModel } from "../src/export/export.ts";
import { loadTokenizer } from "../src/tokenizer/hf-tokenizer.ts";
import type { ChatMessage, Tokenizer } from "../src/tokenizer/tokenizer.ts";
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
  const { name, files, ortUrl } = request;
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
    const windows = recipe.windows === 0 ? [] : await calibrationWindows(request, model, recipe.windows);
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

/** A vocabulary below this is a toy's, trained on children's stories: the mixed text is nothing to it. */
const TOY_VOCABULARY = 2048;

/** The user's text or the one that ships, as the command line reads them. */
async function calibrationWindows(request: QuantizeRequest, model: Model, windows: number): Promise<number[][]> {
  const { checkpoint, config } = model;
  const tokenizer = loadTokenizer(checkpoint.sideFiles, { config: checkpoint.config });
  const { text: own, textUrl } = request;
  const name = own?.name ?? (tokenizer.vocabSize < TOY_VOCABULARY ? "stories-sample.txt" : "calibration.jsonl");
  const content = own ? await own.text() : await shippedText(textUrl + name);
  const sequenceLength = Math.min(SEQUENCE_LENGTH, config.maxPositions);
  return tokenWindows(tokenizer, { texts: textsOf(name, content, tokenizer), sequenceLength, windows });
}

async function shippedText(url: string): Promise<string> {
  const response = await fetch(url);
  if (response.ok) return response.text();
  throw new NibbleError("network", `${url} answered ${response.status}; choose a text file to calibrate on.`);
}

/** .jsonl: a text or a conversation a line; else documents with <|endoftext|> between them. */
function textsOf(name: string, content: string, tokenizer: Tokenizer): string[] {
  if (!name.endsWith(".jsonl")) return content.split("<|endoftext|>").map((text) => text.trim());
  const lines = content.split("\n").filter((line) => line.trim() !== "");
  return lines.map((line) => {
    const value = JSON.parse(line) as string | { text?: string; messages?: ChatMessage[] };
    if (typeof value === "string") return value;
    if (value.text !== undefined) return value.text;
    const messages = value.messages ?? [];
    if (tokenizer.chatTemplate === undefined) return messages.map((message) => message.content).join("\n");
    return tokenizer.applyChatTemplate(messages, { addGenerationPrompt: false });
  });
}

/** Layers in memory; each one's errors are told when it is finished. */
function reportLayers(emit: (event: QuantizeEvent) => void): LayerStore {
  const store = memoryLayerStore();
  return {
    get: store.get,
    async put(key, bytes) {
      await store.put(key, bytes);
      for (const [linear, { report }] of decodeLayer(bytes).linears) {
        const layer = { name: linear, error: report?.relativeError };
        emit({ stage: key.replace(/\.bin$/, ""), done: 0, total: 0, layer });
      }
    },
  };
}
