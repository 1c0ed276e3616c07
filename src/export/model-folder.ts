/** Names in a model folder: transformers.js' layout, and nibble.json beside it. */
import type { WeightFormat } from "./weight-formats.ts";

/** transformers.js' dtype names that Nibble writes, and the suffix of their file. */
export const FILE_SUFFIX = {
  fp32: "",
  fp16: "_fp16",
  q4: "_q4",
  q4f16: "_q4f16",
  q2: "_q2",
  q2f16: "_q2f16",
  int8: "_int8",
  /** Weights and activations in 8 bits, on integer kernels; what transformers.js takes by default on WASM. */
  q8: "_quantized",
} as const;
export type ModelDtype = keyof typeof FILE_SUFFIX;

export const GRAPH_FOLDER = "onnx";
export const MANIFEST = "nibble.json";

/** "onnx/model_q4.onnx", "onnx/model_q4.kv-int8.onnx" */
export function graphPath(dtype: ModelDtype, variant?: string): string {
  return `${GRAPH_FOLDER}/model${FILE_SUFFIX[dtype]}${variant ? `.${variant}` : ""}.onnx`;
}

/** Side files of a checkpoint that go along unchanged. */
export const SIDE_FILES: readonly string[] = [
  "generation_config.json",
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "chat_template.jinja",
  "chat_template.json",
  "LICENSE",
  "LICENSE.md",
  "LICENSE.txt",
  "NOTICE",
];

export interface FileRecord {
  readonly sizeBytes: number;
  readonly sha256: string;
}

/** nibble.json: what was done, from what, and what came out. No times and no paths: equal work gives equal bytes. */
export interface Manifest {
  readonly format: 1;
  /** Version of nibble-llm. */
  readonly nibble: string;
  readonly modelType: string;
  readonly dtype: ModelDtype;
  /** The graph that other consumers open, and those that share its weights by what they are for. */
  readonly graph: string;
  readonly variants: Readonly<Record<string, string>>;
  /** Longest text: rows of the position tables. */
  readonly contextLength: number;
  readonly source: {
    readonly name: string;
    readonly files: readonly { readonly name: string; readonly sizeBytes: number; readonly sha256: string }[];
    readonly notes: readonly string[];
  };
  /** Method, bits, groups, calibration text and its hash; absent for a float export. */
  readonly recipe?: Readonly<Record<string, unknown>>;
  /** How the quantized products are stored, and the bits that a weight takes; absent for a float export. */
  readonly weights?: readonly WeightFormat[];
  /** Static data that KV policies need (int8 scales), by policy. */
  readonly kv?: Readonly<Record<string, unknown>>;
  /** What equal bytes depend on beside input and recipe. */
  readonly environment?: {
    /** onnxruntime-node's version. */
    readonly onnxruntime: string;
    readonly node: string;
    /** "linux-x64" */
    readonly platform: string;
    /** CPU threads asked for; absent = ONNX Runtime's choice, one per core. */
    readonly threads?: number;
  };
  /** Filled by the check after export. */
  readonly measured?: Readonly<Record<string, unknown>>;
  /** Every other file of the folder. */
  readonly files: Readonly<Record<string, FileRecord>>;
}
