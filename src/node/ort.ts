/** ONNX Runtime for an engine's worker: which binding, which provider, how many threads. */
import type { InferenceSession } from "onnxruntime-common";
import { NibbleError } from "../errors.ts";
import type { Ort } from "../onnx/ort.ts";
import type { Binding } from "./binding.ts";

export interface OpenSessionOptions {
  readonly device: "cpu" | "webgpu";
  readonly threads?: number;
}

export function sessionOptions({ device, threads }: OpenSessionOptions): InferenceSession.SessionOptions {
  return {
    executionProviders: [device],
    graphOptimizationLevel: "all",
    // warnings of the graph optimizer (initializers it removed) are nobody's business; errors arrive as exceptions
    logSeverityLevel: 3,
    ...(threads === undefined ? {} : { intraOpNumThreads: threads }),
  };
}

/** Loads one binding and not the other. */
export async function ortFor(binding: Binding): Promise<Ort> {
  if (binding === "capi") return (await import("./capi.ts")).capiOrt();
  return (await import("onnxruntime-node")) as unknown as Ort;
}

/** A session on a graph file; errors: `engine` with the runtime's own words. */
export async function openSession(ort: Ort, path: string, options: OpenSessionOptions): Promise<InferenceSession> {
  try {
    return await ort.InferenceSession.create(path, sessionOptions(options));
  } catch (cause) {
    const message = cause instanceof Error ? cause.message : String(cause);
    const hint = options.device === "webgpu" ? " Without a GPU that WebGPU can use, --device cpu runs it." : "";
    throw new NibbleError("engine", `${path} could not be opened on ${options.device}: ${message}${hint}`, { cause });
  }
}
