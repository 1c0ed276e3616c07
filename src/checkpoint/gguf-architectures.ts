/**
 * GGUF's architectures and their Hugging Face twins: one row each, stating names, config and what the conversion
 * (llama.cpp, conversion/*.py) did to the numbers, so that it can be undone.
 */
import {
  type Config,
  common,
  expertCounts,
  type GgufModel,
  gemma,
  has,
  headCounts,
  layerNormEps,
  layerTypes,
  llamaLike,
  permuted,
  qwenMoe,
  rmsNormed,
  rowsOf,
} from "./gguf-config.ts";

/** What was done to a tensor's numbers when the GGUF was made. */
export type Rearranged =
  | "rotary" // q and k rows: the two rotary halves of each head interleaved
  | "plusOne" // gemma's norms: 1 added
  | "transposed" // gpt2's Conv1D: (in, out) stored as (out, in)
  | "qkvBlocks" // gpt_neox: per head [q, k, v] stored as all q, all k, all v
  | "squeezed"; // lfm2's convolution: (channels, 1, kernel) stored as (channels, kernel)

export interface GgufArchitecture {
  /** transformers' class, for config.json's `architectures`. */
  readonly className: string;
  /** Blocks are `<blocks>.<n>.`. */
  readonly blocks: string;
  /** GGUF name without suffix -> Hugging Face name without suffix, outside of the blocks. */
  readonly outer: Readonly<Record<string, string>>;
  /** The same within a block. */
  readonly block: Readonly<Record<string, string>>;
  /** Where expert n's matrices go: "mlp.experts" + ".n." + "gate_proj". */
  readonly experts?: { readonly at: string; readonly gate: string; readonly up: string; readonly down: string };
  readonly rearranged?: Readonly<Record<string, Rearranged>>;
  /** Tensors of divisors per rotary frequency that config() understands. */
  readonly ropeFactors?: readonly string[];
  config(model: GgufModel): Config;
}

const LLAMA_OUTER = { token_embd: "model.embed_tokens", output_norm: "model.norm", output: "lm_head" };
const LLAMA_ATTENTION = {
  attn_q: "self_attn.q_proj",
  attn_k: "self_attn.k_proj",
  attn_v: "self_attn.v_proj",
  attn_output: "self_attn.o_proj",
};
const QK_NORM = { attn_q_norm: "self_attn.q_norm", attn_k_norm: "self_attn.k_norm" };
const GATED_MLP = { ffn_gate: "mlp.gate_proj", ffn_up: "mlp.up_proj", ffn_down: "mlp.down_proj" };
const PRE_NORMS = { attn_norm: "input_layernorm", ffn_norm: "post_attention_layernorm" };
const LLAMA_BLOCK = { ...PRE_NORMS, ...LLAMA_ATTENTION, ...GATED_MLP };
const MLP_EXPERTS = { at: "mlp.experts", gate: "gate_proj", up: "up_proj", down: "down_proj" };
const ROTARY = { attn_q: "rotary", attn_k: "rotary" } as const;

const GEMMA_BLOCK = {
  attn_norm: "input_layernorm",
  post_attention_norm: "post_attention_layernorm",
  ffn_norm: "pre_feedforward_layernorm",
  post_ffw_norm: "post_feedforward_layernorm",
  ...LLAMA_ATTENTION,
  ...GATED_MLP,
};
const GEMMA_NORMS = {
  attn_norm: "plusOne",
  post_attention_norm: "plusOne",
  ffn_norm: "plusOne",
  post_ffw_norm: "plusOne",
  output_norm: "plusOne",
  attn_q_norm: "plusOne",
  attn_k_norm: "plusOne",
} as const;

export const GGUF_ARCHITECTURES: Readonly<Record<string, GgufArchitecture>> = {
  llama: {
    className: "LlamaForCausalLM",
    blocks: "model.layers",
    outer: LLAMA_OUTER,
    block: { ...LLAMA_BLOCK, ffn_gate_inp: "block_sparse_moe.gate" },
    experts: { at: "block_sparse_moe.experts", gate: "w1", up: "w3", down: "w2" },
    rearranged: ROTARY,
    ropeFactors: ["rope_freqs"],
    config(model) {
      const { metadata } = model;
      const config = permuted(model);
      const window = metadata.number("attention.sliding_window", 0);
      if (metadata.number("expert_count", 0) > 0) {
        const { count, used } = expertCounts(model);
        const sparse = { num_local_experts: count, num_experts_per_tok: used, sliding_window: window || null };
        return { model_type: "mixtral", architectures: ["MixtralForCausalLM"], ...config, ...sparse };
      }
      metadata.expect("expert_used_count", 0);
      return window > 0
        ? { model_type: "mistral", architectures: ["MistralForCausalLM"], ...config, sliding_window: window }
        : { model_type: "llama", ...config };
    },
  },

  granite: {
    className: "GraniteForCausalLM",
    blocks: "model.layers",
    outer: LLAMA_OUTER,
    block: LLAMA_BLOCK,
    rearranged: ROTARY,
    ropeFactors: ["rope_freqs"],
    config(model) {
      const { metadata } = model;
      return {
        model_type: "granite",
        ...permuted(model),
        embedding_multiplier: metadata.number("embedding_scale", 1),
        attention_multiplier: metadata.number("attention.scale", 1),
        residual_multiplier: metadata.number("residual_scale", 1),
        logits_scaling: metadata.number("logit_scale", 1),
      };
    },
  },

  smollm3: {
    className: "SmolLM3ForCausalLM",
    blocks: "model.layers",
    outer: LLAMA_OUTER,
    block: LLAMA_BLOCK,
    rearranged: ROTARY,
    ropeFactors: ["rope_freqs"],
    config(model) {
      const layers = model.metadata.int("block_count");
      // llama.cpp's constant n_no_rope_layer_step = 4; the file does not say it
      const rotated = Array.from({ length: layers }, (_, layer) => ((layer + 1) % 4 === 0 ? 0 : 1));
      return {
        model_type: "smollm3",
        ...permuted(model),
        no_rope_layers: rotated,
        no_rope_layer_interval: 4,
        use_sliding_window: false,
      };
    },
  },

  qwen2: {
    className: "Qwen2ForCausalLM",
    blocks: "model.layers",
    outer: LLAMA_OUTER,
    block: LLAMA_BLOCK,
    config: (model) => ({ model_type: "qwen2", ...rmsNormed(model), use_sliding_window: false }),
  },

  qwen3: {
    className: "Qwen3ForCausalLM",
    blocks: "model.layers",
    outer: LLAMA_OUTER,
    block: { ...LLAMA_BLOCK, ...QK_NORM },
    config: (model) => ({
      model_type: "qwen3",
      ...rmsNormed(model),
      head_dim: headCounts(model).headDim,
      attention_bias: has(model, "blk.0.attn_q.bias"),
      use_sliding_window: false,
    }),
  },

  qwen2moe: {
    className: "Qwen2MoeForCausalLM",
    blocks: "model.layers",
    outer: LLAMA_OUTER,
    block: {
      ...LLAMA_BLOCK,
      ffn_gate_inp: "mlp.gate",
      ffn_gate_inp_shexp: "mlp.shared_expert_gate",
      ffn_gate_shexp: "mlp.shared_expert.gate_proj",
      ffn_up_shexp: "mlp.shared_expert.up_proj",
      ffn_down_shexp: "mlp.shared_expert.down_proj",
    },
    experts: MLP_EXPERTS,
    config: (model) => ({
      model_type: "qwen2_moe",
      ...qwenMoe(model, false),
      shared_expert_intermediate_size: rowsOf(model, "ffn_gate_shexp"),
    }),
  },

  qwen3moe: {
    className: "Qwen3MoeForCausalLM",
    blocks: "model.layers",
    outer: LLAMA_OUTER,
    block: { ...LLAMA_BLOCK, ...QK_NORM, ffn_gate_inp: "mlp.gate" },
    experts: MLP_EXPERTS,
    config: (model) => ({
      model_type: "qwen3_moe",
      ...qwenMoe(model, true),
      head_dim: headCounts(model).headDim,
      attention_bias: has(model, "blk.0.attn_q.bias"),
    }),
  },

  olmoe: {
    className: "OlmoeForCausalLM",
    blocks: "model.layers",
    outer: LLAMA_OUTER,
    block: { ...LLAMA_BLOCK, ...QK_NORM, ffn_gate_inp: "mlp.gate" },
    experts: MLP_EXPERTS,
    config(model) {
      const { count, used } = expertCounts(model);
      const clip = model.metadata.number("attention.clamp_kqv", 0);
      const sparse = { num_experts: count, num_experts_per_tok: used, norm_topk_prob: false };
      return { model_type: "olmoe", ...rmsNormed(model), ...sparse, clip_qkv: clip || null };
    },
  },

  olmo2: {
    className: "Olmo2ForCausalLM",
    blocks: "model.layers",
    outer: LLAMA_OUTER,
    block: {
      post_attention_norm: "post_attention_layernorm",
      post_ffw_norm: "post_feedforward_layernorm",
      ...LLAMA_ATTENTION,
      ...QK_NORM,
      ...GATED_MLP,
    },
    // with `attention.sliding_window` it would be olmo3, which finish() refuses
    config: (model) => ({ model_type: "olmo2", ...rmsNormed(model) }),
  },

  gemma2: {
    className: "Gemma2ForCausalLM",
    blocks: "model.layers",
    outer: LLAMA_OUTER,
    block: GEMMA_BLOCK,
    rearranged: GEMMA_NORMS,
    config(model) {
      const { metadata } = model;
      // llama.cpp's defaults, for files from before these keys
      return {
        model_type: "gemma2",
        ...gemma(model, 46),
        attn_logit_softcapping: metadata.number("attn_logit_softcapping", 50),
        final_logit_softcapping: metadata.number("final_logit_softcapping", 30),
        sliding_window: metadata.int("attention.sliding_window", 4096),
      };
    },
  },

  gemma3: {
    className: "Gemma3ForCausalLM",
    blocks: "model.layers",
    outer: LLAMA_OUTER,
    block: { ...GEMMA_BLOCK, ...QK_NORM },
    rearranged: GEMMA_NORMS,
    config(model) {
      const { metadata } = model;
      const config = gemma(model, 62);
      const window = metadata.number("attention.sliding_window", 0);
      return {
        model_type: "gemma3_text",
        ...config,
        rope_theta: metadata.number("rope.freq_base", 1e6),
        rope_local_base_freq: metadata.number("rope.freq_base_swa", 10000),
        sliding_window: window || null,
        // no window: every layer is global; else every sixth one unless the file says otherwise
        layer_types: layerTypes(model, config.num_hidden_layers as number, window > 0 ? 6 : 1),
        final_logit_softcapping: metadata.number("final_logit_softcapping", 0) || null,
      };
    },
  },

  phi2: {
    className: "PhiForCausalLM",
    blocks: "model.layers",
    outer: { token_embd: "model.embed_tokens", output_norm: "model.final_layernorm", output: "lm_head" },
    block: {
      attn_norm: "input_layernorm",
      ...LLAMA_ATTENTION,
      attn_output: "self_attn.dense",
      ffn_up: "mlp.fc1",
      ffn_down: "mlp.fc2",
    },
    config: (model) => ({
      model_type: "phi",
      ...llamaLike(model),
      hidden_act: "gelu_new",
      layer_norm_eps: layerNormEps(model),
      qk_layernorm: false,
    }),
  },

  phi3: {
    className: "Phi3ForCausalLM",
    blocks: "model.layers",
    outer: LLAMA_OUTER,
    block: {
      ...PRE_NORMS,
      attn_qkv: "self_attn.qkv_proj",
      attn_output: "self_attn.o_proj",
      ffn_up: "mlp.gate_up_proj",
      ffn_down: "mlp.down_proj",
    },
    ropeFactors: ["rope_factors_long", "rope_factors_short"],
    config(model) {
      const { metadata, ropeFactors } = model;
      const config = rmsNormed(model);
      const original = metadata.int("rope.scaling.original_context_length", config.max_position_embeddings as number);
      const attentionFactor = metadata.number("rope.scaling.attn_factor", 1);
      const short = ropeFactors.get("rope_factors_short");
      const long = ropeFactors.get("rope_factors_long");
      if (short && long) {
        config.rope_scaling = {
          type: "longrope",
          short_factor: short,
          long_factor: long,
          attention_factor: attentionFactor,
        };
      }
      const window = metadata.number("attention.sliding_window", 0);
      return {
        model_type: "phi3",
        ...config,
        original_max_position_embeddings: original,
        sliding_window: window || null, // 0 is how llama.cpp writes "none"
      };
    },
  },

  gpt2: {
    className: "GPT2LMHeadModel",
    blocks: "transformer.h",
    outer: {
      token_embd: "transformer.wte",
      position_embd: "transformer.wpe",
      output_norm: "transformer.ln_f",
      output: "lm_head",
    },
    block: {
      attn_norm: "ln_1",
      attn_qkv: "attn.c_attn",
      attn_output: "attn.c_proj",
      ffn_norm: "ln_2",
      ffn_up: "mlp.c_fc",
      ffn_down: "mlp.c_proj",
    },
    rearranged: { attn_qkv: "transposed", attn_output: "transposed", ffn_up: "transposed", ffn_down: "transposed" },
    config(model) {
      const { metadata } = model;
      const hiddenSize = metadata.int("embedding_length");
      const inner = metadata.int("feed_forward_length", 4 * hiddenSize);
      const positions = metadata.int("context_length");
      return {
        model_type: "gpt2",
        ...common(model),
        n_embd: hiddenSize,
        n_layer: metadata.int("block_count"),
        n_head: headCounts(model).heads,
        n_positions: positions,
        n_ctx: positions,
        n_inner: inner === 4 * hiddenSize ? null : inner,
        layer_norm_epsilon: layerNormEps(model),
        activation_function: "gelu_new",
        tie_word_embeddings: !has(model, "output.weight"),
      };
    },
  },

  gptneox: {
    className: "GPTNeoXForCausalLM",
    blocks: "gpt_neox.layers",
    outer: { token_embd: "gpt_neox.embed_in", output_norm: "gpt_neox.final_layer_norm", output: "embed_out" },
    block: {
      ...PRE_NORMS,
      attn_qkv: "attention.query_key_value",
      attn_output: "attention.dense",
      ffn_up: "mlp.dense_h_to_4h",
      ffn_down: "mlp.dense_4h_to_h",
    },
    rearranged: { attn_qkv: "qkvBlocks" },
    config(model) {
      const { metadata } = model;
      const { num_key_value_heads, rope_theta, partial_rotary_factor, ...config } = llamaLike(model);
      return {
        model_type: "gpt_neox",
        ...config,
        hidden_act: "gelu",
        layer_norm_eps: layerNormEps(model),
        rotary_pct: partial_rotary_factor ?? 1,
        rotary_emb_base: rope_theta,
        use_parallel_residual: metadata.boolean("use_parallel_residual", true),
      };
    },
  },

  stablelm: {
    className: "StableLmForCausalLM",
    blocks: "model.layers",
    outer: LLAMA_OUTER,
    block: LLAMA_BLOCK,
    config: (model) => ({
      model_type: "stablelm",
      ...llamaLike(model),
      hidden_act: "silu",
      layer_norm_eps: layerNormEps(model),
      use_qkv_bias: has(model, "blk.0.attn_q.bias"),
      qk_layernorm: false, // a file with these norms has tensors that no name above takes
      use_parallel_residual: model.metadata.boolean("use_parallel_residual", false),
    }),
  },

  lfm2: {
    className: "Lfm2ForCausalLM",
    blocks: "model.layers",
    outer: {
      token_embd: "model.embed_tokens",
      token_embd_norm: "model.embedding_norm", // it is the last norm in spite of its name
      output_norm: "model.embedding_norm",
      output: "lm_head",
    },
    block: {
      attn_norm: "operator_norm",
      ffn_norm: "ffn_norm",
      ffn_gate: "feed_forward.w1",
      ffn_up: "feed_forward.w3",
      ffn_down: "feed_forward.w2",
      ...LLAMA_ATTENTION,
      attn_output: "self_attn.out_proj",
      attn_q_norm: "self_attn.q_layernorm",
      attn_k_norm: "self_attn.k_layernorm",
      "shortconv.conv": "conv.conv",
      "shortconv.in_proj": "conv.in_proj",
      "shortconv.out_proj": "conv.out_proj",
    },
    rearranged: { "shortconv.conv": "squeezed" },
    config(model) {
      const { metadata } = model;
      const { intermediate_size, tie_word_embeddings, ...config } = llamaLike(model);
      const perLayer = metadata.perLayer("attention.head_count_kv", metadata.int("block_count"));
      return {
        model_type: "lfm2",
        ...config,
        norm_eps: metadata.number("attention.layer_norm_rms_epsilon"),
        conv_L_cache: metadata.int("shortconv.l_cache"),
        conv_bias: has(model, "blk.0.shortconv.conv.bias"),
        block_ff_dim: intermediate_size,
        block_auto_adjust_ff_dim: false, // the file gives the adjusted size
        layer_types: perLayer.map((kvHeads) => (kvHeads > 0 ? "full_attention" : "conv")),
        tie_embedding: tie_word_embeddings,
      };
    },
  },
};
