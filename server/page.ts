/** The chat page at `/`: static files with a strict content security policy. */
import type { Context, Hono } from "hono";

/** A file of the built page, or undefined; `server/node/page-files.ts` reads them from disk. */
export type PageFiles = (path: string) => Promise<PageFile | undefined>;

export interface PageFile {
  readonly body: Uint8Array<ArrayBuffer> | ReadableStream<Uint8Array>;
  readonly sizeBytes: number;
  readonly contentType: string;
}

/** Where the page may fetch models from, beside its own host. */
const MODEL_SOURCES = ["https://huggingface.co", "https://*.huggingface.co", "https://*.hf.co"];

/** No eval, no inline script; WebAssembly, workers of its own, images of data: URLs. */
export function pagePolicy(modelSources: readonly string[] = MODEL_SOURCES): string {
  return [
    "default-src 'self'",
    "script-src 'self' 'wasm-unsafe-eval'",
    "style-src 'self' 'unsafe-inline'", // style attributes of the sanitized markdown
    "img-src 'self' data: blob:",
    "worker-src 'self' blob:",
    `connect-src 'self' blob: data: ${modelSources.join(" ")}`,
    "object-src 'none'",
    "base-uri 'self'",
    "form-action 'none'",
    "frame-ancestors 'none'",
  ].join("; ");
}

export function pageHeaders(contentType: string): Record<string, string> {
  return {
    "Content-Type": contentType,
    "Content-Security-Policy": pagePolicy(),
    "Cross-Origin-Opener-Policy": "same-origin", // with the next one: threads of WebAssembly
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
  };
}

export function mountPage(app: Hono, files: PageFiles): void {
  app.get("*", async (c: Context, next) => {
    const path = decoded(c.req.path)?.replace(/^\/+/, "");
    const file = path === undefined ? undefined : await files(path || "index.html");
    if (!file) return next();
    return c.body(file.body, 200, { ...pageHeaders(file.contentType), "Content-Length": String(file.sizeBytes) });
  });
}

/** Undefined for broken percent signs. */
function decoded(path: string): string | undefined {
  try {
    return decodeURIComponent(path);
  } catch {
    return undefined;
  }
}
