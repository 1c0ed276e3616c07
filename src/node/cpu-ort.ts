/** onnxruntime-node as quantization and evaluation take it. */
import * as onnxRuntime from "onnxruntime-node";
import type { Ort } from "../onnx/ort.ts";

/** @param threads for every session that does not say; default: ONNX Runtime's own choice, one per core. */
export function cpuOrt(threads?: number): Ort {
  if (threads === undefined) return onnxRuntime as Ort;
  const { InferenceSession, Tensor } = onnxRuntime as Ort;
  const create = (model: Uint8Array | string, options: object = {}) =>
    InferenceSession.create(model as Uint8Array, { intraOpNumThreads: threads, ...options });
  return { InferenceSession: { create }, Tensor };
}
