/** Export to a folder on disk that appears whole and checked, or not at all. */
import { env } from "onnxruntime-common";
import type { Recipe } from "../../quant/recipes.ts";
import { type Model, resolveModel } from "../arch/index.ts";
import { floatWeights, type Weights } from "../arch/weights.ts";
import type { Checkpoint } from "../checkpoint/checkpoint.ts";
import { NibbleError } from "../errors.ts";
import { addKvCaches, type CacheWindows, type MadeFormat } from "../eval/kv-caches.ts";
import { verifyExport } from "../eval/verify.ts";
import { contextOf, type ExportInput, type ExportOptions, exportModel, writeManifest } from "../export/export.ts";
import type { Manifest, ModelDtype } from "../export/model-folder.ts";
import type { FolderSink } from "../files.ts";
import type { Ort } from "../onnx/ort.ts";
import { loadTokenizer } from "../tokenizer/hf-tokenizer.ts";
import { cpuOrt } from "./cpu-ort.ts";
import { nodeSink, requireFree } from "./folder-sink.ts";
import { returnFreedMemory } from "./freed-memory.ts";
import { rememberModel } from "./models.ts";
import { KV_CALIBRATION_WINDOWS, type Quantized } from "./quantize.ts";
import { type NamedText, shippedText, type TextWindows, textWindows } from "./text-windows.ts";

export interface ExportFolderOptions extends Omit<ExportOptions, "dtype"> {
  /** Default: fp32, or of the codes' width with float32 activations (q4). */
  readonly dtype?: ModelDtype;
  /** Replace a model that is there already. */
  readonly overwrite?: boolean;
  /** Text to check a float export by (default: the set that ships with Nibble); a quantized model brings its own. */
  readonly text?: NamedText;
  /** Default true. False keeps a result that nothing was measured of, as for models with random weights. */
  readonly check?: boolean;
  /**
   * Also make the graph with this KV cache (int8 beside int4 ones). Default: int8 for a quantized model, where its
   * attention can use one.
   */
  readonly kv?: "float" | MadeFormat;
  /** Told why there is no int8 cache where none was asked for. */
  readonly onNote?: (note: string) => void;
  readonly threads?: number;
}

/** Exports a checkpoint as it is, or what `quantize` made of one; errors: `verification` where the result is wrong. */
export async function exportFolder(
  source: Checkpoint | Quantized,
  folder: string,
  options: ExportFolderOptions = {},
): Promise<Manifest> {
  const input: ExportInput = "quantized" in source ? source.quantized : asItIs(source);
  const dtype = options.dtype ?? ("quantized" in source ? modelDtype(source.quantized.plan) : "fp32");
  const { signal, onProgress } = options;
  await returnFreedMemory();
  const out = await nodeSink(folder, { overwrite: options.overwrite });
  try {
    let manifest: Manifest = {
      ...(await exportModel(input, out, { ...options, dtype })),
      environment: environment(options.threads),
    };
    const ort = cpuOrt(options.threads);
    const whole = "quantized" in source ? source : await checkWindows(source, options.text);
    // the exported graphs take no longer text
    const cut = (windows: CacheWindows["heldBack"]) => windows.map((ids) => ids.slice(0, manifest.contextLength));
    const windows = { heldBack: cut(whole.heldBack), calibration: cut(whole.calibration) };
    manifest = await withKvCache(ort, out, manifest, windows, source, options);
    if (options.check ?? true) {
      const { model, weights } = input;
      const { heldBack } = windows;
      const measured = await verifyExport(ort, out.written, manifest, model, weights, heldBack, { signal, onProgress });
      manifest = { ...manifest, measured: { ...measured } };
    }
    await writeManifest(out, manifest);
    signal?.throwIfAborted();
    await out.commit();
    await rememberModel(folder);
    return manifest;
  } catch (error) {
    await out.abort();
    throw error;
  }
}

function environment(threads: number | undefined): Manifest["environment"] {
  const { node } = process.versions;
  return {
    onnxruntime: env.versions.common,
    node,
    platform: `${process.platform}-${process.arch}`,
    ...(threads && { threads }),
  };
}

/** What `exportFolder` would refuse after the quantization, before it. */
export async function requireExportable(
  checkpoint: Checkpoint,
  folder: string,
  { overwrite = false, contextLength }: Pick<ExportFolderOptions, "overwrite" | "contextLength">,
): Promise<void> {
  await requireFree(folder, overwrite);
  contextOf(resolveModel(checkpoint), contextLength);
}

function asItIs(checkpoint: Checkpoint): { readonly model: Model; readonly weights: Weights } {
  const model = resolveModel(checkpoint);
  return { model, weights: floatWeights(model.checkpoint) };
}

async function withKvCache(
  ort: Ort,
  out: FolderSink,
  manifest: Manifest,
  windows: CacheWindows,
  source: Checkpoint | Quantized,
  { kv, signal, onProgress, onNote }: ExportFolderOptions,
): Promise<Manifest> {
  if (kv === "float" || (kv === undefined && !("quantized" in source))) return manifest;
  const formats: MadeFormat[] = kv === undefined || kv === "int8" ? ["int8"] : ["int8", kv];
  try {
    return await addKvCaches(ort, out, manifest, formats, windows, { signal, onProgress });
  } catch (error) {
    const isExpected = error instanceof NibbleError && ["unsupported", "verification"].includes(error.code);
    if (kv !== undefined || !isExpected) throw error;
    onNote?.(`no int8 KV cache: ${error.message}`);
    return manifest;
  }
}

async function checkWindows(checkpoint: Checkpoint, text?: NamedText): Promise<TextWindows> {
  const tokenizer = loadTokenizer(checkpoint.sideFiles, { config: checkpoint.config });
  return textWindows(checkpoint, tokenizer, text ?? (await shippedText(tokenizer)), KV_CALIBRATION_WINDOWS);
}

/** What a recipe that only prunes has for bits. */
const FLOAT_BITS = 16;

/** The name of transformers.js for the integers that a recipe's codes are stored in. */
export function modelDtype(
  { bits, inputBits }: Pick<Recipe, "bits" | "inputBits">,
  activations: "float32" | "float16" = "float32",
): ModelDtype {
  const half = activations === "float16" ? "f16" : "";
  if (bits === FLOAT_BITS) return half ? "fp16" : "fp32";
  if (bits <= 2) return `q2${half}`;
  if (bits <= 4) return `q4${half}`;
  if (half) {
    const what = inputBits ? "integer activations" : `${bits} bits`;
    throw new NibbleError("unsupported", `float16 activations with ${what}: this version makes q2f16 and q4f16.`, {
      param: "dtype",
    });
  }
  return inputBits ? "q8" : "int8";
}
