/** The keys of config.json that nearly every family has, and what they mean where they are missing. */
import type { DecoderConfig } from "./architecture.ts";
import type { ConfigReader } from "./config.ts";
import { ACTIVATIONS, type Activation } from "./model-builder.ts";
import { type Rope, type RopeOptions, readRope } from "./rope.ts";

export interface RotaryDecoderConfig extends DecoderConfig {
  readonly activation: Activation;
  readonly rope: Rope;
}

/** Where a family's config class differs from LlamaConfig in the keys' names and defaults. */
export interface ConfigDefaults extends Partial<Omit<RopeOptions, "headDim" | "maxPositions">> {
  readonly tied?: boolean;
  readonly headDim?: number;
  readonly kvHeads?: number;
  readonly maxPositions?: number;
  readonly activation?: Activation;
  readonly activationKey?: string;
}

export function readDecoderConfig(config: ConfigReader, defaults: ConfigDefaults = {}): RotaryDecoderConfig {
  const heads = config.int("num_attention_heads");
  const hiddenSize = config.int("hidden_size");
  const headDim = config.int("head_dim", defaults.headDim ?? hiddenSize / heads);
  if (!Number.isInteger(headDim))
    throw config.error("num_attention_heads", `does not divide hidden_size ${hiddenSize}`);
  const kvHeads = config.int("num_key_value_heads", defaults.kvHeads ?? heads);
  if (heads % kvHeads) throw config.error("num_key_value_heads", `${kvHeads} does not divide ${heads} heads`);
  const maxPositions = config.int("max_position_embeddings", defaults.maxPositions ?? 2048);
  config.ignore("intermediate_size"); // the matrices say it
  return {
    modelType: config.modelType,
    layers: config.int("num_hidden_layers"),
    hiddenSize,
    vocabSize: config.int("vocab_size"),
    heads,
    kvHeads,
    headDim,
    maxPositions,
    tied: config.boolean("tie_word_embeddings", defaults.tied ?? false),
    activation: config.choice(defaults.activationKey ?? "hidden_act", ACTIVATIONS, defaults.activation ?? "silu"),
    rope: readRope(config, { ...defaults, headDim, maxPositions }),
  };
}
