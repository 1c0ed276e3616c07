/** ONNX Runtime as it is handed in: onnxruntime-node in Node, onnxruntime-web in a page. */
import type { InferenceSession, Tensor } from "onnxruntime-common";

/** What of the module the core uses. */
export interface Ort {
  readonly InferenceSession: {
    create(bytes: Uint8Array, options?: InferenceSession.SessionOptions): Promise<InferenceSession>;
    create(path: string, options?: InferenceSession.SessionOptions): Promise<InferenceSession>;
  };
  readonly Tensor: new (type: Tensor.Type, data: Tensor.DataType, dims: readonly number[]) => Tensor;
}
