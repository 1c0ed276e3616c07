/** What the main thread and the worker that owns a model say to each other. */
import type { ErrorCode } from "../errors.ts";
import { NibbleError } from "../errors.ts";
import type { EvictionPlan } from "../kv/eviction.ts";
import type { WindowPolicy } from "../kv/window.ts";
import type { EngineInfo, EngineStats, GenerateOptions, Piece } from "../runtime/engine.ts";
import type { Binding } from "./binding.ts";
import type { DraftSetup } from "./draft.ts";
import type { PromptProducts } from "./prompt-choice.ts";

export interface WorkerSetup {
  readonly folder: string;
  readonly id: string;
  readonly device: "cpu" | "webgpu";
  readonly threads?: number;
  readonly graph: string;
  readonly promptProducts: PromptProducts;
  /** Tokens that a row of the cache holds at most. */
  readonly contextLength: number;
  readonly window?: WindowPolicy;
  readonly eviction?: EvictionPlan;
  readonly chatTemplate?: string;
  readonly binding: Binding;
  readonly maxBatch: number;
  readonly maxWaiting: number;
  readonly maxKvBytes: number;
  readonly prefixCacheBytes: number;
  /** Folder and bytes of the prefix cache on disk. */
  readonly prefixFiles?: { readonly dir: string; readonly maxBytes: number };
  readonly speculate: boolean;
  readonly draft?: DraftSetup;
}

export type ToWorker =
  | {
      readonly kind: "generate";
      readonly request: number;
      readonly prompt: readonly number[];
      readonly options: GenerateOptions;
    }
  | { readonly kind: "abort"; readonly request: number }
  | { readonly kind: "embed"; readonly request: number; readonly prompts: readonly (readonly number[])[] }
  /** An answer's first piece was handed on. */
  | { readonly kind: "heard" }
  | { readonly kind: "close" };

export type FromWorker =
  | { readonly kind: "ready"; readonly info: Omit<EngineInfo, "memory">; readonly kvBytesPerToken: number }
  | { readonly kind: "failed"; readonly error: WireError }
  | { readonly kind: "piece"; readonly request: number; readonly piece: Piece; readonly first: boolean }
  | { readonly kind: "vectors"; readonly request: number; readonly vectors: Float32Array[] }
  | { readonly kind: "error"; readonly request: number; readonly error: WireError }
  | { readonly kind: "note"; readonly note: string }
  | { readonly kind: "stats"; readonly stats: EngineStats; readonly kvBytesAllocated: number };

export interface WireError {
  readonly code: ErrorCode;
  readonly message: string;
  readonly param?: string;
}

export function toWire(error: unknown): WireError {
  if (error instanceof NibbleError) return { code: error.code, message: error.message, param: error.param };
  return { code: "engine", message: error instanceof Error ? error.message : String(error) };
}

export function fromWire({ code, message, param }: WireError): NibbleError {
  return new NibbleError(code, message, { param });
}
