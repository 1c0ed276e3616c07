/** What a decoder graph's inputs say about the cache that it wants, before anything is loaded. */
import type { ModelProto } from "../onnx/proto.ts";
import { REST_CAPACITY } from "./int4-tiers.ts";

export interface CacheNeed {
  /** The name for `--kv`: "fp32", "fp16", "int8", "int4", "int4-static"; "none" without a cache. */
  readonly format: string;
  /** Of keys, values and what belongs to them, per token, all layers; of the body where there are two tiers. */
  readonly bytesPerToken: number;
  /** What a sequence takes beside that: the tail in float16, where there are two tiers. */
  readonly fixedBytes: number;
}

/** TensorProto.DataType of a cache -> its name for `--kv`, and bytes per element. */
const TYPES: Readonly<Record<number, { readonly format: string; readonly sizeBytes: number }>> = {
  1: { format: "fp32", sizeBytes: 4 },
  10: { format: "fp16", sizeBytes: 2 },
  3: { format: "int8", sizeBytes: 1 },
  2: { format: "int4", sizeBytes: 1 }, // two codes to a byte; the shape counts bytes
};

export function cacheNeed({ graph }: ModelProto): CacheNeed {
  const input = (name: string) => graph.input.find((info) => info.name === name);
  const tiered = input("past_body_length") !== undefined;
  const scales = input("past_body_scales");
  let bytesPerToken = scales ? sizeOf(scales.type, 1) : 0;
  let fixedBytes = 0;
  let format = tiered ? (scales ? "int4" : "int4-static") : "";
  for (const { name, type } of graph.input) {
    if (tiered && /^past_key_values\.\d+\.(key|value)$/.test(name)) {
      fixedBytes += REST_CAPACITY * sizeOf(type, 1) * sizeOf(type, 3) * Uint16Array.BYTES_PER_ELEMENT;
    }
    if (!(tiered ? /^past_body\.\d+\.(key|value)$/ : /^past_key_values\.\d+\.(key|value)$/).test(name)) continue;
    const element = TYPES[type?.tensorType?.elemType ?? 0];
    format ||= element?.format ?? "";
    bytesPerToken += sizeOf(type, 1) * sizeOf(type, 3) * (element?.sizeBytes ?? 0);
  }
  return { format: format || "none", bytesPerToken, fixedBytes };
}

function sizeOf(type: ModelProto["graph"]["input"][number]["type"], axis: number): number {
  return Number(type?.tensorType?.shape?.dim[axis]?.dimValue ?? 0);
}
