/** text_config as published multimodal checkpoints write it, read by the architecture it names. */
import { expect, test } from "vitest";
import { resolveConfig } from "../../src/arch/index.ts";
import { textPart } from "../../src/checkpoint/text-part.ts";

const tensors = (vocab: number, hidden: number, layers: number) =>
  new Map([
    ["language_model.model.embed_tokens.weight", { shape: [vocab, hidden] }],
    [`language_model.model.layers.${layers - 1}.mlp.up_proj.weight`, { shape: [1, hidden] }],
    ["vision_tower.patch_embedding.weight", { shape: [1] }],
  ]);

test.each<[string, Record<string, unknown>, ReturnType<typeof tensors>, Record<string, unknown>]>([
  [
    "gemma-3-4b",
    {
      model_type: "gemma3",
      boi_token_index: 255999,
      eos_token_id: [1, 106],
      mm_tokens_per_image: 256,
      text_config: {
        hidden_size: 2560,
        intermediate_size: 10240,
        model_type: "gemma3_text",
        num_hidden_layers: 34,
        rope_scaling: { factor: 8, rope_type: "linear" },
        sliding_window: 1024,
      },
    },
    tensors(262208, 2560, 34),
    { modelType: "gemma3_text", layers: 34, heads: 8, kvHeads: 4, headDim: 256, vocabSize: 262208, tied: true },
  ],
  [
    "llava-1.5-7b",
    {
      model_type: "llava",
      image_token_index: 32000,
      text_config: { max_position_embeddings: 4096, model_type: "llama", rms_norm_eps: 1e-5, vocab_size: 32064 },
    },
    tensors(32064, 4096, 32),
    { modelType: "llama", layers: 32, heads: 32, kvHeads: 32, headDim: 128, vocabSize: 32064 },
  ],
  [
    "SmolVLM-256M",
    {
      model_type: "idefics3",
      scale_factor: 4,
      text_config: {
        _flash_attn_2_enabled: true,
        head_dim: 64,
        hidden_size: 576,
        intermediate_size: 1536,
        is_llama_config: true,
        max_position_embeddings: 8192,
        model_type: "llama",
        neftune_noise_alpha: 0,
        num_attention_heads: 9,
        num_hidden_layers: 30,
        num_key_value_heads: 3,
        perceiver_config: { model_type: "vllama3" },
        pixel_shuffle_factor: 4,
        qk_layer_norms: false,
        rms_norm_eps: 1e-5,
        rope_interleaved: false,
        rope_theta: 100000,
        use_resampler: false,
        vocab_size: 49280,
      },
    },
    tensors(49280, 576, 30),
    { modelType: "llama", layers: 30, heads: 9, kvHeads: 3, headDim: 64, vocabSize: 49280 },
  ],
  [
    "Qwen2.5-VL-3B",
    {
      model_type: "qwen2_5_vl",
      text_config: {
        model_type: "qwen2_5_vl_text",
        hidden_size: 2048,
        intermediate_size: 11008,
        max_position_embeddings: 128000,
        num_attention_heads: 16,
        num_hidden_layers: 36,
        num_key_value_heads: 2,
        rms_norm_eps: 1e-6,
        rope_scaling: { mrope_section: [16, 24, 24], rope_type: "default", type: "default" },
        rope_theta: 1e6,
        use_sliding_window: false,
        vision_token_id: 151654,
        vocab_size: 151936,
      },
    },
    tensors(151936, 2048, 36),
    { modelType: "qwen2", layers: 36, heads: 16, kvHeads: 2, headDim: 128, vocabSize: 151936 },
  ],
])("%s", (name, config, map, expected) => {
  const part = textPart(config, map, name);
  expect(part.notes[0]).toMatch(/multimodal.*1 other tensors/);
  expect([...part.tensors.keys()][0]).toBe("model.embed_tokens.weight");
  expect(resolveConfig(part.config, name).config).toMatchObject(expected);
});
