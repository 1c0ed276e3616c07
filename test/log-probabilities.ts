/** What a decoder graph says of a text, and how far two graphs are apart. Every function is its own source in a page, too. */
import type * as ort from "onnxruntime-node";

/** (tokens * vocab) natural logarithms. @param logits (tokens * vocab) */
export function logSoftmax(logits: Float32Array, vocab: number): number[] {
  const out: number[] = [];
  for (let at = 0; at < logits.length; at += vocab) {
    const row = logits.subarray(at, at + vocab);
    const max = row.reduce((a, b) => Math.max(a, b));
    const norm = max + Math.log(row.reduce((sum, value) => sum + Math.exp(value - max), 0));
    for (const value of row) out.push(value - norm);
  }
  return out;
}

/** Logits of a text, `chunk` tokens a run with a float32 cache between them: (1, tokens of the run, vocab) each. */
export async function* logitsOf(
  runtime: Pick<typeof ort, "Tensor">,
  session: ort.InferenceSession,
  ids: readonly number[],
  chunk: number,
): AsyncGenerator<ort.Tensor> {
  const int64 = (values: readonly number[], dims: number[]) =>
    new runtime.Tensor("int64", BigInt64Array.from(values, BigInt), dims);
  let past: ort.InferenceSession.OnnxValueMapType = {};
  for (let start = 0; start < ids.length; start += chunk) {
    const part = ids.slice(start, start + chunk);
    const total = start + part.length;
    const feeds: Record<string, ort.OnnxValue> = {
      input_ids: int64(part, [1, part.length]),
      attention_mask: int64(Array(total).fill(1), [1, total]),
      num_logits_to_keep: int64([0], []),
    };
    for (const input of session.inputMetadata) {
      if (!input.isTensor || !input.name.startsWith("past")) continue;
      const dims = input.shape.map((size, axis) => (typeof size === "number" ? size : axis === 0 ? 1 : 0));
      const empty = new runtime.Tensor("float32", new Float32Array(0), dims);
      feeds[input.name] = past[input.name.replace("past_key_values", "present")] ?? empty;
    }
    past = await session.run(feeds);
    yield past.logits as ort.Tensor;
  }
}

/** (tokens * vocab) log-probabilities at every position, from runs of `chunk` tokens. */
export async function logProbabilities(
  runtime: Pick<typeof ort, "Tensor">,
  session: ort.InferenceSession,
  ids: readonly number[],
  chunk: number,
): Promise<number[]> {
  const out: number[] = [];
  for await (const { data, dims } of logitsOf(runtime, session, ids, chunk)) {
    for (const value of logSoftmax(data as Float32Array, dims[2])) out.push(value);
  }
  return out;
}

/** Mean over positions of KL(reference || other), in nats. */
export function meanKl(reference: readonly number[], other: readonly number[], vocab: number): number {
  const sum = reference.reduce((total, p, at) => total + Math.exp(p) * (p - other[at]), 0);
  return sum / (reference.length / vocab);
}
