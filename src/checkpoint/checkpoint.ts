/** A checkpoint as every other part sees it, whatever format it came in: tensors under their Hugging Face names. */
import type { DType, FloatTensor } from "../tensor/dtypes.ts";

export interface TensorInfo {
  readonly name: string;
  /** As stored: a DType, or the GGUF type name ("Q4_K") of a block-quantized tensor. */
  readonly storedAs: DType | (string & {});
  /** Row-major; a linear layer is (outFeatures, inFeatures). */
  readonly shape: readonly number[];
}

/** A file the checkpoint was read from, for the manifest of what is made from it. */
export interface SourceFile {
  readonly name: string;
  readonly sizeBytes: number;
  sha256(): Promise<string>;
}

export interface Checkpoint {
  /** Folder, file or hub id, for messages. */
  readonly name: string;
  /** config.json, or its equivalent made from GGUF or llama2.c metadata; always has `model_type`. */
  readonly config: Readonly<Record<string, unknown>>;
  readonly tensors: ReadonlyMap<string, TensorInfo>;
  /** Dequantized to float32. Errors: `not_found` for an unknown name, `bad_weights` for NaN or infinity. */
  readTensor(name: string): Promise<FloatTensor>;
  /** Rows start .. end-1 (along the first dimension) alone, where a whole tensor is too much memory at once. */
  readRows?(name: string, start: number, end: number): Promise<FloatTensor>;
  /** tokenizer.json, tokenizer_config.json, generation_config.json, chat_template.jinja, ... as bytes, by file name. */
  readonly sideFiles: ReadonlyMap<string, Uint8Array>;
  readonly sources: readonly SourceFile[];
  /** What the reader should be told: "the vision tower was left out", "tied head restored". */
  readonly notes: readonly string[];
  dispose(): Promise<void>;
}
