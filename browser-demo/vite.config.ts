/**
 * Builds the page into dist/: any static host, any sub-path, nothing from another origin. ONNX Runtime's .mjs and .wasm
 * pairs are served from ort/, transformers.js (for Compare only) from peers/, the shipped model from models/, and the
 * service worker is built last, knowing every file.
 */
import { execFile } from "node:child_process";
import { createReadStream, existsSync } from "node:fs";
import { copyFile, cp, mkdir, readdir, readFile, stat } from "node:fs/promises";
import { createRequire } from "node:module";
import { basename, dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { build, defineConfig, type Plugin } from "vite";
import { ortFiles } from "../src/web/ort.ts";

const here = dirname(fileURLToPath(import.meta.url));
const ortFolder = dirname(createRequire(import.meta.url).resolve("onnxruntime-web/wasm"));
const ortNames = Object.values(ortFiles).flatMap(({ mjs, wasm }) => [mjs, wasm]);

/** What Compare's third answer needs: stock transformers.js with the runtime that it brings, unchanged. */
const transformersFolder = dirname(createRequire(import.meta.url).resolve("@huggingface/transformers"));
const itsOrtFolder = dirname(createRequire(join(transformersFolder, "index.js")).resolve("onnxruntime-web/wasm"));
const peerFiles = [
  join(transformersFolder, "transformers.min.js"),
  join(itsOrtFolder, ortFiles["webgpu-asyncify"].mjs),
  join(itsOrtFolder, ortFiles["webgpu-asyncify"].wasm),
];

/** Texts that "Quantize" calibrates on, as they ship with the package. */
const calibrationTexts = ["models/stories260k/stories-sample.txt", "quant/data/calibration.jsonl"];

/** stories260K as `nibble quantize` makes it, or the folder in NIBBLE_PAGE_MODEL: tests that need no 4 bits save time. */
async function makeShippedModel(folder: string): Promise<void> {
  const ready = process.env.NIBBLE_PAGE_MODEL;
  if (ready) return cp(ready, folder, { recursive: true });
  const recipe = ["--method", "gptq", "--bits", "4", "--group-size", "32", "--force", "--quiet"];
  const command = ["quantize", join(here, "../models/stories260k"), "-o", folder, ...recipe];
  await promisify(execFile)(process.execPath, [join(here, "../bin/nibble.js"), ...command]);
}

/** What the page may do: its own code and WASM, no eval, no inline script; models come from any https host. */
const CONTENT_SECURITY_POLICY = [
  "default-src 'self'",
  "script-src 'self' 'wasm-unsafe-eval'",
  "worker-src 'self'",
  "style-src 'self'",
  "img-src 'self' data:",
  "connect-src 'self' https: http://localhost:* http://127.0.0.1:*",
  "object-src 'none'",
  "base-uri 'none'",
  "form-action 'none'",
].join("; ");

const contentSecurityPolicy: Plugin = {
  name: "content-security-policy",
  apply: "build",
  transformIndexHtml: () => [
    {
      tag: "meta",
      attrs: { "http-equiv": "Content-Security-Policy", content: CONTENT_SECURITY_POLICY },
      injectTo: "head-prepend",
    },
  ],
};

/** Serves and copies a library's files unchanged into a folder of the page: its .mjs finds its .wasm by name. */
const unchanged = (folder: string, files: readonly string[]): Plugin => ({
  name: `${folder}-files`,
  configureServer(server) {
    server.middlewares.use((request, response, next) => {
      const [path] = (request.url ?? "").split("?");
      const file = files.find((one) => path.endsWith(`/${folder}/${basename(one)}`));
      if (!file) return next();
      response.setHeader("Content-Type", file.endsWith(".wasm") ? "application/wasm" : "text/javascript");
      createReadStream(file).pipe(response);
    });
  },
  async writeBundle({ dir }) {
    await mkdir(join(dir!, folder), { recursive: true });
    for (const file of files) await copyFile(file, join(dir!, folder, basename(file)));
  },
});

const onnxRuntime = unchanged(
  "ort",
  ortNames.map((name) => join(ortFolder, name)),
);
const peers = unchanged("peers", peerFiles);

/** The model and the texts that ship, made anew by each build: no binary of them is committed. */
const shippedModel: Plugin = {
  name: "shipped-model",
  async configureServer(server) {
    const shipped = join(here, ".cache/stories260k");
    await makeShippedModel(shipped);
    server.middlewares.use((request, response, next) => {
      const text = calibrationTexts.find((one) => request.url?.endsWith(`/calibration/${basename(one)}`));
      if (text) return void createReadStream(join(here, "..", text)).pipe(response);
      const path = /\/models\/stories260k\/([\w./-]+)$/.exec((request.url ?? "").split("?")[0])?.[1];
      if (!path || path.includes("..") || !existsSync(join(shipped, path))) return next();
      createReadStream(join(shipped, path)).pipe(response);
    });
  },
  async writeBundle({ dir }) {
    await makeShippedModel(join(dir!, "models/stories260k"));
    await mkdir(join(dir!, "calibration"), { recursive: true });
    for (const text of calibrationTexts) {
      await copyFile(join(here, "..", text), join(dir!, "calibration", basename(text)));
    }
  },
};

async function filesBelow(folder: string, prefix = ""): Promise<string[]> {
  const entries = await readdir(join(folder, prefix), { withFileTypes: true });
  const nested = entries.map((entry) =>
    entry.isDirectory() ? filesBelow(folder, `${prefix}${entry.name}/`) : [prefix + entry.name],
  );
  return (await Promise.all(nested)).flat().sort();
}

/** One classic script (module service workers are not everywhere), with the list of files a first visit keeps. */
let outDir = "";

const serviceWorker: Plugin = {
  name: "service-worker",
  apply: "build",
  configResolved(config) {
    outDir = resolve(config.root, config.build.outDir);
  },
  async closeBundle() {
    const files = (await filesBelow(outDir)).filter((path) => !/^(ort|peers|models)\/|^sw\.js$|\.map$/.test(path));
    const sizes = await Promise.all(files.map(async (path) => (await stat(join(outDir, path))).size));
    const html = await readFile(join(outDir, "index.html"), "utf8");
    // Assets carry a hash in their names and index.html names them: its text and the list identify a build.
    const version = Buffer.from(
      await crypto.subtle.digest("SHA-256", new TextEncoder().encode(html + files.join() + sizes.join())),
    ).toString("hex");
    await build({
      configFile: false,
      root: here,
      logLevel: "warn",
      define: { PAGE_FILES: JSON.stringify(files), PAGE_VERSION: JSON.stringify(version.slice(0, 16)) },
      build: {
        outDir,
        emptyOutDir: false,
        copyPublicDir: false,
        lib: { entry: join(here, "service-worker.ts"), formats: ["iife"], name: "nibble", fileName: () => "sw.js" },
      },
    });
  },
};

const isolation = { "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp" };

export default defineConfig({
  root: here,
  base: "./",
  plugins: [contentSecurityPolicy, onnxRuntime, peers, shippedModel, serviceWorker],
  resolve: { conditions: ["onnxruntime-web-use-extern-wasm", "module", "browser", "development|production"] },
  worker: { format: "es" },
  build: {
    outDir: "dist",
    emptyOutDir: true,
    target: "es2022",
    chunkSizeWarningLimit: 900,
    modulePreload: { polyfill: false },
  },
  server: { headers: isolation },
  preview: { headers: isolation },
});
