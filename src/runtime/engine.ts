/**
 * What a loaded model offers, whatever runs it (onnxruntime-node in a worker, the C API, onnxruntime-web): the
 * interface of the server, the CLI and the page. Implementations: `src/node/engine.ts`, `browser-demo/worker.ts`.
 */

import type { GrammarSpec } from "../grammar/spec.ts";
import type { ChatMessage, ChatTemplateOptions, Tokenizer } from "../tokenizer/tokenizer.ts";

export interface SamplingOptions {
  /** 0 is greedy. Default: the model's generation_config, else 1. */
  readonly temperature?: number;
  /** Keep the k likeliest; 0 keeps all. */
  readonly topK?: number;
  readonly topP?: number;
  readonly minP?: number;
  /** CTRL's (1909.05858): logits of seen tokens divided (positive) or multiplied (negative) by this; prompt included. */
  readonly repetitionPenalty?: number;
  /** OpenAI's: subtracted once from every generated token's logit. */
  readonly presencePenalty?: number;
  /** OpenAI's: subtracted once per occurrence among the generated tokens. */
  readonly frequencyPenalty?: number;
  /** Added to the logit of a token id, -100 .. 100. */
  readonly logitBias?: Readonly<Record<number, number>>;
  readonly seed?: number;
}

export type { GrammarSpec, TokenConstraint } from "../grammar/spec.ts";

export interface GenerateOptions extends SamplingOptions {
  readonly maxTokens?: number;
  /** Generation ends before any of these appears in the text. */
  readonly stop?: readonly string[];
  /** Ends generation like the model's own end tokens. */
  readonly stopTokens?: readonly number[];
  readonly ignoreEos?: boolean;
  /** Report the log-probability of each token and of this many alternatives (0 to 20). */
  readonly topLogprobs?: number;
  /** Also score the prompt's own tokens (completions with echo and logprobs). */
  readonly promptLogprobs?: boolean;
  readonly grammar?: GrammarSpec;
  /** Keep special tokens in the text (default: left out). */
  readonly keepSpecialTokens?: boolean;
  readonly signal?: AbortSignal;
}

export interface TokenLogprob {
  readonly id: number;
  /** Natural logarithm of the probability, before temperature and truncation. */
  readonly logprob: number;
}

export interface GeneratedToken extends TokenLogprob {
  readonly top: readonly TokenLogprob[];
}

export type FinishReason = "stop" | "length" | "aborted";

export interface Usage {
  readonly promptTokens: number;
  /** Prompt tokens whose keys and values were already there. */
  readonly cachedTokens: number;
  readonly completionTokens: number;
}

/** One step of a stream: `text` never splits a character; the last piece has `finish` and `usage`. */
export interface Piece {
  readonly text: string;
  /** Ids that this step made; several where text was held back for a stop string or an unfinished character. */
  readonly tokens: readonly number[];
  /** As many as `tokens`, where asked for. */
  readonly logprobs?: readonly GeneratedToken[];
  /** On the first piece, where `promptLogprobs` was asked for: one per prompt token but the first. */
  readonly promptLogprobs?: readonly GeneratedToken[];
  readonly finish?: FinishReason;
  /** The stop string that ended it, where one did. */
  readonly stopString?: string;
  readonly usage?: Usage;
  readonly timings?: Timings;
}

export interface Timings {
  readonly prefillMs: number;
  readonly decodeMs: number;
}

export interface EngineInfo {
  /** Folder name or hub id; what `/v1/models` lists. */
  readonly id: string;
  readonly modelType: string;
  /** File that runs: "onnx/model_q4.onnx". */
  readonly file: string;
  /** Tokens of prompt and answer together. */
  readonly contextLength: number;
  readonly vocabSize: number;
  /** "node-cpu", "node-cpu-capi", "wasm", "webgpu", ... */
  readonly binding: string;
  /** KV number format and policy, "fp32" / "full". */
  readonly kv: {
    readonly format: string;
    readonly policy: string;
    /** What a policy that forgets keeps, in words. */
    readonly keeps?: string;
  };
  /** In Node: "int8" where pieces of prompts have int8 weights of their own, "stored" where they have those of the file. */
  readonly promptProducts?: "int8" | "stored";
  readonly memory: MemoryUse;
  /** How many requests decode together at most. */
  readonly maxBatch: number;
}

export interface MemoryUse {
  readonly weightBytes: number;
  readonly kvBytesPerToken: number;
  readonly kvBytesAllocated: number;
}

export interface EngineStats {
  readonly running: number;
  readonly waiting: number;
  readonly generatedTokens: number;
  readonly promptTokens: number;
  readonly cachedTokens: number;
}

export interface Engine {
  readonly info: EngineInfo;
  readonly tokenizer: Tokenizer;
  /** Generates after these token ids. Errors arrive as NibbleError from the iterator: `context_length`, `overloaded`, ... */
  generate(prompt: readonly number[], options?: GenerateOptions): AsyncIterable<Piece>;
  /** Renders the chat template, then generates. */
  chat(messages: readonly ChatMessage[], options?: GenerateOptions & ChatTemplateOptions): AsyncIterable<Piece>;
  /** Mean-pooled, L2-normalised final hidden states, one vector per prompt. */
  embed(prompts: readonly (readonly number[])[]): Promise<Float32Array[]>;
  stats(): EngineStats;
  dispose(): Promise<void>;
}
