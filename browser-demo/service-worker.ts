/**
 * The service worker: the page's own files offline, and `fetch("/v1/...")` answered by the engine in the page. It holds
 * routes only: it cannot start workers or load ONNX Runtime, so it asks an open page for a port to its engine.
 */
/// <reference lib="webworker" />
import { createApp } from "../server/app.ts";
import { ModelRegistry } from "../server/models.ts";
import { remoteEngine } from "../src/web/remote-engine.ts";
import { FOR_THE_HOST, type FromServiceWorker, type ToServiceWorker } from "./service-worker-link.ts";

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

/** A page answers at once, or is busy opening a model. */
const ENGINE_TIMEOUT_MS = 3000;

type App = ReturnType<typeof createApp>;
let app: Promise<App> | undefined;
/** The page whose engine it asks. */
let lender: string | undefined;
let gotPort: ((port: MessagePort | undefined) => void) | undefined;

self.addEventListener("message", (event) => {
  const message = event.data as ToServiceWorker;
  if (message.kind === "keep") event.waitUntil(keepMissing(message.urls));
  else if (message.kind === "engine") gotPort?.(message.port);
  else if (message.kind === "changed") app = undefined;
});

/** Asks the open pages, one after the other, for a port to the engine of one. */
async function findPort(): Promise<MessagePort | undefined> {
  for (const client of await self.clients.matchAll({ type: "window" })) {
    const asked = new Promise<MessagePort | undefined>((resolve) => {
      gotPort = resolve;
      setTimeout(() => resolve(undefined), ENGINE_TIMEOUT_MS);
    });
    const question: FromServiceWorker = { kind: "need-engine" };
    client.postMessage(question);
    const port = await asked;
    if (!port) continue;
    lender = client.id;
    return port;
  }
  return undefined;
}

async function isOpen(page: string | undefined): Promise<boolean> {
  return page !== undefined && (await self.clients.get(page)) !== undefined;
}

async function connect(): Promise<App> {
  const port = await findPort();
  const page = lender;
  const engine = port && (await remoteEngine(port, ENGINE_TIMEOUT_MS, () => isOpen(page)));
  if (!engine) throw new Error("no page with an open model");
  const { weightBytes } = engine.info.memory;
  const created = Math.floor(Date.now() / 1000);
  const source = { id: engine.info.id, created, sizeBytes: weightBytes, load: async () => engine };
  return createApp({ models: new ModelRegistry([source]), allowedHosts: ["*"] });
}

async function answer(request: Request): Promise<Response> {
  try {
    // a page that was closed says nothing, and its port neither
    if (lender !== undefined && !(await isOpen(lender))) app = undefined;
    app ??= connect();
    return await (await app).fetch(request);
  } catch {
    app = undefined;
    const message = "No page of this site has a model open: open one, then ask again.";
    const error = { message, type: "server_error", param: null, code: "no_engine" };
    return Response.json({ error }, { status: 503, headers: { "Retry-After": "5" } });
  }
}

async function keepMissing(urls: readonly string[]): Promise<void> {
  const cache = await caches.open(runtimeCache);
  for (const url of urls) if (!(await cache.match(url))) await cache.add(url);
}

self.addEventListener("fetch", (event) => {
  const { request } = event;
  const url = new URL(request.url);
  if (url.origin !== self.location.origin) return;
  if (/(^|\/)v1\//.test(url.pathname) && !request.headers.has(FOR_THE_HOST)) {
    event.respondWith(answer(request));
    return;
  }
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
