/**
 * A Hugging Face checkpoint as the GGUF that llama.cpp's conversion would make of it (conversion/*.py and gguf's
 * tensor_mapping.py): the way there, written for the tests, so that the way back has something to undo.
 */
import type { Checkpoint } from "../../src/checkpoint/checkpoint.ts";
import { type QuantizableType, quantizeGgml } from "../../src/checkpoint/ggml-quantize.ts";
import {
  type GgufEntries,
  type GgufTensorToWrite,
  type TypedValue,
  writeGguf,
} from "../../src/checkpoint/gguf-writer.ts";
import { memorySink } from "../../src/memory-files.ts";
import type { FloatTensor } from "../../src/tensor/dtypes.ts";

// biome-ignore lint/suspicious/noExplicitAny: config.json as it is
type Config = Record<string, any>;

/** general.architecture of each model_type. */
const ARCHITECTURE: Record<string, string> = {
  llama: "llama",
  mistral: "llama",
  mixtral: "llama",
  qwen2: "qwen2",
  qwen3: "qwen3",
  qwen2_moe: "qwen2moe",
  olmoe: "olmoe",
  olmo2: "olmo2",
  gemma2: "gemma2",
  gemma3_text: "gemma3",
  phi: "phi2",
  phi3: "phi3",
  gpt2: "gpt2",
  gpt_neox: "gptneox",
  granite: "granite",
  smollm3: "smollm3",
  stablelm: "stablelm",
  lfm2: "lfm2",
};

const NAMES: readonly (readonly [RegExp, string])[] = [
  [/^(model\.embed_tokens|transformer\.wte|gpt_neox\.embed_in|wte)$/, "token_embd"],
  [/^(transformer\.)?wpe$/, "position_embd"],
  [/^(model\.norm|transformer\.ln_f|gpt_neox\.final_layer_norm|model\.final_layernorm|ln_f)$/, "output_norm"],
  [/^model\.embedding_norm$/, "token_embd_norm"],
  [/^(lm_head|embed_out)$/, "output"],
  [/^(input_layernorm|ln_1|operator_norm)$/, "attn_norm"],
  [/^self_attn\.([qkv])_proj$/, "attn_$1"],
  [/^self_attn\.([qk])_(norm|layernorm)$/, "attn_$1_norm"],
  [/^(self_attn\.qkv_proj|attn\.c_attn|attention\.query_key_value)$/, "attn_qkv"],
  [/^(self_attn\.(o_proj|dense|out_proj)|attn\.c_proj|attention\.dense)$/, "attn_output"],
  [/^(mlp|feed_forward)\.(gate_proj|w1)$/, "ffn_gate"],
  [/^(mlp|feed_forward)\.(up_proj|w3|fc1|c_fc|dense_h_to_4h|gate_up_proj)$/, "ffn_up"],
  [/^(mlp|feed_forward)\.(down_proj|w2|fc2|c_proj|dense_4h_to_h)$/, "ffn_down"],
  [/^conv\.(conv|in_proj|out_proj)$/, "shortconv.$1"],
  [/^(mlp|block_sparse_moe)\.gate$/, "ffn_gate_inp"],
  [/^mlp\.shared_expert_gate$/, "ffn_gate_inp_shexp"],
  [/^mlp\.shared_expert\.(gate|up|down)_proj$/, "ffn_$1_shexp"],
];

function stemOf(module: string, config: Config): string {
  const block = /^(?:model\.layers|transformer\.h|gpt_neox\.layers|h)\.(\d+)\.(.+)$/.exec(module);
  const inner = block ? block[2] : module;
  const postNorms = ["gemma2", "gemma3_text", "olmo2"].includes(config.model_type);
  const norms: Record<string, string> = {
    post_attention_layernorm: postNorms ? "post_attention_norm" : "ffn_norm",
    pre_feedforward_layernorm: "ffn_norm",
    post_feedforward_layernorm: "post_ffw_norm",
    ln_2: "ffn_norm",
    ffn_norm: "ffn_norm",
  };
  const rule = NAMES.find(([pattern]) => pattern.test(inner));
  const stem = norms[inner] ?? (rule && inner.replace(rule[0], rule[1]));
  if (!stem) throw new Error(`no GGUF name for ${module}`);
  return block ? `blk.${block[1]}.${stem}` : stem;
}

/** rows (heads, 2, half) -> (heads, half, 2) */
function interleave({ shape, data }: FloatTensor, heads: number): Float32Array {
  const length = data.length / shape[0];
  const headDim = shape[0] / heads;
  const out = new Float32Array(data.length);
  for (let head = 0; head < heads; head++) {
    for (let half = 0; half < 2; half++) {
      for (let i = 0; i < headDim / 2; i++) {
        const from = (head * headDim + half * (headDim / 2) + i) * length;
        out.set(data.subarray(from, from + length), (head * headDim + 2 * i + half) * length);
      }
    }
  }
  return out;
}

/** rows (heads, 3, headDim) -> (3, heads, headDim) */
function splitQkv({ shape, data }: FloatTensor, heads: number): Float32Array {
  const length = data.length / shape[0];
  const headDim = shape[0] / heads / 3;
  const out = new Float32Array(data.length);
  for (let row = 0; row < shape[0]; row++) {
    const [head, which, i] = [Math.floor(row / (3 * headDim)), Math.floor(row / headDim) % 3, row % headDim];
    out.set(data.subarray(row * length, (row + 1) * length), ((which * heads + head) * headDim + i) * length);
  }
  return out;
}

function convert(name: string, tensor: FloatTensor, config: Config): FloatTensor {
  const heads = config.num_attention_heads;
  const type = config.model_type;
  if (["llama", "mistral", "mixtral", "granite", "smollm3"].includes(type)) {
    if (/\.q_proj\./.test(name)) return { ...tensor, data: interleave(tensor, heads) };
    if (/\.k_proj\./.test(name)) return { ...tensor, data: interleave(tensor, config.num_key_value_heads) };
  }
  if (/^gemma/.test(type) && name.endsWith("norm.weight")) return { ...tensor, data: tensor.data.map((w) => w + 1) };
  if (type === "gpt2" && /(c_attn|c_proj|c_fc)\.weight$/.test(name)) {
    const [rows, cols] = tensor.shape;
    return {
      shape: [cols, rows],
      data: tensor.data.map((_, i) => tensor.data[(i % rows) * cols + Math.floor(i / rows)]),
    };
  }
  if (type === "gpt_neox" && /query_key_value/.test(name)) return { ...tensor, data: splitQkv(tensor, heads) };
  if (type === "lfm2" && /conv\.conv\.weight$/.test(name))
    return { ...tensor, shape: [tensor.shape[0], tensor.shape[2]] };
  return tensor;
}

const u32 = (value: number): TypedValue => ({ type: "u32", value });
const f32 = (value: number): TypedValue => ({ type: "f32", value });

function metadataOf(config: Config, intermediate: number): Record<string, TypedValue | string | boolean> {
  const hidden = config.hidden_size ?? config.n_embd;
  const heads = config.num_attention_heads ?? config.n_head;
  const layers = config.num_hidden_layers ?? config.n_layer;
  const kv = config.num_key_value_heads ?? heads;
  const headDim = config.head_dim ?? hidden / heads;
  const rope = config.rope_parameters ?? config.rope_scaling ?? {};
  const partial = config.partial_rotary_factor ?? config.rotary_pct ?? 1;
  const keys: Record<string, TypedValue | string | boolean | undefined> = {
    block_count: u32(layers),
    context_length: u32(config.max_position_embeddings ?? config.n_positions),
    embedding_length: u32(hidden),
    feed_forward_length: u32(intermediate),
    "attention.head_count": u32(heads),
    "attention.head_count_kv":
      config.model_type === "lfm2"
        ? { type: "i32", value: Array.from({ length: layers }, (_, n) => (config.full_attn_idxs.includes(n) ? kv : 0)) }
        : u32(kv),
    "rope.freq_base":
      config.model_type === "gpt2"
        ? undefined
        : f32(config.rope_theta ?? rope.rope_theta ?? config.rotary_emb_base ?? 10000),
    vocab_size: u32(config.vocab_size),
    "attention.sliding_window":
      config.sliding_window && config.use_sliding_window !== false ? u32(config.sliding_window) : undefined,
    attn_logit_softcapping: config.attn_logit_softcapping ? f32(config.attn_logit_softcapping) : undefined,
    final_logit_softcapping: config.final_logit_softcapping ? f32(config.final_logit_softcapping) : undefined,
    embedding_scale: config.embedding_multiplier ? f32(config.embedding_multiplier) : undefined,
    "attention.scale": config.attention_multiplier ? f32(config.attention_multiplier) : undefined,
    residual_scale: config.residual_multiplier ? f32(config.residual_multiplier) : undefined,
    logit_scale: config.logits_scaling ? f32(config.logits_scaling) : undefined,
    use_parallel_residual: config.use_parallel_residual,
    "shortconv.l_cache": config.conv_L_cache ? u32(config.conv_L_cache) : undefined,
    expert_count:
      config.num_local_experts || config.num_experts ? u32(config.num_local_experts ?? config.num_experts) : undefined,
    expert_used_count: config.num_experts_per_tok ? u32(config.num_experts_per_tok) : undefined,
    expert_feed_forward_length: config.moe_intermediate_size ? u32(config.moe_intermediate_size) : undefined,
  };
  const rms = config.rms_norm_eps ?? config.norm_eps;
  if (rms !== undefined) keys["attention.layer_norm_rms_epsilon"] = f32(rms);
  const eps = config.layer_norm_eps ?? config.layer_norm_epsilon;
  if (eps !== undefined) keys["attention.layer_norm_epsilon"] = f32(eps);
  if (config.head_dim) keys["attention.key_length"] = keys["attention.value_length"] = u32(config.head_dim);
  if (config.model_type !== "gpt2") keys["rope.dimension_count"] = u32(Math.trunc(partial * headDim));
  const type = rope.rope_type ?? rope.type;
  if (type === "linear" || type === "yarn") {
    keys["rope.scaling.type"] = type;
    keys["rope.scaling.factor"] = f32(rope.factor);
    if (type === "yarn") keys["rope.scaling.original_context_length"] = u32(rope.original_max_position_embeddings);
  }
  if (config.model_type === "phi3") {
    const original = config.original_max_position_embeddings;
    keys["attention.sliding_window"] = u32(config.sliding_window ?? 0);
    keys["rope.scaling.original_context_length"] = u32(original);
    const scale = config.max_position_embeddings / original;
    if (type)
      keys["rope.scaling.attn_factor"] = f32(scale > 1 ? Math.sqrt(1 + Math.log(scale) / Math.log(original)) : 1);
  }
  const local = config.layer_types?.map((layer: string) => layer === "sliding_attention");
  const period = config.sliding_window_pattern;
  if (/^gemma3/.test(config.model_type)) {
    keys["attention.sliding_window_pattern"] = local ? { type: "bool", value: local } : u32(period);
  }
  return Object.fromEntries(Object.entries(keys).filter(([, value]) => value !== undefined)) as Record<
    string,
    TypedValue
  >;
}

/** llama3's divisors, as LlamaModel.generate_extra_tensors writes them. */
function ropeTensors(config: Config): GgufTensorToWrite[] {
  const rope = config.rope_parameters ?? config.rope_scaling ?? {};
  const vector = (name: string, values: readonly number[]): GgufTensorToWrite => ({
    name,
    type: "F32",
    shape: [values.length],
    bytes: new Uint8Array(Float32Array.from(values).buffer),
  });
  if (rope.long_factor) {
    return [
      vector("rope_factors_long.weight", rope.long_factor),
      vector("rope_factors_short.weight", rope.short_factor),
    ];
  }
  if ((rope.rope_type ?? rope.type) !== "llama3") return [];
  const dim = config.head_dim ?? config.hidden_size / config.num_attention_heads;
  const { factor, low_freq_factor: low, high_freq_factor: high, original_max_position_embeddings: original } = rope;
  const factors = Array.from({ length: dim / 2 }, (_, i) => {
    const wavelength = 2 * Math.PI * (config.rope_theta ?? rope.rope_theta) ** ((2 * i) / dim);
    if (wavelength < original / high) return 1;
    if (wavelength > original / low) return factor;
    const smooth = (original / wavelength - low) / (high - low);
    return 1 / ((1 - smooth) / factor + smooth);
  });
  return [vector("rope_freqs.weight", factors)];
}

/** `quantizeAs`: the type of every matrix whose rows it divides, but the embedding's if that has its own; the others stay F32. */
export async function toGguf(
  checkpoint: Checkpoint,
  options: { quantizeAs?: QuantizableType; quantizeEmbeddingAs?: QuantizableType; extra?: GgufEntries } = {},
): Promise<Uint8Array> {
  const config = checkpoint.config as Config;
  const tensors: GgufTensorToWrite[] = [];
  const add = (name: string, { shape, data }: FloatTensor) => {
    const quantizeAs = (name.startsWith("token_embd") && options.quantizeEmbeddingAs) || options.quantizeAs;
    const quantized = quantizeAs && shape.length > 1 && shape.at(-1)! % 32 === 0;
    const bytes = quantized ? quantizeGgml(data, quantizeAs) : new Uint8Array(data.slice().buffer);
    tensors.push({ name, type: quantized ? quantizeAs : "F32", shape, bytes });
  };
  const experts = new Map<string, FloatTensor[]>();
  let intermediate = config.intermediate_size ?? config.block_ff_dim ?? 4 * config.n_embd;
  for (const name of checkpoint.tensors.keys()) {
    if (/\.attn\.(masked_)?bias$/.test(name)) continue; // gpt2's mask buffers
    const tensor = convert(name, await checkpoint.readTensor(name), config);
    const expert = /^model\.layers\.(\d+)\..*experts\.(\d+)\.(\w+)\.weight$/.exec(name);
    if (expert) {
      const which = { w1: "gate", w2: "down", w3: "up" }[expert[3]] ?? expert[3].replace("_proj", "");
      const merged = `blk.${expert[1]}.ffn_${which}_exps.weight`;
      const list = experts.get(merged) ?? [];
      list[Number(expert[2])] = tensor;
      experts.set(merged, list);
      continue;
    }
    const [, module, suffix] = /^(.+)\.(weight|bias)$/.exec(name)!;
    const stem = stemOf(module, config);
    if (config.model_type === "lfm2" && stem.endsWith("ffn_up")) intermediate = tensor.shape[0];
    add(`${stem}.${suffix}`, tensor);
  }
  for (const [name, list] of experts) {
    const data = new Float32Array(list.length * list[0].data.length);
    list.forEach((tensor, i) => {
      data.set(tensor.data, i * tensor.data.length);
    });
    add(name, { shape: [list.length, ...list[0].shape], data });
  }
  const architecture = ARCHITECTURE[config.model_type];
  const keys = metadataOf(config, intermediate);
  const entries = Object.entries(keys).map(([key, value]) => [`${architecture}.${key}`, value]);
  const ids = Object.fromEntries(
    [
      ["bos", config.bos_token_id],
      ["eos", config.eos_token_id],
      ["padding", config.pad_token_id],
    ]
      .filter(([, id]) => typeof id === "number")
      .map(([name, id]) => [`tokenizer.ggml.${name}_token_id`, u32(id)]),
  );
  const sink = memorySink("gguf");
  await writeGguf(
    await sink.create("x"),
    { "general.architecture": architecture, ...Object.fromEntries(entries), ...ids, ...options.extra },
    [...ropeTensors(config), ...tensors],
  );
  return sink.files.get("x")!;
}
