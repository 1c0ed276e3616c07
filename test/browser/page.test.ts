/** The page as its users meet it: chat, offline, recovery, quantizing; and the pictures of it in the README. */
import { readFileSync } from "node:fs";
import { mkdir, mkdtemp, rm } from "node:fs/promises";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { AxeResults } from "axe-core";
import * as onnxruntime from "onnxruntime-node";
import type { BrowserContext, Page } from "playwright-core";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
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
import { type Built, buildPage } from "./build.ts";
import { LIMIT_MS, noChromium, openPage, WEBGPU, withBrowser } from "./chromium.ts";
import { type Host, startHost } from "./host.ts";

const ort = onnxruntime as unknown as Ort;
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
/** Written where a picture is asked for: NIBBLE_SCREENSHOTS=docs/screenshots. */
const pictures = process.env.NIBBLE_SCREENSHOTS;

async function picture(page: Page, name: string): Promise<void> {
  if (!pictures) return;
  await mkdir(repoPath(pictures), { recursive: true });
  await page.screenshot({ path: repoPath(pictures, `${name}.png`), animations: "disabled" });
}

/** Rule and elements of everything that axe objects to. */
async function axeViolations(page: Page): Promise<string[]> {
  await page.evaluate(axe);
  const results = await page.evaluate(() =>
    (globalThis as unknown as { axe: { run(): Promise<AxeResults> } }).axe.run(),
  );
  return results.violations.map(({ id, nodes }) => `${id}: ${nodes.map(({ target }) => target.join(" ")).join(", ")}`);
}

async function openModel(page: Page): Promise<void> {
  await page.getByRole("button", { name: "Open stories260K" }).first().click();
  await page.waitForSelector(".pill.on");
}
const composer = (page: Page) => page.getByRole("textbox", { name: "Message" });
const answers = (page: Page) => page.getByRole("article", { name: "Answer" });
const finished = (page: Page) => page.waitForSelector(".message .stats");

async function ask(page: Page, text: string): Promise<void> {
  await composer(page).fill(text);
  await composer(page).press("Enter");
}

/** Greedy and short, so that runs are alike. */
async function setSampling(page: Page): Promise<void> {
  await page.evaluate(() => {
    const kept = JSON.parse(localStorage.getItem("nibble-settings") ?? "{}") as object;
    const chosen = { ...kept, temperature: 0, repetitionPenalty: 1, maxTokens: 64 };
    localStorage.setItem("nibble-settings", JSON.stringify(chosen));
  });
  await page.reload();
}

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

describe.skipIf(noChromium())("the page", { timeout: LIMIT_MS + 30_000 }, () => {
  let built: Built;
  let host: Host;
  const SUBPATH = "/some/where/";

  beforeAll(async () => {
    built = await buildPage("q4");
    host = await startHost({ folders: { "/": built.folder, [SUBPATH]: built.folder }, isolated: true });
  });
  afterAll(async () => {
    await host?.close();
    await built?.remove();
  });

  const inPage = (
    run: (page: Page, context: BrowserContext, errors: string[]) => Promise<void>,
    options: { path?: string; width?: number; height?: number; flags?: readonly string[] } = {},
  ) =>
    withBrowser(async (context) => {
      host.intercept = undefined;
      host.down = false;
      const { page, errors } = await openPage(context, host.url + (options.path ?? "/"));
      await run(page, context, errors);
      // The page asks a static host for /v1/models once, to learn whether a server is behind it.
      expect(errors.filter((text) => !text.includes("404"))).toEqual([]);
    }, options);

  test("answers, regenerates, edits and resends, and keeps the conversation", () =>
    inPage(async (page) => {
      await setSampling(page);
      await openModel(page);
      await ask(page, "Once upon a time");
      await finished(page);
      const first = await answers(page).locator(".body").textContent();
      expect(first).toMatch(/^, there was a/);
      expect(await page.locator(".stats").textContent()).toMatch(
        /\d tok\/s · first token .* · 64 tokens · stories260k · wasm/,
      );
      expect(await page.locator(".status").textContent()).toMatch(/Context \d+ of 512.*KV cache .* fp32 full/);
      await picture(page, "chat");

      await page.getByRole("button", { name: "Regenerate" }).click();
      await finished(page);
      expect(await answers(page).locator(".body").textContent()).toBe(first);

      await page.getByRole("button", { name: "Edit and resend" }).click();
      await page.getByRole("textbox", { name: "Your message" }).fill("The little dog");
      await page.getByRole("button", { name: "Send", exact: true }).first().click();
      await expect.poll(() => answers(page).locator(".body").textContent()).not.toBe(first);
      await finished(page);
      const edited = await answers(page).locator(".body").textContent();

      await page.reload();
      await page
        .getByRole("button", { name: "The little dog", exact: true })
        .or(page.locator(".history li button").first())
        .first()
        .click();
      expect(await answers(page).locator(".body").textContent()).toBe(edited);
      await page.getByRole("button", { name: "Dark or light" }).click();
      await page.waitForSelector(".pill.on");
      await picture(page, "chat-dark");
    }));

  test("stops when told, and keeps what was said", () =>
    inPage(async (page) => {
      await openModel(page);
      await ask(page, "Once upon a time");
      await page.getByRole("button", { name: "Stop" }).click();
      await page.waitForSelector(".message[data-role=assistant] .foot:not([hidden])");
      expect(await page.getByRole("button", { name: "Send", exact: true }).isVisible()).toBe(true);
      await ask(page, " and then");
      await finished(page);
    }));

  test("works offline on the second visit, with the model it had", () =>
    inPage(async (page, context) => {
      await setSampling(page);
      await openModel(page);
      await ask(page, "Once upon a time");
      await finished(page);
      const online = await answers(page).locator(".body").textContent();
      await expect
        .poll(() => page.evaluate(async () => (await (await caches.open("nibble-runtime")).keys()).length))
        .toBe(2);
      await page.close();
      host.down = true;
      const { page: again } = await openPage(context, `${host.url}/`);
      await again.getByText("stories260k", { exact: true }).first().waitFor();
      await again.waitForSelector(".pill.on");
      await ask(again, "Once upon a time");
      await finished(again);
      expect(await answers(again).locator(".body").textContent()).toBe(online);
    }));

  test("answers a page's own fetch of /v1, and 503 while no model is open", () =>
    inPage(async (page, _context, errors) => {
      await expect
        .poll(() => page.evaluate(() => navigator.serviceWorker.controller !== null), { timeout: 10_000 })
        .toBe(true);
      const post = () =>
        page.evaluate(async () => {
          const body = {
            model: "stories260k",
            messages: [{ role: "user", content: "Once" }],
            max_tokens: 8,
          };
          const headers = { "Content-Type": "application/json" };
          const response = await fetch("/v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body) });
          return { status: response.status, body: await response.json() };
        });
      expect(await post()).toMatchObject({ status: 503, body: { error: { code: "no_engine" } } });
      errors.length = 0; // the browser logs that answer
      await openModel(page);
      await page.waitForSelector(".pill.on");
      const answer = await post();
      expect(answer).toMatchObject({
        status: 200,
        body: { object: "chat.completion", model: "stories260k", usage: { completion_tokens: 8 } },
      });
      const models = await page.evaluate(async () => (await fetch("/v1/models")).json());
      expect(models.data).toMatchObject([{ id: "stories260k" }]);
    }));

  test("comes back with one click when its worker dies, the conversation kept", () =>
    inPage(async (page, _context, errors) => {
      await setSampling(page);
      await openModel(page);
      await ask(page, "Once upon a time");
      await finished(page);
      await page.workers()[0].evaluate(() => {
        setTimeout(() => {
          throw new Error("the device was lost");
        });
      });
      await page.getByRole("alert").getByText("the device was lost").waitFor();
      await page.getByRole("button", { name: "Load the model again" }).click();
      await page.waitForSelector(".pill.on");
      expect(await answers(page).count()).toBe(1);
      await ask(page, " The end.");
      await expect.poll(() => page.locator(".stats").count(), { timeout: 15_000 }).toBe(2);
      errors.length = 0;
    }));

  test("comes back with one click when the GPU is lost, the conversation kept", () =>
    inPage(
      async (page, _context, errors) => {
        await page.evaluate(() => {
          const chosen = { device: "webgpu", temperature: 0, repetitionPenalty: 1, maxTokens: 16 };
          localStorage.setItem("nibble-settings", JSON.stringify(chosen));
        });
        await page.reload();
        await page.getByRole("button", { name: "Open stories260K" }).first().waitFor();
        await expect.poll(() => page.workers().length).toBe(1);
        await page.workers()[0].evaluate(() => {
          const request = GPUAdapter.prototype.requestDevice;
          GPUAdapter.prototype.requestDevice = async function (this: GPUAdapter, descriptor) {
            const device = await request.call(this, descriptor);
            Object.assign(globalThis, { lose: () => device.destroy() });
            return device;
          };
        });
        await openModel(page);
        await ask(page, "Once upon a time");
        await finished(page);
        expect(await page.locator(".stats").textContent()).toMatch(/webgpu/);
        await page.workers()[0].evaluate(() => (globalThis as unknown as { lose(): void }).lose());
        await page.getByRole("alert").getByText("the browser lost the GPU").waitFor();
        await page.getByRole("button", { name: "Load the model again" }).click();
        await page.waitForSelector(".pill.on");
        expect(await answers(page).count()).toBe(1);
        await ask(page, " The end.");
        await expect.poll(() => page.locator(".stats").count(), { timeout: 40_000 }).toBe(2);
        errors.length = 0; // the worker's own
      },
      { flags: WEBGPU },
    ));

  test("a restored tab shows the conversation that it showed, its model open", () =>
    inPage(async (page) => {
      await setSampling(page);
      await openModel(page);
      await ask(page, "Once upon a time");
      await finished(page);
      const said = await answers(page).locator(".body").textContent();
      await page.reload();
      await page.waitForSelector(".pill.on");
      expect(await answers(page).locator(".body").textContent()).toBe(said);
      // of no use to the next one: that is another tab
      expect(await page.evaluate(() => sessionStorage.getItem("nibble-conversation"))).toMatch(/^[\da-f-]{36}$/);
    }));

  test("refuses a model that cannot fit with both numbers, before its weights are asked for", () =>
    inPage(async (page) => {
      host.intercept = (path, _request, response, file) => {
        if (!path.endsWith("stories260k/nibble.json")) return false;
        const manifest = JSON.parse(readFileSync(file, "utf8"));
        manifest.files["onnx/model_q4.onnx_data"].sizeBytes = 3e9;
        response.setHeader("Content-Type", "application/json");
        response.end(JSON.stringify(manifest));
        return true;
      };
      host.log.length = 0;
      await page.getByRole("button", { name: "Open stories260K" }).first().click();
      const alert = page.getByRole("alert");
      await alert.getByText(/needs [\d,]+ bytes of .*; there are [\d,]+/).waitFor();
      expect(host.log.filter((line) => line.includes("onnx_data"))).toEqual([]);
      host.intercept = undefined;
      await page.getByRole("button", { name: "Try again" }).click();
      await page.waitForSelector(".pill.on");
    }));

  test("is used with the keyboard alone", () =>
    inPage(async (page) => {
      /** Tabs until something with this name has the focus. */
      const tabTo = async (name: RegExp) => {
        for (let i = 0; i < 40; i++) {
          await page.keyboard.press("Tab");
          const label = await page.evaluate(() => {
            const { activeElement: at } = document;
            return at?.getAttribute("aria-label") ?? at?.getAttribute("title") ?? at?.textContent ?? "";
          });
          if (name.test(label)) return;
        }
        throw new Error(`no way to ${name} by Tab`);
      };
      await tabTo(/^Open stories260K/);
      await page.keyboard.press("Enter");
      await page.waitForSelector(".pill.on");
      await page.keyboard.press("/");
      await page.keyboard.type("Once upon a time");
      await page.keyboard.press("Enter");
      await page.waitForSelector(".message[data-role=assistant]");
      await page.keyboard.press("Escape"); // stops
      await page.waitForSelector(".message[data-role=assistant] .foot:not([hidden])");
      await tabTo(/^Regenerate$/);
      expect(await page.evaluate(() => getComputedStyle(document.activeElement!).outlineStyle)).not.toBe("none");
      await page.keyboard.press("Enter");
      await page.keyboard.press("Escape");
      await tabTo(/^Settings$/);
      await page.keyboard.press("Enter");
      await page.getByRole("dialog", { name: "Settings" }).waitFor();
      await page.keyboard.press("Escape");
      expect(await page.getByRole("dialog").count()).toBe(0);
    }));

  test("runs under a sub-path of a host without isolation, on one thread, and says so", async () => {
    const plain = await startHost({ folders: { [SUBPATH]: built.folder } });
    try {
      await withBrowser(async (context) => {
        const { page } = await openPage(context, plain.url + SUBPATH);
        await page.getByText("The host sends no COOP and COEP headers").waitFor();
        await openModel(page);
        await ask(page, "Once upon a time");
        await finished(page);
        expect(await page.locator(".model-button").textContent()).toMatch(/WASM · 1 thread/);
      });
    } finally {
      await plain.close();
    }
  });

  test("shows one bar while a model arrives", () =>
    inPage(async (page) => {
      // Half of it in pieces, so that there is a rate; the rest when the picture is taken.
      let finish: () => void = () => undefined;
      host.intercept = (path, _request, response, file) => {
        if (!path.endsWith(".onnx_data")) return false;
        const bytes = readFileSync(file);
        response.setHeader("Content-Length", bytes.byteLength);
        const pieces = 8;
        let sent = 0;
        const send = (share: number) => {
          const end = Math.floor(bytes.byteLength * share);
          response.write(bytes.subarray(sent, end));
          sent = end;
        };
        for (let i = 1; i <= pieces; i++) setTimeout(() => send(i / pieces / 2), i * 100);
        finish = () => response.end(bytes.subarray(sent));
        return true;
      };
      await page.getByRole("button", { name: "Open stories260K" }).first().click();
      const bar = page.getByRole("progressbar", { name: "Loading the model" });
      await expect.poll(async () => Number(await bar.getAttribute("value")), { timeout: 10_000 }).toBeGreaterThan(0.3);
      await page.getByText(/kB\/s/).waitFor();
      expect(await page.locator(".download").textContent()).toMatch(/\d+ kB of \d+ kB/);
      await picture(page, "download");
      finish();
      await page.waitForSelector(".pill.on");
      expect(await bar.isVisible()).toBe(false);
      host.intercept = undefined;
      await page.goto(`${host.url}/#models`);
      await page.getByText("Verified").waitFor();
      await page.getByRole("button", { name: "Delete stories260k" }).click();
      await page.getByText("Nothing stored yet.").waitFor();
    }));

  test("compares twin, file as stored and transformers.js on one prompt, and marks where they part", () =>
    inPage(async (page) => {
      await openModel(page);
      await page.waitForSelector(".pill.on");
      await page.goto(`${host.url}/#compare`);
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
      await picture(page, "compare");
    }));

  test("quantizes a dropped checkpoint to the codes that Node gives, and opens it", () =>
    inPage(async (page) => {
      await page.goto(`${host.url}/#quantize`);
      await page.getByLabel("Drop a checkpoint folder here").setInputFiles(repoPath("models/stories260k"));
      await page.getByLabel("Method").selectOption("rtn");
      await page.getByRole("button", { name: "Quantize", exact: true }).click();
      await page.getByText("kept in this browser.", { exact: false }).filter({ hasText: "stories260k-rtn" }).waitFor();
      expect(await page.locator(".layers tbody tr").count()).toBe(5 * 7 + 1); // and the table of embeddings
      const here = await storedFile(page, "stories260k-rtn-4bit", "onnx/model_q4.onnx_data");
      expect(here.equals(readFileSync(join(built.folder, "models/stories260k/onnx/model_q4.onnx_data")))).toBe(true);
      await page.getByRole("button", { name: "Open and chat" }).click();
      await page.locator(".model-button", { hasText: "stories260k-rtn-4bit" }).waitFor();
      await ask(page, "Once upon a time");
      await finished(page);
    }));

  test("calibrates and rounds by GPTQ as Node does, but for a stated share of the codes", () =>
    inPage(async (page) => {
      await page.goto(`${host.url}/#quantize`);
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

  test("has no accessibility errors in any view, light, dark and on a phone", () =>
    inPage(
      async (page) => {
        await openModel(page);
        await ask(page, "Once upon a time");
        await finished(page);
        const problems: string[] = [];
        for (const theme of ["light", "dark"]) {
          for (const view of ["chat", "models", "compare", "quantize"]) {
            await page.goto(`${host.url}/#${view}`);
            for (const problem of await axeViolations(page)) problems.push(`${theme} ${view}: ${problem}`);
          }
          await page.getByRole("button", { name: "Settings", exact: true }).click();
          for (const problem of await axeViolations(page)) problems.push(`${theme} settings: ${problem}`);
          await page.keyboard.press("Escape");
          await page.getByRole("button", { name: "Dark or light" }).click();
        }
        expect(problems).toEqual([]);
        const wider = await page.evaluate(() =>
          [...document.querySelectorAll("body *")]
            .filter((element) => element.getBoundingClientRect().right > innerWidth)
            .map((element) => `${element.tagName} ${element.className} ${element.textContent?.slice(0, 60)}`),
        );
        const fits = await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth);
        expect(fits ? [] : wider).toEqual([]);
        await page.goto(`${host.url}/#chat`);
        await picture(page, "phone");
      },
      { width: 390, height: 800 },
    ));
});
