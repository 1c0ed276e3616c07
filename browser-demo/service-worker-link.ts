/** The page's side of the service worker: registering it, keeping ONNX Runtime offline, lending it the engine. */
import type { OrtBuild } from "../src/web/device.ts";
import { ortFiles } from "../src/web/ort.ts";

/** Messages to and from the service worker. */
export type ToServiceWorker =
  | { readonly kind: "keep"; readonly urls: readonly string[] }
  /** Without a port: the page that was asked has no model open. */
  | { readonly kind: "engine"; readonly port: MessagePort | undefined }
  /** Another model was opened, or none is any more. */
  | { readonly kind: "changed" };
export interface FromServiceWorker {
  readonly kind: "need-engine";
}

/** A request to /v1 with this header is for the host, not for the engine in the page. */
export const FOR_THE_HOST = "x-nibble-run";

let registration: Promise<ServiceWorkerRegistration> | undefined;

/**
 * Registers it (a built page on https or localhost only).
 * @param lend gives the engine's port when the service worker asks for it, undefined with no model open.
 */
export function registerServiceWorker(lend: () => MessagePort | undefined): void {
  if (import.meta.env.DEV || !("serviceWorker" in navigator)) return;
  registration = navigator.serviceWorker.register("./sw.js").then(() => navigator.serviceWorker.ready);
  registration.catch(() => undefined); // storage is blocked: the page works, only not offline
  navigator.serviceWorker.addEventListener("message", ({ data, source }: MessageEvent<FromServiceWorker>) => {
    if (data.kind !== "need-engine") return;
    const port = lend();
    const answer: ToServiceWorker = { kind: "engine", port };
    source?.postMessage(answer, { transfer: port ? [port] : [] });
  });
}

/** Tells it that the engine it may have a port to is gone. */
export async function engineChanged(): Promise<void> {
  const message: ToServiceWorker = { kind: "changed" };
  (await registration?.catch(() => undefined))?.active?.postMessage(message);
}

/** Asks it to keep the runtime that was just loaded, so that the next visit needs no network. */
export async function keepRuntimeOffline(build: OrtBuild): Promise<void> {
  if (!registration) return;
  const { mjs, wasm } = ortFiles[build];
  const urls = [mjs, wasm].map((name) => new URL(`ort/${name}`, document.baseURI).href);
  const message: ToServiceWorker = { kind: "keep", urls };
  const ready = await registration.catch(() => undefined);
  ready?.active?.postMessage(message);
}
