/** Text to ids and back, and messages to a prompt: the interface that runtime, server and quantizers use. */

export interface ChatMessage {
  readonly role: string;
  readonly content: unknown; // string, null or an array of parts, as the template wants it
  readonly [key: string]: unknown; // tool_calls, tool_call_id, name, reasoning_content, ...
}

export interface ChatTemplateOptions {
  readonly tools?: readonly unknown[];
  /** Default true: end the prompt where the assistant's answer starts. */
  readonly addGenerationPrompt?: boolean;
  /** Template variables such as enable_thinking. */
  readonly kwargs?: Readonly<Record<string, unknown>>;
}

/** Turns a growing list of ids into text pieces that never split a character. */
export interface StreamingDecoder {
  /** Text that this id completes, "" while a character is unfinished. */
  push(id: number): string;
  /** What is left at the end: an unfinished character as U+FFFD, or "". */
  end(): string;
}

export interface Tokenizer {
  /** Ids 0 .. vocabSize-1 exist here; a model's own vocabulary may be padded beyond it. */
  readonly vocabSize: number;
  readonly bosId: number | undefined;
  /** Every id that ends a generation (generation_config, config and tokenizer together). */
  readonly eosIds: readonly number[];
  readonly chatTemplate: string | undefined;
  /** `addSpecialTokens` (default true): what the post-processor puts around a text, such as a beginning-of-sequence. */
  encode(text: string, options?: { addSpecialTokens?: boolean }): number[];
  /** `skipSpecialTokens` (default false): leave special tokens out of the text. */
  decode(ids: readonly number[], options?: { skipSpecialTokens?: boolean }): string;
  /**
   * `continues`: the ids go on from a text that is already there, so the space before the first word stays
   * (SentencePiece-like decoders drop it at the start of a text).
   */
  streamingDecoder(options?: { skipSpecialTokens?: boolean; continues?: boolean }): StreamingDecoder;
  /** The bytes that a single id stands for (special tokens: their text), for logprobs and grammars. */
  tokenBytes(id: number): Uint8Array;
  isSpecial(id: number): boolean;
  /** The id of a token written exactly so, special ones included. */
  tokenId(token: string): number | undefined;
  applyChatTemplate(messages: readonly ChatMessage[], options?: ChatTemplateOptions): string;
}
