/** Compare, and quantizing in the page. */
import { readFileSync } from "node:fs";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import * as onnxruntime from "onnxruntime-node";
import type { Page } from "playwright-core";
import { describe, expect, test } from "vitest";
import { tokenWindows } from "../../quant/calibrate.ts";
import { ortProducts } from "../../quant/products.ts";
import { quantizeModel } from "../../quant/quantize.ts";
import { gptq } from "../../quant/recipes.ts";
import { resolveModel } from "../../src/arch/index.ts";
import { openHfFolder } from "../../src/checkpoint/hf-folder.ts";
import { exportModel } from "../../src/export/export.ts";
import { nodeFolder } from "../../src/node/files.ts";
import { nodeSink } from "../../src/node/folder-sink.ts";
import type { Ort } from "../../src/onnx/ort.ts";
import { loadTokenizer } from "../../src/tokenizer/hf-tokenizer.ts";
import { repoPath } from "../helpers.ts";
import { LIMIT_MS, noChromium } from "./chromium.ts";
import { ask, finished, openModel, picture, servedForTests } from "./driving.ts";

const ort = onnxruntime as unknown as Ort;

/** A file of a stored model, as it lies in OPFS. */
async function storedFile(page: Page, model: string, path: string): Promise<Buffer> {
  const base64 = await page.evaluate(
    async (parts) => {
      let folder = await navigator.storage.getDirectory();
      for (const part of parts.slice(0, -1)) folder = await folder.getDirectoryHandle(part);
      const file = await (await folder.getFileHandle(parts.at(-1)!)).getFile();
      let text = "";
      for (const byte of new Uint8Array(await file.arrayBuffer())) text += String.fromCharCode(byte);
      return btoa(text);
    },
    ["models", model, "files", ...path.split("/")],
  );
  return Buffer.from(base64, "base64");
}

/** Enough text for a few windows. */
const sample = readFileSync(repoPath("models/stories260k/stories-sample.txt"), "utf8").slice(0, 8000);
/**
 * WASM and native kernels sum in other orders, so a weight in the middle between two codes may go either way, and GPTQ
 * passes its error on: 3.7 % of the bytes (two codes each) differed when this was written.
 */
const MOST_DIFFERENT_BYTES = 0.08;
/** What those codes may cost: the layers' mean relative error, here against Node. */
const ERROR_TOLERANCE = 0.02;

const mean = (values: readonly number[]) => values.reduce((sum, value) => sum + value, 0) / values.length;

/** The weights file that the same recipe and text give in Node, and the layers' mean relative error. */
async function gptqInNode(text: string): Promise<{ data: Buffer; error: number }> {
  const checkpoint = await openHfFolder(nodeFolder(repoPath("models/stories260k")));
  const model = resolveModel(checkpoint);
  const recipe = gptq({ bits: 4, groupSize: 32 });
  const tokenizer = loadTokenizer(checkpoint.sideFiles, { config: checkpoint.config });
  const texts = text.split("<|endoftext|>").map((part) => part.trim());
  const windows = tokenWindows(tokenizer, { texts, sequenceLength: 512, windows: recipe.windows });
  const quantized = await quantizeModel(model, recipe, windows, { ort, products: ortProducts(ort) });
  const folder = await mkdtemp(join(tmpdir(), "nibble-gptq-"));
  const out = await nodeSink(join(folder, "made"));
  await exportModel(quantized, out, { dtype: "q4" });
  await out.commit();
  await checkpoint.dispose();
  const data = readFileSync(join(folder, "made/onnx/model_q4.onnx_data"));
  await rm(folder, { recursive: true });
  const errors = [...quantized.reports.values()].flatMap(({ relativeError }) => relativeError ?? []);
  return { data, error: mean(errors) };
}

describe.skipIf(noChromium())("compare and quantize", { timeout: LIMIT_MS + 30_000 }, () => {
  const tests = servedForTests();

  test("compares twin, file as stored and transformers.js on one prompt, and marks where they part", () =>
    tests.inPage(async (page) => {
      await openModel(page);
      await page.waitForSelector(".pill.on");
      await page.goto(`${tests.host.url}/#compare`);
      await page.getByLabel("Device B").selectOption("stored");
      await page.getByRole("checkbox", { name: /transformers.js/ }).check();
      await page.getByRole("button", { name: "Compare" }).click();
      const verdict = page.getByRole("status").filter({ hasText: "A and transformers.js" });
      await verdict.first().waitFor();
      // the twin rounds activations, the file as it is stored does not: transformers.js runs the latter
      const [, b, peer] = await page.locator(".side .answer").allTextContents();
      expect(peer).toBe(b);
      expect(b.length).toBeGreaterThan(100);
      for (const text of await page.locator(".side").allTextContents()) expect(text).toMatch(/Speed[\d.]+ tok\/s/);
      await page.locator(".sides").evaluate((sides) => sides.scrollIntoView());
      await picture(page, "compare");
    }));

  test("compares two policies of the cache, and says what one keeps", () =>
    tests.inPage(async (page) => {
      await openModel(page);
      await page.goto(`${tests.host.url}/#compare`);
      await page.getByLabel("Cache policy B").selectOption("window");
      await page.getByRole("button", { name: "Compare" }).click();
      await page.getByRole("status").filter({ hasText: "A and B part after" }).first().waitFor();
      const [a, b] = await page.locator(".side").allTextContents();
      expect(a).toMatch(/fp32 full/);
      expect(b).toMatch(/fp32 window.*keeps the first 4 tokens and the newest, at most 64/);
      expect(await page.locator(".side mark").count()).toBe(2);
    }));

  test("quantizes a dropped checkpoint to the codes that Node gives, and opens it", () =>
    tests.inPage(async (page) => {
      await page.goto(`${tests.host.url}/#quantize`);
      await page.getByLabel("Drop a checkpoint folder here").setInputFiles(repoPath("models/stories260k"));
      await page.getByLabel("Method").selectOption("rtn");
      await page.getByRole("button", { name: "Quantize", exact: true }).click();
      await page.getByText("kept in this browser.", { exact: false }).filter({ hasText: "stories260k-rtn" }).waitFor();
      expect(await page.locator(".layers tbody tr").count()).toBe(5 * 7 + 1); // and the table of embeddings
      const here = await storedFile(page, "stories260k-rtn-4bit", "onnx/model_q4.onnx_data");
      expect(here.equals(readFileSync(join(tests.folder, "models/stories260k/onnx/model_q4.onnx_data")))).toBe(true);
      await page.getByRole("button", { name: "Open and chat" }).click();
      await page.locator(".model-button", { hasText: "stories260k-rtn-4bit" }).waitFor();
      await ask(page, "Once upon a time");
      await finished(page);
    }));

  test("calibrates and rounds by GPTQ as Node does, but for a stated share of the codes", () =>
    tests.inPage(async (page) => {
      await page.goto(`${tests.host.url}/#quantize`);
      await page.getByLabel("Drop a checkpoint folder here").setInputFiles(repoPath("models/stories260k"));
      await page.getByLabel("Calibration text").setInputFiles({
        name: "sample.txt",
        mimeType: "text/plain",
        buffer: Buffer.from(sample),
      });
      await page.getByRole("button", { name: "Quantize", exact: true }).click();
      await page.getByText("kept in this browser.").filter({ hasText: "stories260k-gptq" }).waitFor();
      const rows = await page.locator(".layers tbody tr").allTextContents();
      expect(rows.filter((row) => /_proj.*e-\d/.test(row)).length).toBe(5 * 7);
      await picture(page, "quantize");
      const here = await storedFile(page, "stories260k-gptq-4bit", "onnx/model_q4.onnx_data");
      const errors = await page.locator(".layers tbody td.numbers").allTextContents();
      const node = await gptqInNode(sample);
      expect(here.length).toBe(node.data.length);
      const different = here.reduce((count, byte, at) => count + Number(byte !== node.data[at]), 0) / here.length;
      expect(different).toBeLessThan(MOST_DIFFERENT_BYTES);
      expect(Math.abs(mean(errors.filter((text) => text !== "").map(Number)) / node.error - 1)).toBeLessThan(
        ERROR_TOLERANCE,
      );
    }));
});
