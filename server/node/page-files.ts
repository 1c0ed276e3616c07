/** The built chat page's files from disk, streamed. */
import { createReadStream, statSync } from "node:fs";
import { extname } from "node:path";
import { Readable } from "node:stream";
import { pageFile } from "../../src/node/page.ts";
import type { PageFile } from "../page.ts";

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

export async function pageFiles(path: string): Promise<PageFile | undefined> {
  if (path.includes("\0")) return undefined;
  const file = pageFile(path);
  if (!file) return undefined;
  return {
    body: Readable.toWeb(createReadStream(file)) as ReadableStream<Uint8Array>,
    sizeBytes: statSync(file).size,
    contentType: contentTypes[extname(file)] ?? "application/octet-stream",
  };
}
