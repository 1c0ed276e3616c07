/**
 * Reads config.json so that nothing that changes the computation is overlooked: every key is either asked for by the
 * architecture, known to be without effect on logits, or an error that names it.
 */
import { NibbleError } from "../errors.ts";

/** Keys that say how a model was trained, saved or sampled, not what it computes. */
const WITHOUT_EFFECT = new Set([
  "_attn_implementation",
  "_attn_implementation_autoset",
  "_attn_implementation_internal",
  "_commit_hash",
  "_experts_implementation",
  "_flash_attn_2_enabled",
  "_name_or_path",
  "_num_labels",
  "architectures",
  "attention_dropout",
  "attention_probs_dropout_prob",
  "attn_implementation",
  "attn_pdrop",
  "auto_map",
  "bad_words_ids",
  "begin_suppress_tokens",
  "bos_token",
  "bos_token_id",
  "cache_implementation",
  "chunk_size_feed_forward",
  "classifier_dropout",
  "cross_attention_hidden_size",
  "decoder_start_token_id",
  "diversity_penalty",
  "do_sample",
  "dtype",
  "early_stopping",
  "embd_pdrop",
  "embedding_dropout",
  "encoder_no_repeat_ngram_size",
  "eos_token",
  "eos_token_id",
  "experts_implementation",
  "exponential_decay_length_penalty",
  "finetuning_task",
  "flash_attn",
  "forced_bos_token_id",
  "forced_eos_token_id",
  "gradient_checkpointing",
  "hidden_dropout",
  "hidden_dropout_prob",
  "id2label",
  "initializer_factor",
  "initializer_range",
  "is_decoder",
  "is_encoder_decoder",
  "is_llama_config",
  "keys_to_ignore_at_inference",
  "label2id",
  "language",
  "length_penalty",
  "license",
  "max_length",
  "max_sequence_length",
  "max_window_layers",
  "min_length",
  "model_max_length",
  "model_type",
  "name_or_path",
  "neftune_noise_alpha",
  "no_repeat_ngram_size",
  "num_beam_groups",
  "num_beams",
  "num_labels",
  "num_return_sequences",
  "output_attentions",
  "output_hidden_states",
  "output_router_logits",
  "output_scores",
  "pad_token",
  "pad_token_id",
  "prefix",
  "pretraining_tp",
  "problem_type",
  "remove_invalid_values",
  "repetition_penalty",
  "resid_pdrop",
  "residual_dropout",
  "return_dict",
  "return_dict_in_generate",
  "router_aux_loss_coef",
  "router_jitter_noise",
  "router_z_loss_coef",
  "sep_token_id",
  "summary_activation",
  "summary_first_dropout",
  "summary_proj_to_labels",
  "summary_type",
  "summary_use_proj",
  "suppress_tokens",
  "task_specific_params",
  "temperature",
  "tf_legacy_loss",
  "tie_encoder_decoder",
  "tokenizer_class",
  "tokenizer_model_max_length",
  "top_k",
  "top_p",
  "torch_dtype",
  "torchscript",
  "transformers.js_config",
  "transformers_version",
  "typical_p",
  "unsloth_fixed",
  "unsloth_version",
  "use_bfloat16",
  "use_cache",
  "use_flash_attention_2",
  "use_flash_attn",
]);

type Json = Readonly<Record<string, unknown>>;

export class ConfigReader {
  readonly modelType: string;
  private readonly read = new Set<string>();

  constructor(
    private readonly json: Json,
    /** Prefix of messages: the checkpoint's name. */
    private readonly where: string,
  ) {
    this.modelType = typeof json.model_type === "string" ? json.model_type : "";
  }

  /** The value as it stands, marked as understood; null counts as absent. */
  value(key: string): unknown {
    this.read.add(key);
    return this.json[key] ?? undefined;
  }

  has(key: string): boolean {
    return this.json[key] !== undefined && this.json[key] !== null;
  }

  private typed<T>(key: string, kind: string, test: (value: unknown) => boolean, fallback: T | undefined): T {
    const value = this.value(key);
    if (value === undefined && fallback !== undefined) return fallback;
    if (value === undefined) throw this.error(key, `is missing; a ${this.modelType} model needs it (${kind})`);
    if (!test(value)) throw this.error(key, `is ${JSON.stringify(value)}; it has to be ${kind}`);
    return value as T;
  }

  /** A whole number of at least 1, or `fallback` where the key is absent. */
  int(key: string, fallback?: number): number {
    return this.typed(key, "a whole number above 0", (v) => Number.isSafeInteger(v) && (v as number) > 0, fallback);
  }

  number(key: string, fallback?: number): number {
    return this.typed(key, "a finite number", (v) => typeof v === "number" && Number.isFinite(v), fallback);
  }

  boolean(key: string, fallback?: boolean): boolean {
    return this.typed(key, "true or false", (v) => typeof v === "boolean", fallback);
  }

  string(key: string, fallback?: string): string {
    return this.typed(key, "a string", (v) => typeof v === "string", fallback);
  }

  numbers(key: string): readonly number[] | undefined {
    if (!this.has(key)) return undefined;
    return this.typed(key, "an array of numbers", (v) => Array.isArray(v) && v.every((n) => typeof n === "number"), []);
  }

  strings(key: string): readonly string[] | undefined {
    if (!this.has(key)) return undefined;
    return this.typed(key, "an array of strings", (v) => Array.isArray(v) && v.every((s) => typeof s === "string"), []);
  }

  /** One of `allowed`. */
  choice<T extends string>(key: string, allowed: readonly T[], fallback?: T): T {
    const value = this.string(key, fallback);
    if (!(allowed as readonly string[]).includes(value)) {
      throw this.error(key, `is "${value}"; Nibble knows ${allowed.join(", ")} here`);
    }
    return value as T;
  }

  /** The key may be there, but only with a value that leaves the computation as it is. */
  expect(key: string, ...values: unknown[]): void {
    const value = this.value(key);
    if (value === undefined || values.includes(value)) return;
    throw this.error(
      key,
      `is ${JSON.stringify(value)}; Nibble computes ${this.modelType} only with ${values.map((v) => JSON.stringify(v)).join(" or ")}`,
    );
  }

  /** Understood elsewhere, or without effect for this family. */
  ignore(...keys: readonly string[]): void {
    for (const key of keys) this.read.add(key);
  }

  error(key: string, found: string): NibbleError {
    return new NibbleError("bad_config", `${this.where}: config.json's "${key}" ${found}.`, { param: key });
  }

  /** Call last: a key that nobody read may change the computation, so it is an error. */
  finish(): void {
    const unknown = Object.keys(this.json).filter(
      (key) => this.has(key) && !this.read.has(key) && !WITHOUT_EFFECT.has(key),
    );
    if (unknown.length === 0) return;
    const named = unknown.map((key) => `"${key}": ${JSON.stringify(this.json[key])}`).join(", ");
    throw new NibbleError(
      "bad_config",
      `${this.where}: config.json has ${unknown.length === 1 ? "a key" : "keys"} that Nibble does not know for ` +
        `model_type ${this.modelType}: ${named}. If it does not change what the model computes, remove it from config.json.`,
      { param: unknown[0] },
    );
  }
}
