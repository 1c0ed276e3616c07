/** A folder of golden/models opened, exported to a float graph and run: what the reference computed, and what we do. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import * as ort from "onnxruntime-node";
import { type Model, resolveModel } from "../../src/arch/index.ts";
import { floatWeights, type Weights } from "../../src/arch/weights.ts";
import type { Checkpoint } from "../../src/checkpoint/checkpoint.ts";
import { readSafetensorsHeader } from "../../src/checkpoint/safetensors.ts";
import { decoderGraph } from "../../src/export/graphs.ts";
import { fullKv } from "../../src/kv/full.ts";
import { nodeFile } from "../../src/node/files.ts";
import { toBytes } from "../../src/onnx/external-data.ts";
import { type FloatTensor, toFloat32 } from "../../src/tensor/dtypes.ts";
import { openInMemory } from "../fixtures/open-in-memory.ts";

export interface Golden {
  readonly inputIds: readonly number[];
  readonly logits: FloatTensor;
  /** (layers + 1, tokens, hidden) */
  readonly hiddenStates: FloatTensor;
  readonly batch: { readonly input_ids: number[][]; readonly attention_mask: number[][] };
  readonly batchLogits: FloatTensor;
  readonly greedy: readonly number[];
}

export async function readGolden(folder: string): Promise<Golden> {
  const json = JSON.parse(readFileSync(join(folder, "golden.json"), "utf8"));
  const source = await nodeFile(join(folder, "golden.safetensors"));
  const { tensors } = await readSafetensorsHeader(source);
  const read = async (name: string): Promise<FloatTensor> => {
    const { shape, offset, sizeBytes, dtype } = tensors.get(name)!;
    return { shape, data: toFloat32(await source.read(offset, sizeBytes), dtype) };
  };
  const golden = {
    inputIds: json.input_ids,
    logits: await read("logits"),
    hiddenStates: await read("hidden_states"),
    batch: json.batch,
    batchLogits: await read("batch_logits"),
    greedy: json.greedy.tokens,
  };
  await source.close?.();
  return golden;
}

export async function openModel(folder: string): Promise<Model> {
  return resolveModel(await openInMemory(folder));
}

/** The same checkpoint with other config keys. */
export function withConfig(checkpoint: Checkpoint, changes: Record<string, unknown>): Checkpoint {
  return { ...checkpoint, config: { ...checkpoint.config, ...changes } };
}

export type Outputs = ort.InferenceSession.OnnxValueMapType;

/** A decoder graph on ONNX Runtime. */
export class Decoder {
  constructor(private readonly session: ort.InferenceSession) {}

  static async of(model: Model, weights: Weights = floatWeights(model.checkpoint)): Promise<Decoder> {
    const graph = decoderGraph(model, { weights, kv: fullKv(), maxPositions: 128, hiddenStates: "all" });
    return new Decoder(await ort.InferenceSession.create(await toBytes(graph)));
  }

  /** `past`: the outputs of the step before. */
  run(ids: readonly number[][], mask: readonly number[][], past?: Outputs): Promise<Outputs> {
    const int64 = (rows: readonly number[][]) =>
      new ort.Tensor("int64", BigInt64Array.from(rows.flat(), BigInt), [rows.length, rows[0].length]);
    const feeds: Record<string, ort.OnnxValue> = {
      input_ids: int64(ids),
      attention_mask: int64(mask),
      num_logits_to_keep: new ort.Tensor("int64", BigInt64Array.of(0n), []),
    };
    for (const { name, ...input } of this.session.inputMetadata) {
      if (!name.startsWith("past") || !input.isTensor) continue;
      // symbolic: the batch, and nothing in the cache so far
      const dims = input.shape.map((dim, axis) => (typeof dim === "number" ? dim : axis === 0 ? ids.length : 0));
      const empty = new ort.Tensor("float32", new Float32Array(dims.reduce((a, b) => a * b)), dims);
      feeds[name] = past?.[name.replace("past_key_values", "present").replace("past_conv", "present_conv")] ?? empty;
    }
    return this.session.run(feeds);
  }

  /** Greedy continuation with the cache: one token a step. */
  async greedy(prompt: readonly number[], count: number): Promise<number[]> {
    const tokens: number[] = [];
    let outputs = await this.run([[...prompt]], [prompt.map(() => 1)]);
    while (true) {
      tokens.push(argmaxOfLastRow(outputs.logits));
      if (tokens.length === count) return tokens;
      const mask = Array<number>(prompt.length + tokens.length).fill(1);
      outputs = await this.run([[tokens.at(-1)!]], [mask], outputs);
    }
  }

  dispose(): Promise<void> {
    return this.session.release();
  }
}

function argmaxOfLastRow(logits: ort.OnnxValue): number {
  const { data, dims } = logits as ort.Tensor;
  const row = (data as Float32Array).subarray(-dims[2]);
  return row.indexOf(row.reduce((best, x) => Math.max(best, x), Number.NEGATIVE_INFINITY));
}

export function floats(value: ort.OnnxValue): Float32Array {
  return (value as ort.Tensor).data as Float32Array;
}

/** Greatest absolute difference; NaN anywhere is Infinity. */
export function maxDifference(a: ArrayLike<number>, b: ArrayLike<number>): number {
  let worst = a.length === b.length ? 0 : Number.POSITIVE_INFINITY;
  for (let i = 0; i < a.length; i++) {
    const difference = Math.abs(a[i] - b[i]);
    worst = difference >= 0 ? Math.max(worst, difference) : Number.POSITIVE_INFINITY;
  }
  return worst;
}
