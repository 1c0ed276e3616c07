/** Weights on their way into the browser: written as they come, resumed, verified, refused. */
import { readFileSync, statSync } from "node:fs";
import { readdir } from "node:fs/promises";
import type { ServerResponse } from "node:http";
import { join } from "node:path";
import type { Page } from "playwright-core";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { sha256Hex } from "../../src/hash.ts";
import { type Built, buildHarness, buildPage } from "./build.ts";
import { LIMIT_MS, noChromium, openPage, withBrowser } from "./chromium.ts";
import type { Harness } from "./fixtures/harness.ts";
import { type Host, sendFile, startHost, tagOf } from "./host.ts";

declare const nibble: Harness;

/** The largest file of the shipped model, and where a test cuts its transfer. */
const DATA = "onnx/model.onnx_data";
const CUT_BYTES = 400_000;

interface Outcome {
  readonly error?: { readonly code: string; readonly message: string };
  readonly received: number[];
}

/** createEngine in the page; the error comes back as data. */
function open(page: Page, ortUrl: string): Promise<Outcome> {
  return page.evaluate(async (ort): Promise<Outcome> => {
    const received: number[] = [];
    try {
      const engine = await nibble.createEngine("/model/", {
        startWorker: nibble.startWorker,
        device: "wasm",
        ortUrl: ort,
        onProgress: (event) => event.stage === "download" && received.push(event.progress.receivedBytes),
      });
      engine.dispose();
      return { received };
    } catch (error) {
      const { code, message } = error as { code: string; message: string };
      return { error: { code, message }, received };
    }
  }, ortUrl);
}

/** SHA-256 and size of a file as OPFS holds it now. */
async function storedFile(page: Page, path: string): Promise<{ size: number; base64: string } | undefined> {
  return page.evaluate(async (name) => {
    let folder = await navigator.storage.getDirectory();
    const parts = `models/model/files/${name}`.split("/");
    const last = parts.pop()!;
    try {
      for (const part of parts) folder = await folder.getDirectoryHandle(part);
      const file = await (await folder.getFileHandle(last)).getFile();
      const bytes = new Uint8Array(await file.arrayBuffer());
      let text = "";
      for (const byte of bytes) text += String.fromCharCode(byte);
      return { size: file.size, base64: btoa(text) };
    } catch {
      return undefined;
    }
  }, path);
}

function hashOf(stored: { base64: string }): string {
  return sha256Hex(new Uint8Array(Buffer.from(stored.base64, "base64")));
}

describe.skipIf(noChromium())("a model on its way into the browser", { timeout: LIMIT_MS + 30_000 }, () => {
  let page: Built;
  let harness: Built;
  let host: Host;
  let model: string;
  let original: string;

  beforeAll(async () => {
    page = await buildPage("fp32");
    harness = await buildHarness();
    model = join(page.folder, "models/stories260k/");
    original = sha256Hex(new Uint8Array(readFileSync(join(model, DATA))));
    host = await startHost({ folders: { "/": harness.folder, "/model/": model, "/ort/": join(page.folder, "ort/") } });
  });
  afterAll(async () => {
    await host?.close();
    await Promise.all([page?.remove(), harness?.remove()]);
  });

  const url = () => `${host.url}/harness.html`;
  const inBrowser = (run: (page: Page, reopen: () => Promise<Page>) => Promise<void>) =>
    withBrowser(async (context) => {
      host.intercept = undefined;
      host.log.length = 0;
      const first = (await openPage(context, url())).page;
      await run(first, async () => (await openPage(context, url())).page);
    });

  test("a download arrives whole, is verified and listed with its size", () =>
    inBrowser(async (tab) => {
      const { error, received } = await open(tab, "/ort/");
      expect(error).toBeUndefined();
      expect(received.at(-1)).toBeGreaterThan(1_000_000);
      expect(received).toEqual([...received].sort((a, b) => a - b));
      const stored = await tab.evaluate(() => nibble.listModels({ startWorker: nibble.startWorker }));
      expect(stored).toMatchObject([{ id: "model", complete: true, verified: true, storedBytes: received.at(-1) }]);
      expect(hashOf((await storedFile(tab, DATA))!)).toBe(original);
      await tab.evaluate(() => nibble.deleteModel("model", { startWorker: nibble.startWorker }));
      expect(await storedFile(tab, DATA)).toBeUndefined();
      expect(await tab.evaluate(() => nibble.listModels({ startWorker: nibble.startWorker }))).toEqual([]);
    }));

  test("a hub id is looked up there, and fetched by its revision's addresses", () =>
    inBrowser(async (tab) => {
      const paths = (await readdir(model, { recursive: true })).filter((path) => statSync(join(model, path)).isFile());
      const tree = paths.map((path) => ({ type: "file", path, size: statSync(join(model, path)).size }));
      host.intercept = (path, request, response) => {
        if (path === "/api/models/org/stories/tree/v1") {
          response.setHeader("Content-Type", "application/json");
          response.end(JSON.stringify([...tree, { type: "directory", path: "onnx", size: 0 }]));
          return true;
        }
        const file = /^\/org\/stories\/resolve\/v1\/(.+)$/.exec(path)?.[1];
        if (file) sendFile(request, response, join(model, file));
        return file !== undefined;
      };
      const said = await tab.evaluate(async () => {
        const options = { startWorker: nibble.startWorker, device: "wasm", ortUrl: "/ort/" } as const;
        const source = { kind: "hub", id: "org/stories", revision: "v1", endpoint: location.origin } as const;
        const engine = await nibble.createEngine(source, options);
        const { id, verified } = engine.model.stored;
        engine.dispose();
        return { id, verified };
      });
      expect(said).toEqual({ id: "org/stories@v1", verified: true });
    }));

  test("a folder as transformers.js has it, without nibble.json, opens by the names that it uses", () =>
    inBrowser(async (tab) => {
      host.intercept = (path, _request, response) => {
        if (!path.endsWith("nibble.json")) return false;
        response.writeHead(404).end();
        return true;
      };
      const said = await tab.evaluate(async () => {
        const options = { startWorker: nibble.startWorker, device: "wasm", ortUrl: "/ort/" } as const;
        const engine = await nibble.createEngine("/model/", options);
        const ids: number[] = [];
        const greedy = { temperature: 0, maxTokens: 4 };
        for await (const piece of engine.generate({ kind: "ids", ids: [1] }, greedy)) ids.push(...piece.tokens);
        const { verified, complete } = engine.model.stored;
        engine.dispose();
        return { ids, verified, complete };
      });
      expect(said).toEqual({ ids: [403, 407, 261, 378], verified: false, complete: true });
    }));

  test("a download that a closed tab cut off goes on with Range and ends in the same bytes", () =>
    inBrowser(async (tab, reopen) => {
      // The first part arrives, then nothing more: the connection stays open until the tab goes.
      host.intercept = (path, _request, response, file) => {
        if (!path.endsWith(DATA)) return false;
        sendHeaders(response, file, '"one"');
        response.write(readFileSync(file).subarray(0, CUT_BYTES));
        return true;
      };
      const cut = open(tab, "/ort/").catch(() => undefined);
      await expect.poll(async () => (await storedFile(tab, DATA))?.size, { timeout: 20_000 }).toBe(CUT_BYTES);
      await tab.close();
      await cut;

      host.log.length = 0;
      host.intercept = (path, request, response, file) => {
        if (!path.endsWith(DATA)) return false;
        sendFile(request, response, file, '"one"');
        return true;
      };
      const again = await reopen();
      const { error, received } = await open(again, "/ort/");
      expect(error).toBeUndefined();
      expect(host.log).toContain(`GET /model/${DATA} bytes=${CUT_BYTES}-`);
      expect(received[0]).toBeGreaterThan(0);
      expect(hashOf((await storedFile(again, DATA))!)).toBe(original);
    }));

  test("a connection that breaks is taken up again by itself", () =>
    inBrowser(async (tab) => {
      let broken = 0;
      host.intercept = (path, request, response, file) => {
        if (!path.endsWith(DATA) || broken++ > 0) return false;
        const bytes = readFileSync(file);
        sendHeaders(response, file, tagOf(file));
        response.write(bytes.subarray(0, CUT_BYTES), () => setTimeout(() => request.socket.destroy(), 200));
        return true;
      };
      const { error } = await open(tab, "/ort/");
      expect(error).toBeUndefined();
      expect(host.log.filter((line) => line.includes(`${DATA} bytes=`))).toHaveLength(1);
      expect(hashOf((await storedFile(tab, DATA))!)).toBe(original);
    }));

  test("bytes that changed on the host meanwhile are taken from their start", () =>
    inBrowser(async (tab) => {
      let tries = 0;
      host.intercept = (path, request, response, file) => {
        if (!path.endsWith(DATA)) return false;
        tries += 1;
        if (tries > 1) {
          sendFile(request, response, file, '"new"');
          return true;
        }
        sendHeaders(response, file, '"old"');
        response.write(new Uint8Array(CUT_BYTES), () => setTimeout(() => request.socket.destroy(), 200));
        return true;
      };
      const { error } = await open(tab, "/ort/");
      expect(error).toBeUndefined();
      expect(hashOf((await storedFile(tab, DATA))!)).toBe(original);
    }));

  test("one wrong byte is refused by its hash and not kept", () =>
    inBrowser(async (tab) => {
      host.intercept = (path, _request, response, file) => {
        if (!path.endsWith(DATA)) return false;
        const bytes = readFileSync(file);
        bytes[12_345] ^= 1;
        sendHeaders(response, file, tagOf(file));
        response.end(bytes);
        return true;
      };
      const { error } = await open(tab, "/ort/");
      expect(error?.code).toBe("verification");
      expect(error?.message).toContain(original);
      expect((await storedFile(tab, DATA))?.size).toBe(0);
      host.intercept = undefined;
      expect((await open(tab, "/ort/")).error).toBeUndefined();
    }));

  test("a model larger than the room there is is refused before its download", () =>
    inBrowser(async (tab) => {
      host.intercept = (path, _request, response, file) => {
        if (!path.endsWith("nibble.json")) return false;
        const manifest = JSON.parse(readFileSync(file, "utf8"));
        manifest.files[DATA].sizeBytes = 5e15;
        response.setHeader("Content-Type", "application/json");
        response.end(JSON.stringify(manifest));
        return true;
      };
      const { error } = await open(tab, "/ort/");
      expect(error?.code).toBe("no_space");
      expect(error?.message).toMatch(/needs 5,000,000,000,[\d,]+ bytes of this site's storage; there are [\d,]+/);
      expect(host.log.filter((line) => line.includes(DATA))).toEqual([]);
    }));
});

function sendHeaders(response: ServerResponse, file: string, etag: string): void {
  response.setHeader("ETag", etag);
  response.setHeader("Content-Length", readFileSync(file).byteLength);
}
