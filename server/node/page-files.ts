/** The built chat page's files from disk, streamed, and the served models' own, for pages that run them. */
import { createReadStream, statSync } from "node:fs";
import { extname, join, sep } from "node:path";
import { Readable } from "node:stream";
import { pageFile } from "../../src/node/page.ts";
import type { PageFiles } from "../page.ts";

const contentTypes: Readonly<Record<string, string>> = {
  ".html": "text/html; charset=utf-8",
  ".js": "text/javascript; charset=utf-8",
  ".mjs": "text/javascript; charset=utf-8",
  ".css": "text/css; charset=utf-8",
  ".json": "application/json",
  ".webmanifest": "application/manifest+json",
  ".svg": "image/svg+xml",
  ".png": "image/png",
  ".woff2": "font/woff2",
  ".wasm": "application/wasm",
  ".txt": "text/plain; charset=utf-8",
};

/** @param folders of models by id: their files are at `models/<id>/`, where the page looks for them. */
export function pageFiles(folders: ReadonlyMap<string, string>): PageFiles {
  return async (path) => {
    if (path.includes("\0")) return undefined;
    const file = pageFile(path) ?? modelFile(folders, path);
    if (!file) return undefined;
    return {
      body: Readable.toWeb(createReadStream(file)) as ReadableStream<Uint8Array>,
      sizeBytes: statSync(file).size,
      contentType: contentTypes[extname(file)] ?? "application/octet-stream",
    };
  };
}

function modelFile(folders: ReadonlyMap<string, string>, path: string): string | undefined {
  const [, id, inside] = /^models\/([^/]+)\/(.+)$/.exec(path) ?? [];
  const folder = id === undefined ? undefined : folders.get(id);
  if (folder === undefined) return undefined;
  const file = join(folder, inside); // resolves "..", so what leaves the folder no longer starts with it
  const isInside = file.startsWith(folder + sep);
  return isInside && statSync(file, { throwIfNoEntry: false })?.isFile() ? file : undefined;
}
