/** What a grammar is to those who ask for one and to those who sample under it. */
import type { ToolFormatName } from "../tokenizer/tool-formats.ts";

/**
 * Restricts the next token (constrained decoding). A plain object made in the worker that samples: messages carry
 * `GrammarSpec` instead.
 */
export interface TokenConstraint {
  /** A bit per token id (32 to a word): 1 = allowed now. */
  allowed(): Uint32Array;
  accept(id: number): void;
  /** The text so far is a whole sentence of the grammar: end-of-sequence is allowed. */
  readonly done: boolean;
}

/** A grammar as it travels to where tokens are sampled. */
export type GrammarSpec =
  | { readonly kind: "json_schema"; readonly schema: unknown; readonly strict?: boolean }
  | { readonly kind: "json_object" }
  | { readonly kind: "regex"; readonly pattern: string }
  | { readonly kind: "ebnf"; readonly grammar: string }
  /** Calls of these functions in a family's spelling, from `forceToolCalls` (src/tokenizer/tool-calls.ts). */
  | {
      readonly kind: "tool_calls";
      readonly format: ToolFormatName;
      readonly tools: readonly { readonly name: string; readonly parameters: unknown }[];
      /** One call after the other, as many as the model wants; else exactly one. */
      readonly many: boolean;
    };
