/** config.json's keys from GGUF metadata, for what several architectures share; gguf-architectures.ts has a row for each. */
import type { GgufTensor } from "./gguf.ts";
import type { GgufMetadata } from "./gguf-metadata.ts";
import { llama3Scaling, ropeScaling } from "./gguf-rope.ts";

/** What a row's config is made from. */
export interface GgufModel {
  readonly metadata: GgufMetadata;
  readonly tensors: ReadonlyMap<string, GgufTensor>;
  /** rope_freqs, rope_factors_long, rope_factors_short: divisors per frequency, where the file has them. */
  readonly ropeFactors: ReadonlyMap<string, readonly number[]>;
}

export type Config = Record<string, unknown>;

/** Output features of the first block that has the matrix. */
export function rowsOf({ tensors, metadata }: GgufModel, stem: string): number {
  const layers = metadata.int("block_count");
  for (let layer = 0; layer < layers; layer++) {
    const tensor = tensors.get(`blk.${layer}.${stem}.weight`);
    if (tensor) return tensor.shape.at(-2) ?? 0;
  }
  return 0;
}

export const has = (model: GgufModel, name: string): boolean => model.tensors.has(name);

export interface HeadCounts {
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
}

/** Head sizes from the matrices themselves; lfm2's layers without attention have no kv heads. */
export function headCounts(model: GgufModel): HeadCounts {
  const { metadata } = model;
  const layers = metadata.int("block_count");
  const heads = metadata.everyLayer("attention.head_count", layers);
  const perLayer = metadata.perLayer("attention.head_count_kv", layers, heads).filter((count) => count > 0);
  const kvHeads = perLayer[0] ?? heads;
  if (perLayer.some((count) => count !== kvHeads)) metadata.everyLayer("attention.head_count_kv", layers);
  const rows = rowsOf(model, "attn_q");
  const headDim = rows > 0 ? rows / heads : rowsOf(model, "attn_qkv") / (heads + 2 * kvHeads);
  const declared = metadata.number("attention.key_length", headDim);
  if (!Number.isSafeInteger(headDim) || headDim === 0 || declared !== headDim) {
    throw metadata.error(
      "attention.key_length",
      `is ${declared}, but q's ${rows} rows make ${heads} heads of ${headDim}`,
    );
  }
  return { heads, kvHeads, headDim };
}

/** Keys that every family's config.json has. */
export function common({ metadata, tensors }: GgufModel): Config {
  metadata.expect("attention.causal", true);
  const ids = { bos_token_id: "bos", eos_token_id: "eos", pad_token_id: "padding" } as const;
  const config: Config = { torch_dtype: "float32" };
  for (const [key, name] of Object.entries(ids)) config[key] = metadata.tokenId(name);
  config.vocab_size = tensors.get("token_embd.weight")?.shape[0];
  return config;
}

/** Decoders whose config.json has Llama's keys. */
export function llamaLike(model: GgufModel): Config {
  const { metadata } = model;
  const { heads, kvHeads, headDim } = headCounts(model);
  const hiddenSize = metadata.int("embedding_length");
  const rotary = metadata.number("rope.dimension_count", headDim);
  const feedForward = metadata.perLayer(
    "feed_forward_length",
    metadata.int("block_count"),
    rowsOf(model, "ffn_up") || 1,
  );
  const config: Config = {
    ...common(model),
    hidden_size: hiddenSize,
    intermediate_size: Math.max(...feedForward),
    num_hidden_layers: metadata.int("block_count"),
    num_attention_heads: heads,
    num_key_value_heads: kvHeads,
    max_position_embeddings: metadata.int("context_length"),
    rope_theta: metadata.number("rope.freq_base", 10000),
    rope_scaling: ropeScaling(metadata),
    tie_word_embeddings: !has(model, "output.weight"),
  };
  if (headDim * heads !== hiddenSize) config.head_dim = headDim;
  if (rotary !== headDim) config.partial_rotary_factor = rotary / headDim;
  return config;
}

export function rmsNormed(model: GgufModel): Config {
  return {
    ...llamaLike(model),
    hidden_act: "silu",
    rms_norm_eps: model.metadata.number("attention.layer_norm_rms_epsilon"),
  };
}

/** Llama's layout with interleaved rotary pairs, which are undone for whole heads only. */
export function permuted(model: GgufModel): Config {
  const config = rmsNormed(model);
  if (config.partial_rotary_factor !== undefined) {
    throw model.metadata.error("rope.dimension_count", "is not the head size, and this layout rotates whole heads");
  }
  const factors = model.ropeFactors.get("rope_freqs");
  if (factors) config.rope_scaling = llama3Scaling(factors, config);
  if (has(model, "blk.0.attn_q.bias")) config.attention_bias = true;
  if (has(model, "blk.0.ffn_up.bias")) config.mlp_bias = true;
  return config;
}

export function expertCounts({ metadata }: GgufModel): { count: number; used: number } {
  metadata.ignore("expert_feed_forward_length", "expert_shared_feed_forward_length"); // the matrices say it
  metadata.expect("expert_weights_norm", true, false); // known per family
  metadata.expect("expert_gating_func", 1); // softmax
  metadata.expect("expert_weights_scale", 1, 0);
  metadata.expect("leading_dense_block_count", 0);
  metadata.expect("expert_shared_count", 0, 1, 4); // qwen2_moe's shared experts are one matrix
  return { count: metadata.int("expert_count"), used: metadata.int("expert_used_count") };
}

export function qwenMoe(model: GgufModel, normTopK: boolean): Config {
  const { count, used } = expertCounts(model);
  const layers = model.metadata.int("block_count");
  const dense = Array.from({ length: layers }, (_, n) => n).filter((n) => !has(model, `blk.${n}.ffn_gate_inp.weight`));
  return {
    ...rmsNormed(model),
    num_experts: count,
    num_experts_per_tok: used,
    moe_intermediate_size: rowsOf(model, "ffn_gate_exps") || rowsOf(model, "ffn_gate_up_exps") / 2,
    norm_topk_prob: normTopK,
    decoder_sparse_step: 1,
    mlp_only_layers: dense,
    use_sliding_window: false,
  };
}

/** gemma2, gemma3: 1 + w norms, softcaps, alternating windows; the scale of attention is not in the file. */
export function gemma(model: GgufModel, layersOf27B: number): Config {
  const { metadata } = model;
  const { heads, headDim } = headCounts(model);
  const config = rmsNormed(model);
  delete config.hidden_act;
  return {
    ...config,
    head_dim: headDim,
    hidden_activation: "gelu_pytorch_tanh",
    // llama.cpp hard-codes it too: the 27B models scale by hidden / heads, the others by the head size
    query_pre_attn_scalar:
      config.num_hidden_layers === layersOf27B ? metadata.int("embedding_length") / heads : headDim,
    tie_word_embeddings: true,
  };
}

/** Every layer's attention kind, where the file gives a period, a list of booleans, or nothing. */
export function layerTypes({ metadata }: GgufModel, layers: number, defaultPeriod: number): string[] {
  const pattern = metadata.value("attention.sliding_window_pattern") ?? defaultPeriod;
  return Array.from({ length: layers }, (_, layer) => {
    const local = Array.isArray(pattern) ? pattern[layer] === true : (layer + 1) % Number(pattern) !== 0;
    return local ? "sliding_attention" : "full_attention";
  });
}

export function layerNormEps({ metadata }: GgufModel): number {
  return metadata.number("attention.layer_norm_epsilon");
}
