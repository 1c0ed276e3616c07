/** What a page and the worker that owns its engine say to each other. */
import type { EngineInfo, EngineStats, GenerateOptions, Piece } from "../runtime/engine.ts";
import type { ChatMessage, ChatTemplateOptions } from "../tokenizer/tokenizer.ts";
import type { CacheWish } from "./cache-choice.ts";
import type { BuildChoice, DeviceReport, DeviceWish } from "./device.ts";
import type { ModelSource } from "./remote.ts";
import type { DownloadProgress, StoredModel } from "./store.ts";

/** Something that takes no event, no parameter or gives no result. */
type Nothing = undefined;

export interface LoadRequest extends CacheWish {
  /** Where to take it from; `stored` opens what is in OPFS and needs no network. */
  readonly source: ModelSource | { readonly kind: "stored"; readonly id: string };
  readonly device: DeviceWish;
  /** The graph to run, "onnx/model_q4.onnx"; default: the best one the device runs. */
  readonly graph?: string;
  /** Tokens of prompt and answer; default: the model's own, at most 4096. */
  readonly context?: number;
  readonly threads?: number;
  /** Run a 4-bit graph on WASM as it is stored, not as its integer twin: slower, float32 activations. */
  readonly asStored?: boolean;
  /** WebGPU: new cache buffers from every run instead of ones that are written in place; slower, for comparing. */
  readonly growingCache?: boolean;
  /** Of what was computed of prompts, kept in OPFS for later visits; 0 keeps nothing, default 256 MiB. */
  readonly prefixCacheBytes?: number;
  /** Folder with the .mjs and .wasm files of onnxruntime-web, absolute. */
  readonly ortUrl: string;
}

export type LoadEvent =
  | { readonly stage: "look"; readonly choice: BuildChoice }
  | { readonly stage: "download"; readonly progress: DownloadProgress }
  /** Matrices expanded for WASM, once for a model. */
  | { readonly stage: "prepare"; readonly done: number; readonly total: number }
  | { readonly stage: "runtime" }
  | { readonly stage: "session" };

export interface LoadedModel {
  readonly info: EngineInfo;
  readonly choice: BuildChoice;
  readonly hasChatTemplate: boolean;
  readonly loadMs: number;
  /** What the cache keeps, in words, where it forgets; and what runs otherwise than it might be expected. */
  readonly notes: readonly string[];
  readonly stored: StoredModel;
}

/** Text to go on from, ids, or a conversation. */
export type Prompt =
  | { readonly kind: "chat"; readonly messages: readonly ChatMessage[]; readonly template?: ChatTemplateOptions }
  | { readonly kind: "text"; readonly text: string }
  | { readonly kind: "ids"; readonly ids: readonly number[] };

export type GenerateRequest = { readonly prompt: Prompt; readonly options: Omit<GenerateOptions, "signal"> };

export interface ModelPeek {
  readonly id: string;
  readonly origin: string;
  readonly downloadBytes: number;
  readonly graphs: readonly string[];
}

/** Requests that an engine answers, whoever holds the port: the page, or the service worker with its /v1 routes. */
export interface EngineMethods {
  readonly info: { params: Nothing; result: EngineInfo; event: never };
  /** The tokenizer's own files: the other side builds its own, so encoding needs no message. */
  readonly tokenizerFiles: { params: Nothing; result: ReadonlyMap<string, Uint8Array>; event: never };
  readonly generate: { params: GenerateRequest; result: Nothing; event: Piece };
  readonly embed: { params: readonly (readonly number[])[]; result: Float32Array[]; event: never };
  readonly stats: { params: Nothing; result: EngineStats; event: never };
}

export interface WorkerMethods extends EngineMethods {
  readonly probe: { params: Nothing; result: DeviceReport; event: never };
  readonly peek: { params: ModelSource; result: ModelPeek; event: never };
  readonly load: { params: LoadRequest; result: LoadedModel; event: LoadEvent };
  readonly models: { params: Nothing; result: StoredModel[]; event: never };
  /** Graphs of a stored model that share its weights: its KV caches. */
  readonly graphs: { params: string; result: string[]; event: never };
  readonly remove: { params: string; result: Nothing; event: never };
  /** Deletes what was computed of a stored model's prompts. */
  readonly forgetPrompts: { params: string; result: Nothing; event: never };
  /** Serves EngineMethods on this port too. */
  readonly connect: { params: MessagePort; result: Nothing; event: never };
}
