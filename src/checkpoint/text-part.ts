/**
 * The language model of a multimodal checkpoint: its config is nested (`text_config`) and its tensors carry a prefix.
 * What is not text (vision tower, projector, audio) is left out, and a note says so.
 */
import { NibbleError } from "../errors.ts";
import { isJsonObject, type JsonObject } from "./json.ts";

/** Where the text model's config lies: transformers, InternVL, DeepSeek-VL. */
const NESTED_KEYS = ["text_config", "llm_config", "language_config"];

/** Spellings of the text model's place, the first that fits: [prefix in the file, prefix of a text-only checkpoint]. */
const PREFIXES: readonly (readonly [RegExp, string])[] = [
  [
    /^(model\.)?(language_model|text_model)\.(model\.)?(?=(embed_tokens|layers|norm|embedding_norm|final_layernorm)\.)/,
    "model.",
  ], // llava, gemma3, idefics3
  [/^(model\.)?(language_model|text_model)\.(?=(lm_head|transformer|gpt_neox)\b)/, ""],
  [/^(?=(lm_head|model\.embed_tokens|model\.layers|model\.norm)\.)/, ""], // qwen2-vl: beside `visual.`
];

/** Keys of multimodal text configs that do not touch what a text-only prompt computes. */
const MULTIMODAL_KEYS = [
  "_flash_attn_2_enabled",
  "neftune_noise_alpha",
  "num_image_tokens",
  "perceiver_config",
  "pixel_shuffle_factor",
  "use_resampler",
];

/** Text models under a name of their own: on text alone their rotary positions are the plain ones. */
const TEXT_TYPES: Readonly<Record<string, string>> = {
  qwen2_vl: "qwen2",
  qwen2_vl_text: "qwen2",
  qwen2_5_vl: "qwen2",
  qwen2_5_vl_text: "qwen2",
  qwen3_vl_text: "qwen3",
};

/** Keys of a flat multimodal config (Qwen2-VL's first layout) that are about images. */
const IMAGE_KEYS = /^(vision_config|(image|video|vision|vision_start|vision_end)_token_id)$/;

/**
 * What config.json may leave out of text_config because the class of transformers 5 fills it in: the keys that an
 * architecture here asks for without a default of its own (configuration_*.py of each).
 */
const CLASS_DEFAULTS: Readonly<Record<string, JsonObject>> = {
  llama: {
    num_attention_heads: 32,
    max_position_embeddings: 2048,
    rms_norm_eps: 1e-6,
  },
  mistral: {
    num_attention_heads: 32,
    num_key_value_heads: 8,
    max_position_embeddings: 131072,
    rms_norm_eps: 1e-6,
  },
  qwen2: {
    num_attention_heads: 32,
    num_key_value_heads: 32,
    max_position_embeddings: 32768,
    rms_norm_eps: 1e-6,
  },
  gemma2: {
    num_attention_heads: 8,
    num_key_value_heads: 4,
    head_dim: 256,
    max_position_embeddings: 8192,
    rms_norm_eps: 1e-6,
  },
  gemma3_text: {
    num_attention_heads: 8,
    num_key_value_heads: 4,
    head_dim: 256,
    max_position_embeddings: 131072,
    rms_norm_eps: 1e-6,
    query_pre_attn_scalar: 256,
    sliding_window: 4096,
  },
};

export interface TextPart<Tensor> {
  readonly config: JsonObject;
  /** By the names of a text-only checkpoint. */
  readonly tensors: ReadonlyMap<string, Tensor>;
  readonly notes: readonly string[];
}

/** The checkpoint itself, or the text model nested in it; `bad_config` where neither names a model_type. */
export function textPart<Tensor extends { readonly shape: readonly number[] }>(
  config: JsonObject,
  tensors: ReadonlyMap<string, Tensor>,
  where: string,
): TextPart<Tensor> {
  const nested = NESTED_KEYS.find((key) => isJsonObject(config[key]));
  const isFlat = isJsonObject(config.vision_config) && Object.hasOwn(TEXT_TYPES, String(config.model_type));
  const text = nested === undefined ? config : (config[nested] as JsonObject);
  if (typeof text.model_type !== "string" || text.model_type === "") {
    const place = nested === undefined ? "config.json" : `config.json's ${nested}`;
    throw new NibbleError("bad_config", `${where}: ${place} has no model_type, so the architecture is unknown.`, {
      param: "model_type",
    });
  }
  if (nested === undefined && !isFlat) return { config, tensors, notes: [] };

  const kept = new Map<string, Tensor>();
  for (const [name, tensor] of tensors) {
    const renamed = textName(name);
    if (renamed === undefined) continue;
    if (kept.has(renamed)) {
      throw new NibbleError("bad_file", `${where}: two tensors are the text model's "${renamed}", one is "${name}".`);
    }
    kept.set(renamed, tensor);
  }
  if (kept.size === 0) {
    throw new NibbleError(
      "unsupported",
      `${where}: config.json has a ${nested ?? "vision_config"}, but no tensor is under a prefix of a text model that Nibble knows ` +
        `(the first is "${tensors.keys().next().value}").`,
    );
  }
  const left = tensors.size - kept.size;
  return {
    config: nestedConfig(config, text, kept),
    tensors: kept,
    notes: [
      `${config.model_type ?? "This checkpoint"} is multimodal: its text model (${text.model_type}) is taken, ` +
        `${left} other tensors (vision, audio, projectors) are left out.`,
    ],
  };
}

/** A text model's own name of a tensor of a multimodal checkpoint; undefined for what is no text. */
export function textName(name: string): string | undefined {
  const rule = PREFIXES.find(([prefix]) => prefix.test(name));
  return rule && name.replace(rule[0], rule[1]);
}

function nestedConfig(
  outer: JsonObject,
  text: JsonObject,
  tensors: ReadonlyMap<string, { readonly shape: readonly number[] }>,
): JsonObject {
  const hasHead = tensors.has("lm_head.weight");
  const inherited: Record<string, unknown> = {};
  for (const key of ["bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype"]) {
    if (outer[key] !== undefined) inherited[key] = outer[key];
  }
  const config: Record<string, unknown> = {
    ...sizesOf(tensors),
    ...CLASS_DEFAULTS[String(text.model_type)],
    ...inherited,
    ...text,
  };
  const plainType = TEXT_TYPES[String(text.model_type)];
  if (plainType) {
    config.model_type = plainType;
    for (const key of ["rope_scaling", "rope_parameters"]) config[key] = withoutSections(config[key]);
    for (const name of Object.keys(config)) if (IMAGE_KEYS.test(name)) delete config[name];
  }
  // a text_config is often written without its defaults, and these differ by family: the head's presence decides
  config.tie_word_embeddings = text.tie_word_embeddings ?? text.tie_embedding ?? outer.tie_word_embeddings ?? !hasHead;
  if (!hasHead) config.tie_word_embeddings = true;
  for (const key of MULTIMODAL_KEYS) delete config[key];
  if (config.qk_layer_norms === false) delete config.qk_layer_norms; // idefics; true changes the attention
  return config;
}

/** mrope turns channels by time, row and column; a text's three positions are one, so the sections do nothing. */
function withoutSections(rope: unknown): unknown {
  if (!isJsonObject(rope)) return rope;
  const { mrope_section: _, mrope_interleaved: __, ...rest } = rope;
  const type = rest.rope_type ?? rest.type;
  if (type !== "mrope" && type !== "default") return rest;
  const plain: Record<string, unknown> = { ...rest };
  delete plain.type;
  plain.rope_type = "default";
  return plain;
}

/** What the tensors themselves say where text_config leaves it out. */
function sizesOf(tensors: ReadonlyMap<string, { readonly shape: readonly number[] }>): Record<string, number> {
  const [vocabSize, hiddenSize] = tensors.get("model.embed_tokens.weight")?.shape ?? [];
  const layers = [...tensors.keys()].map((name) => Number(/\.layers\.(\d+)\./.exec(name)?.[1] ?? -1) + 1);
  return { vocab_size: vocabSize, hidden_size: hiddenSize, num_hidden_layers: Math.max(0, ...layers) };
}
