/** The page's state: the engine's worker, the model in it, what is stored, and what went wrong. */
import { NibbleError } from "../src/errors.ts";
import { EngineWorker } from "../src/web/client.ts";
import type { DeviceReport } from "../src/web/device.ts";
import type { LoadEvent, LoadedModel, LoadRequest } from "../src/web/protocol.ts";
import type { ModelSource } from "../src/web/remote.ts";
import type { StoredModel } from "../src/web/store.ts";
import type { PageMethods } from "./protocol.ts";
import { findServer, type ServedModel, type ServerInfo } from "./server-backend.ts";
import { engineChanged, keepRuntimeOffline } from "./service-worker-link.ts";
import { change, settings } from "./settings.ts";
import { announce, Signal } from "./ui/dom.ts";

export interface Loading {
  readonly name: string;
  readonly event: LoadEvent | undefined;
  cancel(): void;
}

export interface Problem {
  readonly message: string;
  /** One click that sets it right. */
  readonly remedy?: { readonly label: string; run(): void };
}

export const device = new Signal<DeviceReport | undefined>(undefined);
export const model = new Signal<LoadedModel | undefined>(undefined);
export const loading = new Signal<Loading | undefined>(undefined);
/** Until it is known whether a server answers here, or a model of an earlier visit. */
export const starting = new Signal(true);
export const problem = new Signal<Problem | undefined>(undefined);
export const stored = new Signal<readonly StoredModel[]>([]);
/** An answer is being made: the worker may be silent for long. */
export const busy = new Signal(false);
export const server = new Signal<ServerInfo | undefined>(undefined);

/** Something that answers may be there soon: it is looked for, or being opened. */
export function isComing(): boolean {
  return starting.value || loading.value !== undefined;
}

/** The server's model that answers, or undefined where answers are made in the page. */
export function answeringServed(): ServedModel | undefined {
  const { runOn, servedModel } = settings.value;
  const models = runOn === "page" ? [] : (server.value?.models ?? []);
  return models.find(({ id }) => id === servedModel) ?? models[0];
}

/** The model that ships with the page. */
export const shippedModel = { name: "stories260K", url: new URL("models/stories260k/", document.baseURI).href };
export const ortUrl = new URL("ort/", document.baseURI).href;

/** A worker like the one below: Compare starts its own. */
export function startWorker(): Worker {
  return new Worker(new URL("./worker.ts", import.meta.url), { type: "module", name: "nibble" });
}

export const engine = new EngineWorker<PageMethods>(startWorker, (error) => {
  model.value = undefined;
  problem.value = { message: error.message, remedy: { label: "Load the model again", run: recover } };
});

export async function refreshStored(): Promise<void> {
  stored.value = await engine.rpc.call("models", undefined).catch(() => []);
}

/** What the server tells of its models now. */
export async function refreshServer(): Promise<void> {
  server.value = (await findServer()) ?? server.value;
}

export async function removeStored(id: string): Promise<void> {
  if (model.value?.stored.id === id) unload();
  await engine.rpc.call("remove", id);
  if (settings.value.lastModel === id) change({ lastModel: "" });
  await refreshStored();
}

/** Deletes what was computed of prompts, of these stored models or of all. */
export async function forgetPrompts(ids?: readonly string[]): Promise<void> {
  await refreshStored();
  const kept = stored.value.filter(({ promptBytes }) => promptBytes > 0).map(({ id }) => id);
  for (const id of ids ?? kept) await engine.rpc.call("forgetPrompts", id).catch(() => undefined);
  await refreshStored();
}

export function unload(): void {
  engine.terminate();
  model.value = undefined;
}

/** Downloads what is missing and opens a model; problems go to `problem`. */
export async function load(source: LoadRequest["source"], name: string, graph?: string): Promise<void> {
  loading.value?.cancel();
  model.value = undefined;
  const { device: wish, context } = settings.value;
  const request = { source, device: wish, graph, context: context || undefined, ortUrl };
  await run(
    name,
    (options) => engine.load(request, options),
    () => load(source, name, graph),
  );
}

export function loadSource(source: ModelSource): Promise<void> {
  const folder = (url: string) => url.split("/").filter(Boolean).at(-1) ?? url;
  const name = source.kind === "url" ? folder(source.url) : source.kind === "hub" ? source.id : source.name;
  return load(source, name);
}

/** The same model in a fresh worker: after a lost device, a full memory, a sleep that killed it. */
export async function recover(): Promise<void> {
  model.value = undefined;
  await run("the model", (options) => engine.reload(options), recover);
}

async function run(
  name: string,
  start: (options: { onEvent: (event: LoadEvent) => void; signal: AbortSignal }) => Promise<LoadedModel>,
  again: () => void,
): Promise<void> {
  const control = new AbortController();
  const cancel = () => control.abort();
  problem.value = undefined;
  const mine: Loading = { name, event: undefined, cancel };
  loading.value = mine;
  const onEvent = (event: LoadEvent) => {
    if (!control.signal.aborted) loading.value = { name, event, cancel };
  };
  try {
    const loaded = await start({ onEvent, signal: control.signal });
    model.value = loaded;
    // where a server answers too, this says who does
    change({ lastModel: loaded.stored.id, ...(server.value && { runOn: "page" }) });
    announce(`${loaded.info.id} is ready`);
    await keepRuntimeOffline(loaded.choice.build);
    await navigator.storage.persist?.();
  } catch (error) {
    const { code, message } = error as NibbleError;
    if (code !== "aborted") {
      const resumes = code === "network";
      problem.value = { message, remedy: { label: resumes ? "Resume" : "Try again", run: again } };
    }
  } finally {
    if (loading.value?.cancel === cancel) loading.value = undefined;
    await refreshStored();
  }
}

/** Says what an answer died of, and offers the engine again where it is gone. */
export function report(error: unknown): string {
  const { code, message } =
    error instanceof NibbleError ? error : new NibbleError("engine", (error as Error).message ?? String(error));
  if (code === "engine") problem.value = { message, remedy: { label: "Load the model again", run: recover } };
  return message;
}

model.watch(() => void engineChanged());

/** After so long out of sight the browser may have ended the worker or taken its GPU. */
const SLEEP_MS = 30_000;
const SIGN_OF_LIFE_MS = 10_000;
let hiddenAt = 0;

document.addEventListener("visibilitychange", () => {
  if (document.hidden) hiddenAt = Date.now();
  else if (Date.now() - hiddenAt > SLEEP_MS && !busy.value) void engine.check(SIGN_OF_LIFE_MS);
});

/** What a visit starts with: the device, the models there are, the last one opened again. */
export async function start(): Promise<void> {
  const probe = engine.rpc.call("probe", undefined).catch(() => undefined); // a worker that died says so itself
  const probed = probe.then((found) => (device.value = found));
  await Promise.all([refreshServer(), refreshStored()]);
  const last = stored.value.find(({ id, complete }) => id === settings.value.lastModel && complete);
  if (last && !answeringServed()) {
    await probed;
    await load({ kind: "stored", id: last.id }, last.id);
  }
  starting.value = false;
}
