/** Loads exactly one onnxruntime-web build, with its .mjs and .wasm from the page's own host. */
import type * as Ort from "onnxruntime-common";
import { NibbleError } from "../errors.ts";
import type { BuildChoice, OrtBuild } from "./device.ts";

export type OrtModule = typeof Ort;

/** The pair of files behind each build, as they are named in onnxruntime-web/dist. */
export const ortFiles: Readonly<Record<OrtBuild, { readonly mjs: string; readonly wasm: string }>> = {
  wasm: { mjs: "ort-wasm-simd-threaded.mjs", wasm: "ort-wasm-simd-threaded.wasm" },
  "webgpu-jspi": { mjs: "ort-wasm-simd-threaded.jspi.mjs", wasm: "ort-wasm-simd-threaded.jspi.wasm" },
  "webgpu-asyncify": { mjs: "ort-wasm-simd-threaded.asyncify.mjs", wasm: "ort-wasm-simd-threaded.asyncify.wasm" },
};

function importBuild(build: OrtBuild): Promise<OrtModule> {
  if (build === "wasm") return import("onnxruntime-web/wasm");
  if (build === "webgpu-jspi") return import("onnxruntime-web/jspi");
  return import("onnxruntime-web/webgpu");
}

let loaded: { build: OrtBuild; ort: OrtModule } | undefined;

/**
 * The runtime for a choice. One worker holds one build for its life: another one needs another worker.
 * @param ortUrl folder that serves the files of `ortFiles`, absolute.
 */
export async function loadOrt({ build, threads }: BuildChoice, ortUrl: string): Promise<OrtModule> {
  if (loaded && loaded.build !== build) {
    throw new NibbleError("unsupported", `This worker runs the ${loaded.build} build; start another for ${build}.`);
  }
  if (loaded) return loaded.ort;
  const ort = await importBuild(build);
  const folder = ortUrl.endsWith("/") ? ortUrl : `${ortUrl}/`;
  ort.env.wasm.wasmPaths = { mjs: folder + ortFiles[build].mjs, wasm: folder + ortFiles[build].wasm };
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error";
  loaded = { build, ort };
  return ort;
}
