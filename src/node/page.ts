/** Where the files of the built chat page lie, for the server that shows it at `/`. */
import { existsSync, statSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join, sep } from "node:path";
import { packageFolder } from "./package.ts";

/**
 * The file behind a path of the page ("index.html", "assets/main.js"), or undefined. ONNX Runtime's own files (`ort/`,
 * 86 MB) are not packed twice: an installed package takes them from onnxruntime-web.
 */
export function pageFile(path: string): string | undefined {
  const page = join(packageFolder(), "browser-demo", "dist");
  const inPage = fileInside(page, path);
  if (inPage || !path.startsWith("ort/")) return inPage;
  const ortFolder = dirname(createRequire(import.meta.url).resolve("onnxruntime-web/wasm"));
  return fileInside(ortFolder, path.slice("ort/".length));
}

/** Whether the page was built (`npm run build:page`; a package holds it). */
export function hasPage(): boolean {
  return pageFile("index.html") !== undefined;
}

function fileInside(folder: string, path: string): string | undefined {
  const full = join(folder, path); // resolves "..", so what leaves the folder no longer starts with it
  return full.startsWith(folder + sep) && existsSync(full) && statSync(full).isFile() ? full : undefined;
}
