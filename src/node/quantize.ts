/** Quantization in Node: ONNX Runtime on the CPU, finished layers kept for a run that is interrupted. */
import { ortProducts } from "../../quant/products.ts";
import { quantizeModel } from "../../quant/quantize.ts";
import type { QuantizedModel } from "../../quant/quantized-model.ts";
import { type Recipe, windowsOf } from "../../quant/recipes.ts";
import { LAYER_FORMAT } from "../../quant/record.ts";
import { resolveModel } from "../arch/index.ts";
import type { Checkpoint } from "../checkpoint/checkpoint.ts";
import type { OnProgress } from "../progress.ts";
import { loadTokenizer } from "../tokenizer/hf-tokenizer.ts";
import { version } from "../version.ts";
import { cpuOrt } from "./cpu-ort.ts";
import { returnFreedMemory } from "./freed-memory.ts";
import { diskLayerStore, removeOldLayers } from "./layer-store.ts";
import { type NamedText, shippedText, textWindows } from "./text-windows.ts";

export interface QuantizeOptions {
  /** What to calibrate on; part of it is held back to judge the result by. Default: the set that ships with Nibble. */
  readonly text?: NamedText;
  readonly threads?: number;
  readonly onProgress?: OnProgress;
  readonly signal?: AbortSignal;
}

/** Static scales of the int8 KV cache need 4,000 tokens: 8 windows of 512. */
export const KV_CALIBRATION_WINDOWS = 8;

/**
 * A quantized model with the windows of text that it has not seen, for the check at export. Its layers lie in the cache
 * folder until `dispose`.
 */
export interface Quantized {
  readonly quantized: QuantizedModel;
  readonly heldBack: readonly (readonly number[])[];
  /** Other text, for what is calibrated after the export (the int8 KV cache). */
  readonly calibration: readonly (readonly number[])[];
  /** Removes the layers; without it the same quantization finds them again, for a week. */
  dispose(): Promise<void>;
}

/** Quantizes a checkpoint by a recipe (`gptq({ bits: 4 })`, `preset("default")`); `exportModel` writes the result. */
export async function quantize(
  checkpoint: Checkpoint,
  recipe: Recipe,
  { text, threads, onProgress, signal }: QuantizeOptions = {},
): Promise<Quantized> {
  const model = resolveModel(checkpoint);
  const tokenizer = loadTokenizer(checkpoint.sideFiles, { config: checkpoint.config });
  const named = text ?? (await shippedText(tokenizer));
  const { calibration, heldBack, record } = textWindows(
    checkpoint,
    tokenizer,
    named,
    Math.max(windowsOf(recipe), KV_CALIBRATION_WINDOWS),
  );
  await removeOldLayers();
  await returnFreedMemory();
  const store = diskLayerStore({
    version,
    format: LAYER_FORMAT,
    recipe,
    threads,
    text: record,
    config: checkpoint.config,
    sources: await Promise.all(checkpoint.sources.map((source) => source.sha256())),
  });
  const ort = cpuOrt(threads);
  const products = ortProducts(ort);
  try {
    const quantized = await quantizeModel(model, recipe, calibration, { ort, products, store, onProgress, signal });
    quantized.calibration = record;
    const kvCalibration = calibration.slice(0, KV_CALIBRATION_WINDOWS);
    return { quantized, heldBack, calibration: kvCalibration, dispose: () => store.remove() };
  } finally {
    await products.dispose();
  }
}
