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

/** Where a session's entries wait for the runtime's module: on the worker's own global object. */
const CONFIG = "nibbleSessionConfig";

/**
 * A module around the runtime's that puts entries into a session's configuration before a provider is appended, which is
 * when WebGPU reads them; ONNX Runtime Web has no option for those.
 */
function configuringModule(mjs: string): string {
  const text = `import factory from ${JSON.stringify(mjs)};
export default async (options) => {
  const module = await factory(options);
  const append = module._OrtAppendExecutionProvider;
  const put = (text) => {
    const size = module.lengthBytesUTF8(text) + 1;
    const at = module._malloc(size);
    module.stringToUTF8(text, at, size);
    return at;
  };
  module._OrtAppendExecutionProvider = (session, ...rest) => {
    const entries = globalThis.${CONFIG} ?? [];
    globalThis.${CONFIG} = undefined;
    for (const [key, value] of entries) {
      const [name, text] = [put(key), put(value)];
      const failed = module._OrtAddSessionConfigEntry(session, name, text);
      module._free(name);
      module._free(text);
      if (failed) throw new Error("the session's configuration takes no " + key);
    }
    return append(session, ...rest);
  };
  return module;
};`;
  return URL.createObjectURL(new Blob([text], { type: "text/javascript" }));
}

/** `create` with entries for the session that it makes; the runtime was loaded with `configurable`. */
export async function withSessionConfig<T>(
  entries: readonly (readonly [string, string])[],
  create: () => Promise<T>,
): Promise<T> {
  const place = globalThis as { [CONFIG]?: readonly (readonly [string, string])[] };
  place[CONFIG] = entries;
  try {
    const made = await create();
    if (place[CONFIG] === undefined) return made;
    throw new NibbleError("unsupported", `This runtime did not take ${entries.map(([key]) => key).join(", ")}.`);
  } finally {
    place[CONFIG] = undefined;
  }
}

let loaded: { build: OrtBuild; configurable: boolean; ort: OrtModule } | undefined;

/**
 * The runtime for a choice. One worker holds one build for its life: another one needs another worker.
 * @param ortUrl folder that serves the files of `ortFiles`, absolute
 * @param configurable sessions may have entries of `withSessionConfig`: takes a module from a blob
 */
export async function loadOrt(
  { build, threads }: BuildChoice,
  ortUrl: string,
  configurable = false,
): Promise<OrtModule> {
  if (loaded && loaded.build !== build) {
    throw new NibbleError("unsupported", `This worker runs the ${loaded.build} build; start another for ${build}.`);
  }
  if (configurable && loaded && !loaded.configurable) {
    throw new NibbleError(
      "unsupported",
      "This worker's runtime takes no session entries; start another for int8 keys.",
    );
  }
  if (loaded) return loaded.ort;
  const ort = await importBuild(build);
  const folder = ortUrl.endsWith("/") ? ortUrl : `${ortUrl}/`;
  const mjs = folder + ortFiles[build].mjs;
  ort.env.wasm.wasmPaths = { mjs: configurable ? configuringModule(mjs) : mjs, wasm: folder + ortFiles[build].wasm };
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error";
  loaded = { build, configurable, ort };
  return ort;
}
