/** The server in Node: listens, answers, and ends in order on SIGTERM or SIGINT. */
import { type Server, ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { createAdaptorServer } from "@hono/node-server";
import { RESPONSE_ALREADY_SENT } from "@hono/node-server/utils/response";
import { NibbleError } from "../src/errors.ts";
import { hasPage } from "../src/node/page.ts";
import { createApp } from "./app.ts";
import type { RequestLog } from "./context.ts";
import { formatLog } from "./log.ts";
import { ModelRegistry, type ModelSource, type RegistryOptions } from "./models.ts";
import { prometheusMetrics } from "./node/metrics.ts";
import { pageFiles } from "./node/page-files.ts";
import { chunkSocket, sendText } from "./node/send-text.ts";
import type { SecurityOptions } from "./security.ts";
import { textOf } from "./sse.ts";

export interface ServeOptions extends SecurityOptions, RegistryOptions {
  readonly models: readonly ModelSource[];
  /** Default 8080; 0 takes a free one. */
  readonly port?: number;
  /** Default 127.0.0.1: only this machine. */
  readonly host?: string;
  /** How long running answers may take after the first signal. */
  readonly drainMs?: number;
  readonly maxBodyBytes?: number;
  /** A comment on event streams after this long without an event. */
  readonly keepAliveMs?: number;
  readonly log?: (line: RequestLog) => void;
}

export interface RunningServer {
  readonly url: string;
  readonly port: number;
  /** Takes no more requests, lets running ones end, then unloads the models. */
  close(): Promise<void>;
  /** Resolves when it has ended, whoever ended it. */
  readonly closed: Promise<void>;
}

export const DEFAULT_PORT = 8080;
export const DEFAULT_HOST = "127.0.0.1";
const DEFAULT_DRAIN_MS = 30_000;

/** A client has this long to send its headers and its body: a slow one holds no connection for ever. */
const HEADERS_TIMEOUT_MS = 20_000;
const REQUEST_TIMEOUT_MS = 120_000;
/** How late such a limit may be noticed; Node's own 30 s would more than double the first. */
const CONNECTION_CHECK_MS = 2_000;
const KEEP_ALIVE_TIMEOUT_MS = 65_000; // above the 60 s of common proxies, so that they close first
const SWEEP_MS = 50;
const MAX_HEADER_BYTES = 16 * 1024;

/** Listens; the first model is loaded at once, the others when asked for. */
export async function serve(options: ServeOptions): Promise<RunningServer> {
  const { host = DEFAULT_HOST, port = DEFAULT_PORT, drainMs = DEFAULT_DRAIN_MS } = options;
  if (options.models.length === 0)
    throw new NibbleError("bad_option", "There is no model to serve: name at least one.");
  const registry = new ModelRegistry(options.models, options);
  let draining = false;
  const app = createApp({
    ...options,
    models: registry,
    allowedHosts: [...(options.allowedHosts ?? []), host],
    limits: options.maxBodyBytes === undefined ? {} : { maxBodyBytes: options.maxBodyBytes },
    page: hasPage() ? pageFiles(offeredFolders(options)) : undefined,
    metrics: prometheusMetrics(registry),
    draining: () => draining,
  });
  const server = createAdaptorServer({
    fetch: async (request, { outgoing }) => {
      const response = await app.fetch(request);
      const text = response.body && textOf(response.body);
      const socket = outgoing instanceof ServerResponse ? chunkSocket(outgoing) : undefined;
      if (!text || !socket) return response;
      sendText(response, text, outgoing as ServerResponse, socket);
      return RESPONSE_ALREADY_SENT;
    },
    serverOptions: {
      maxHeaderSize: MAX_HEADER_BYTES,
      headersTimeout: HEADERS_TIMEOUT_MS,
      requestTimeout: REQUEST_TIMEOUT_MS,
      connectionsCheckingInterval: CONNECTION_CHECK_MS,
      keepAliveTimeout: KEEP_ALIVE_TIMEOUT_MS,
    },
  }) as Server;
  const active = countRequests(server);
  await listen(server, port, host);
  registry
    .use(undefined)
    .then((lease) => lease.release())
    .catch(() => undefined); // the registry has said so, /health says so, and the next request tries again

  const address = server.address() as AddressInfo;
  let ending: Promise<void> | undefined;
  let ended: () => void = () => undefined;
  const closed = new Promise<void>((resolve) => {
    ended = resolve;
  });
  const close = (): Promise<void> => {
    ending ??= (async () => {
      draining = true;
      await closeServer(server, active, drainMs);
      await registry.dispose();
      ended();
    })();
    return ending;
  };
  const name = address.family === "IPv6" ? `[${address.address}]` : address.address;
  return { url: `http://${name}:${address.port}`, port: address.port, close, closed };
}

/** What pages may fetch and run themselves: nothing where keys say who may use the models. */
function offeredFolders({ models, apiKeys = [] }: ServeOptions): ReadonlyMap<string, string> {
  if (apiKeys.length > 0) return new Map();
  return new Map(models.flatMap(({ id, folder }) => (folder === undefined ? [] : [[id, folder] as const])));
}

function listen(server: Server, port: number, host: string): Promise<void> {
  return new Promise((resolve, reject) => {
    server.once("error", (cause: NodeJS.ErrnoException) => {
      const why = cause.code === "EADDRINUSE" ? "another program uses it; choose one with --port" : cause.message;
      reject(new NibbleError("bad_option", `Cannot listen on ${host}:${port}: ${why}.`, { cause, param: "port" }));
    });
    server.listen(port, host, resolve);
  });
}

/** How many requests are being answered. */
function countRequests(server: Server): () => number {
  let active = 0;
  server.on("request", (_, response) => {
    active++;
    response.once("close", () => active--);
  });
  return () => active;
}

/** No new connections; those without a request are closed as answers end, what still runs after `drainMs` is cut. */
function closeServer(server: Server, active: () => number, drainMs: number): Promise<void> {
  return new Promise((resolve) => {
    const end = performance.now() + drainMs;
    const sweep = setInterval(() => {
      // closeIdleConnections spares connections that never sent a request (browsers open some ahead)
      if (active() === 0 || performance.now() > end) server.closeAllConnections();
      else server.closeIdleConnections();
    }, SWEEP_MS);
    server.close(() => {
      clearInterval(sweep);
      resolve();
    });
  });
}

/** The first SIGTERM or SIGINT ends in order, the second one at once. */
export function closeOnSignals(server: RunningServer, say: (text: string) => void = () => undefined): void {
  let asked = false;
  const onSignal = (signal: NodeJS.Signals): void => {
    if (asked) process.exit(130); // 128 + SIGINT, as shells count
    asked = true;
    say(`${signal}: running answers end, then the server does; once more ends it at once`);
    server.close().catch((error) => say(String(error)));
  };
  process.on("SIGTERM", onSignal);
  process.on("SIGINT", onSignal);
  server.closed.then(() => {
    process.off("SIGTERM", onSignal);
    process.off("SIGINT", onSignal);
  });
}

export { formatLog };
