/**
 * The service worker: the page's own files offline, and `fetch("/v1/...")` answered by the engine in the page. It holds
 * routes only: it cannot start workers or load ONNX Runtime, so it asks an open page for a port to its engine.
 */
/// <reference lib="webworker" />
import type { FromServiceWorker, ToServiceWorker } from "./service-worker-link.ts";

declare const self: ServiceWorkerGlobalScope;
/** Set by vite.config.ts: every file of the build, and a name for this build. */
declare const PAGE_FILES: readonly string[];
declare const PAGE_VERSION: string;

const pageCache = `nibble-page-${PAGE_VERSION}`;
/** Survives new builds: its addresses change with ONNX Runtime's files only. */
const runtimeCache = "nibble-runtime";

self.addEventListener("install", (event) => {
  const keep = async () => {
    const cache = await caches.open(pageCache);
    await cache.addAll(PAGE_FILES.map((path) => new Request(path, { cache: "reload" })));
    await self.skipWaiting();
  };
  event.waitUntil(keep());
});

self.addEventListener("activate", (event) => {
  const tidy = async () => {
    const old = (await caches.keys()).filter((name) => name.startsWith("nibble-page-") && name !== pageCache);
    await Promise.all(old.map((name) => caches.delete(name)));
    await self.clients.claim();
  };
  event.waitUntil(tidy());
});

let port: MessagePort | undefined;
let waiting: ((port: MessagePort | undefined) => void)[] = [];

self.addEventListener("message", (event) => {
  const message = event.data as ToServiceWorker;
  if (message.kind === "keep") {
    event.waitUntil(keepMissing(message.urls));
    return;
  }
  port = message.kind === "engine" ? message.port : undefined;
  for (const resolve of waiting) resolve(port);
  waiting = [];
});

async function keepMissing(urls: readonly string[]): Promise<void> {
  const cache = await caches.open(runtimeCache);
  for (const url of urls) if (!(await cache.match(url))) await cache.add(url);
}

self.addEventListener("fetch", (event) => {
  const { request } = event;
  const url = new URL(request.url);
  if (url.origin !== self.location.origin) return;
  if (request.method !== "GET" || request.headers.has("range")) return;
  if (url.pathname.startsWith(new URL("models/", self.registration.scope).pathname)) return; // kept in OPFS, not here
  event.respondWith(fromCache(request));
});

async function fromCache(request: Request): Promise<Response> {
  const scope = new URL(self.registration.scope);
  const { pathname, origin } = new URL(request.url);
  const address =
    request.mode === "navigate" && pathname === scope.pathname ? new URL("index.html", scope) : request.url;
  const cached = await caches.match(address, { ignoreSearch: request.mode === "navigate" });
  return (
    cached ?? fetch(request).catch(() => new Response("Offline, and not kept.", { status: 503, statusText: origin }))
  );
}
