/**
 * config.json against the tensors, before anything is computed: a config that asks for fewer layers or another head
 * count than the weights have would otherwise give a model that runs and is wrong. Only keys that are there are checked.
 */
import { NibbleError } from "../errors.ts";
import type { TensorInfo } from "./checkpoint.ts";
import type { JsonObject } from "./json.ts";

/** `bad_weights` names the tensor that contradicts the config. */
export function checkShapes(config: JsonObject, tensors: ReadonlyMap<string, TensorInfo>, where: string): void {
  const key = (...names: string[]) => names.find((name) => typeof config[name] === "number");
  const number = (name: string | undefined): number | undefined => (name ? (config[name] as number) : undefined);
  const layersKey = key("num_hidden_layers", "n_layer");
  const expertsKey = key("num_local_experts", "num_experts");
  const hidden = number(key("hidden_size", "n_embd"));
  const heads = number(key("num_attention_heads", "n_head"));
  const kvHeads = number(key("num_key_value_heads")) ?? heads;
  const headDim = number(key("head_dim")) ?? (hidden && heads ? hidden / heads : undefined);

  const expected: [RegExp, readonly (number | undefined)[], string][] = [
    [/(^|\.)(embed_tokens|wte|embed_in)\.weight$/, [number("vocab_size"), hidden], "vocab_size and hidden_size"],
    [/^(lm_head|embed_out)\.weight$/, [number("vocab_size"), hidden], "vocab_size and hidden_size"],
    [/(^|\.)wpe\.weight$/, [number(key("n_positions")), hidden], "n_positions and n_embd"],
    [/\.self_attn\.q_proj\.weight$/, [times(heads, headDim), hidden], "num_attention_heads and head_dim"],
    [/\.self_attn\.[kv]_proj\.weight$/, [times(kvHeads, headDim), hidden], "num_key_value_heads and head_dim"],
  ];
  for (const [name, { shape }] of tensors) {
    const layer = Number(/(?:^|\.)(?:layers|h)\.(\d+)\./.exec(name)?.[1] ?? -1);
    const expert = Number(/\.experts\.(\d+)\./.exec(name)?.[1] ?? -1);
    const beyond = [
      [layer, layersKey, "layer"],
      [expert, expertsKey, "expert"],
    ] as const;
    for (const [index, countKey, what] of beyond) {
      const count = number(countKey);
      if (count === undefined || index < count) continue;
      throw new NibbleError(
        "bad_weights",
        `${where}: tensor "${name}" belongs to ${what} ${index}, but config.json's ${countKey} is ${count}.`,
        { param: name },
      );
    }
    const rule = expected.find(([pattern]) => pattern.test(name));
    if (!rule || rule[1].every((dim, axis) => dim === undefined || dim === shape[axis])) continue;
    const wanted = rule[1].map((dim) => dim ?? "any").join(", ");
    throw new NibbleError(
      "bad_weights",
      `${where}: tensor "${name}" is [${shape.join(", ")}], but config.json's ${rule[2]} ask for [${wanted}].`,
      { param: name },
    );
  }
}

function times(a: number | undefined, b: number | undefined): number | undefined {
  return a === undefined || b === undefined ? undefined : a * b;
}
