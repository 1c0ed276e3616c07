/** The page, and a bare page that uses `nibble-llm/web`, built once for a test file into a folder of its own. */
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import * as ort from "onnxruntime-node";
import { build, type InlineConfig } from "vite";
import { ortProducts } from "../../quant/products.ts";
import { quantizeModel } from "../../quant/quantize.ts";
import { rtn } from "../../quant/recipes.ts";
import { resolveModel } from "../../src/arch/index.ts";
import { floatWeights } from "../../src/arch/weights.ts";
import { openHfFolder } from "../../src/checkpoint/hf-folder.ts";
import { exportModel } from "../../src/export/export.ts";
import { nodeFolder } from "../../src/node/files.ts";
import { nodeSink } from "../../src/node/folder-sink.ts";
import type { Ort } from "../../src/onnx/ort.ts";
import { repoPath } from "../helpers.ts";

export interface Built {
  readonly folder: string;
  remove(): Promise<void>;
}

async function temporary(): Promise<Built> {
  const folder = await mkdtemp(join(tmpdir(), "nibble-page-"));
  return { folder, remove: () => rm(folder, { recursive: true, force: true }) };
}

async function makeModel(folder: string, dtype: "fp32" | "q4"): Promise<void> {
  const checkpoint = await openHfFolder(nodeFolder(repoPath("models/stories260k")));
  const model = resolveModel(checkpoint);
  const tools = { ort: ort as unknown as Ort, products: ortProducts(ort as unknown as Ort) };
  const input =
    dtype === "q4" ? await quantizeModel(model, rtn(), [], tools) : { model, weights: floatWeights(checkpoint) };
  const out = await nodeSink(folder);
  await exportModel(input, out, { dtype });
  await out.commit();
  await checkpoint.dispose();
}

/** Vite builds what NODE_ENV says, and vitest sets it to "test": the page would think it is being developed. */
async function buildForProduction(config: InlineConfig): Promise<void> {
  const { NODE_ENV } = process.env;
  process.env.NODE_ENV = "production";
  try {
    await build({ ...config, logLevel: "warn" });
  } finally {
    process.env.NODE_ENV = NODE_ENV;
  }
}

/** `npm run build:page`, elsewhere, with stories260K as float32 or rounded to 4 bits (GPTQ takes ten seconds). */
export async function buildPage(dtype: "fp32" | "q4"): Promise<Built> {
  const built = await temporary();
  const model = await temporary();
  await makeModel(join(model.folder, "made"), dtype);
  process.env.NIBBLE_PAGE_MODEL = join(model.folder, "made");
  await buildForProduction({
    configFile: repoPath("browser-demo/vite.config.ts"),
    build: { outDir: built.folder, emptyOutDir: true },
  });
  delete process.env.NIBBLE_PAGE_MODEL;
  await model.remove();
  return built;
}

/** fixtures/harness.html: puts the library on `window.nibble`. */
export async function buildHarness(): Promise<Built> {
  const built = await temporary();
  await buildForProduction({
    configFile: false,
    root: repoPath("test/browser/fixtures"),
    base: "./",
    resolve: { conditions: ["onnxruntime-web-use-extern-wasm", "module", "browser", "development|production"] },
    worker: { format: "es" },
    build: {
      outDir: built.folder,
      emptyOutDir: true,
      rollupOptions: { input: repoPath("test/browser/fixtures/harness.html") },
    },
  });
  return built;
}
