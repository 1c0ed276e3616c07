/** What the page asks of its worker: all that `nibble-llm/web` does, and quantizing. */
import type { WorkerMethods } from "../src/web/protocol.ts";
import type { StoredModel } from "../src/web/store.ts";

export interface QuantizeRequest {
  readonly name: string;
  readonly files: ReadonlyMap<string, File>;
  readonly method: "rtn" | "gptq" | "awq";
  readonly bits: 4;
  readonly groupSize: number;
  /** Calibration text of the user's, in the place of the one that ships. */
  readonly text?: File;
  /** Folder with the calibration texts that ship with the page. */
  readonly textUrl: string;
  readonly ortUrl: string;
}

export interface QuantizeEvent {
  readonly stage: string;
  readonly done: number;
  readonly total: number;
  /** A layer that was just done, and its error relative to the float layer's output. */
  readonly layer?: { readonly name: string; readonly error: number | undefined };
}

/** A question to stock transformers.js, about a model that is stored in this browser. */
export interface PeerRequest {
  readonly id: string;
  /** "onnx/model_q4.onnx" */
  readonly graph: string;
  readonly prompt: string;
  readonly maxTokens: number;
  readonly threads: number;
  /** Folder with transformers.js and its runtime. */
  readonly peersUrl: string;
}

export interface PeerAnswer {
  readonly ids: readonly number[];
  /** Text after each id. */
  readonly texts: readonly string[];
  readonly loadMs: number;
  readonly firstTokenMs: number;
  readonly decodeMs: number;
}

export interface PeerMethods {
  readonly answer: { params: PeerRequest; result: PeerAnswer; event: string };
}

export interface PageMethods extends WorkerMethods {
  readonly quantize: { params: QuantizeRequest; result: StoredModel; event: QuantizeEvent };
}
