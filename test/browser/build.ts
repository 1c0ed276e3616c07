/** The page, and a bare page that uses `nibble-llm/web`, built once for a test file into a folder of its own. */
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { build } from "vite";
import { repoPath } from "../helpers.ts";

export interface Built {
  readonly folder: string;
  remove(): Promise<void>;
}

async function temporary(): Promise<Built> {
  const folder = await mkdtemp(join(tmpdir(), "nibble-page-"));
  return { folder, remove: () => rm(folder, { recursive: true, force: true }) };
}

/** `npm run build:page`, elsewhere. */
export async function buildPage(): Promise<Built> {
  const built = await temporary();
  await build({
    configFile: repoPath("browser-demo/vite.config.ts"),
    logLevel: "warn",
    build: { outDir: built.folder, emptyOutDir: true },
  });
  return built;
}

/** fixtures/harness.html: puts the library on `window.nibble`. */
export async function buildHarness(): Promise<Built> {
  const built = await temporary();
  await build({
    configFile: false,
    root: repoPath("test/browser/fixtures"),
    base: "./",
    logLevel: "warn",
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
