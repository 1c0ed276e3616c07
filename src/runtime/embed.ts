/** Text embeddings from a graph that gives final hidden states: mean over the tokens, length 1. */
import type { InferenceSession, Tensor } from "onnxruntime-common";
import { type Ort, typedArray } from "../onnx/ort.ts";
import { graphShape } from "./session.ts";

/** hidden_states (1, tokens, hidden) of one prompt -> (hidden) */
export async function embedPrompt(
  ort: Ort,
  session: InferenceSession,
  prompt: readonly number[],
): Promise<Float32Array> {
  const { cache, positionIds } = graphShape("embed", session.inputMetadata, session.outputMetadata);
  const feeds: Record<string, Tensor> = {
    input_ids: new ort.Tensor("int64", BigInt64Array.from(prompt, BigInt), [1, prompt.length]),
    attention_mask: new ort.Tensor("int64", new BigInt64Array(prompt.length).fill(1n), [1, prompt.length]),
  };
  if (positionIds) {
    feeds.position_ids = new ort.Tensor("int64", BigInt64Array.from(prompt.keys(), BigInt), [1, prompt.length]);
  }
  for (const { past, type, heads, headDim } of cache) {
    feeds[past] = new ort.Tensor(type, typedArray(type, 0), [1, heads, 0, headDim]);
  }
  const { hidden_states: hidden } = await session.run(feeds, ["hidden_states"]);
  const size = hidden.dims[2];
  const data = hidden.data as Float32Array;
  const mean = new Float32Array(size);
  for (let at = 0; at < data.length; at += size) for (let i = 0; i < size; i++) mean[i] += data[at + i];
  let squares = 0;
  for (const value of mean) squares += value * value;
  const norm = Math.sqrt(squares) || 1; // the mean's own divisor cancels
  return mean.map((value) => value / norm);
}
