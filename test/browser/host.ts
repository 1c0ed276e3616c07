/** A static host as tests need one: with or without isolation headers, dropping connections, lying about bytes. */
import { createReadStream, existsSync, statSync } from "node:fs";
import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { extname, join, normalize } from "node:path";

export const TYPES: Readonly<Record<string, string>> = {
  ".html": "text/html; charset=utf-8",
  ".js": "text/javascript",
  ".mjs": "text/javascript",
  ".css": "text/css",
  ".json": "application/json",
  ".wasm": "application/wasm",
  ".svg": "image/svg+xml",
  ".woff2": "font/woff2",
  ".webmanifest": "application/manifest+json",
};

export interface HostOptions {
  /** Folders by URL prefix; the longest prefix wins. */
  readonly folders: Readonly<Record<string, string>>;
  /** Send COOP and COEP, so that pages are cross-origin isolated. */
  readonly isolated?: boolean;
}

export interface Host {
  readonly url: string;
  /** Every request so far, "GET /path bytes=5-". */
  readonly log: string[];
  /** Called before a file is sent or found missing; true when it answered by itself. */
  intercept: ((path: string, request: IncomingMessage, response: ServerResponse, file: string) => boolean) | undefined;
  /** While true nothing is answered: the host is gone. */
  down: boolean;
  close(): Promise<void>;
}

export async function startHost({ folders, isolated = false }: HostOptions): Promise<Host> {
  const prefixes = Object.keys(folders).sort((a, b) => b.length - a.length);
  const server = createServer((request, response) => {
    const path = decodeURIComponent(new URL(request.url ?? "/", "http://host").pathname);
    host.log.push(`${request.method} ${path} ${request.headers.range ?? ""}`.trim());
    if (host.down) return void request.socket.destroy();
    if (isolated) {
      response.setHeader("Cross-Origin-Opener-Policy", "same-origin");
      response.setHeader("Cross-Origin-Embedder-Policy", "require-corp");
    }
    const prefix = prefixes.find((one) => path.startsWith(one));
    // A prefix may name a file itself.
    let file = prefix && join(folders[prefix], path === prefix ? "" : normalize(path.slice(prefix.length)));
    if (file && existsSync(file) && statSync(file).isDirectory()) file = join(file, "index.html");
    if (host.intercept?.(path, request, response, file ?? "")) return;
    if (!file || !existsSync(file)) {
      response.writeHead(404).end();
      return;
    }
    sendFile(request, response, file);
  });
  await new Promise<void>((listening) => server.listen(0, "127.0.0.1", listening));
  const host: Host = {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`,
    log: [],
    intercept: undefined,
    down: false,
    close: () => {
      server.closeAllConnections();
      return new Promise((closed) => server.close(() => closed()));
    },
  };
  return host;
}

export function tagOf(file: string): string {
  const { size, mtimeMs } = statSync(file);
  return `"${size}-${mtimeMs}"`;
}

/** The file or the range asked for, with a tag. */
export function sendFile(request: IncomingMessage, response: ServerResponse, file: string, etag?: string): void {
  const { size } = statSync(file);
  const range = /^bytes=(\d+)-$/.exec(request.headers.range ?? "");
  const start = range ? Number(range[1]) : 0;
  response.setHeader("Content-Type", TYPES[extname(file)] ?? "application/octet-stream");
  response.setHeader("ETag", etag ?? tagOf(file));
  response.setHeader("Content-Length", size - start);
  if (range) response.setHeader("Content-Range", `bytes ${start}-${size - 1}/${size}`);
  response.writeHead(range ? 206 : 200);
  if (request.method === "HEAD") response.end();
  else createReadStream(file, { start }).pipe(response);
}
