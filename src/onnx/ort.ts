/** ONNX Runtime as it is handed in: onnxruntime-node in Node, onnxruntime-web in a page. */
import type { InferenceSession, Tensor } from "onnxruntime-common";
import { NibbleError } from "../errors.ts";

/** Constants of a graph by name, on memory that the session reads for as long as it lives. */
export type Lent = Readonly<Record<string, Tensor>>;

export interface SessionOptions extends InferenceSession.SessionOptions {
  /** Constants without a copy, beside others that a folder holds; only for a module that `lends`. */
  readonly lent?: Lent;
}

/** What of the module the core uses. */
export interface Ort {
  readonly lends?: boolean;
  readonly InferenceSession: {
    create(bytes: Uint8Array, options?: SessionOptions): Promise<InferenceSession>;
    create(path: string, options?: SessionOptions): Promise<InferenceSession>;
  };
  readonly Tensor: new (type: Tensor.Type, data: Tensor.DataType, dims: readonly number[]) => Tensor;
}

/** The typed array that ONNX Runtime's JavaScript API takes for an element type; float16 as bit patterns. */
export function typedArray(type: Tensor.Type, length: number): Tensor.DataType {
  switch (type) {
    case "float32":
      return new Float32Array(length);
    case "float16":
      return new Uint16Array(length);
    case "float64":
      return new Float64Array(length);
    case "int64":
      return new BigInt64Array(length);
    case "int32":
      return new Int32Array(length);
    case "int8":
      return new Int8Array(length);
    case "uint8":
    case "bool":
      return new Uint8Array(length);
    default:
      throw new NibbleError("unsupported", `A tensor of type ${type}: no model input that Nibble fills has this type.`);
  }
}
