/** Runs operator cases in a page; the same page holds one build of the runtime. */
import type * as Ort from "onnxruntime-common";

/** A case as JSON carries it. */
export interface CaseJson {
  readonly model: string;
  readonly feeds: Readonly<
    Record<string, { readonly type: Ort.Tensor.Type; readonly dims: readonly number[]; readonly data: string }>
  >;
  readonly outputs: readonly string[];
}

/** Each output's bytes in base64 and its shape, or what went wrong. */
export type CaseOutcome =
  | { readonly outputs: readonly { readonly dims: readonly number[]; readonly data: string }[] }
  | { readonly error: string };

/** Self-contained: its source is sent to the page as it stands. */
export async function drive(ort: typeof Ort, device: string, cases: readonly CaseJson[]): Promise<CaseOutcome[]> {
  const decode = (text: string) => Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
  const encode = (bytes: Uint8Array) => {
    let text = "";
    for (const byte of bytes) text += String.fromCharCode(byte);
    return btoa(text);
  };
  const arrays: Record<string, (buffer: ArrayBuffer) => Ort.Tensor.DataType> = {
    float32: (buffer) => new Float32Array(buffer),
    float16: (buffer) => new Uint16Array(buffer),
    int64: (buffer) => new BigInt64Array(buffer),
    int32: (buffer) => new Int32Array(buffer),
    int8: (buffer) => new Int8Array(buffer),
    uint8: (buffer) => new Uint8Array(buffer),
    bool: (buffer) => new Uint8Array(buffer),
  };
  const outcomes: CaseOutcome[] = [];
  for (const { model, feeds, outputs } of cases) {
    try {
      const session = await ort.InferenceSession.create(decode(model), { executionProviders: [device] });
      const tensors = Object.fromEntries(
        Object.entries(feeds).map(([name, { type, dims, data }]) => [
          name,
          new ort.Tensor(type, arrays[type](decode(data).buffer), dims),
        ]),
      );
      const results = await session.run(tensors);
      outcomes.push({
        outputs: outputs.map((name) => {
          const { data, dims } = results[name];
          const { buffer, byteOffset, byteLength } = data as Uint8Array;
          return { dims, data: encode(new Uint8Array(buffer, byteOffset, byteLength)) };
        }),
      });
      await session.release();
    } catch (error) {
      outcomes.push({ error: String(error) });
    }
  }
  return outcomes;
}
