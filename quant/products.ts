/** Matrix products through ONNX Runtime: one-operator sessions, the same in Node (120 GFLOPS on 2 threads) and in a page. */
import type { InferenceSession } from "onnxruntime-common";
import { toBytes } from "../src/onnx/external-data.ts";
import { type ElementType, Graph } from "../src/onnx/graph.ts";
import { splitLast } from "../src/onnx/ops.ts";
import type { Ort } from "../src/onnx/ort.ts";
import type { MatrixProducts, ProductShape } from "../src/tensor/linalg.ts";

/**
 * Worker threads sleep between calls instead of spinning: quantizers alternate products with work of their own, and
 * spinning would burn the core that this work runs on.
 */
export const CALM: InferenceSession.SessionOptions = {
  enableCpuMemArena: false, // one arena a session, each as large as its largest product, would stay until the end
  extra: { session: { intra_op: { allow_spinning: "0" } } },
};

/** Column blocks of a symmetric product: 4 compute 10 of 16 blocks; more make the products small. */
const GRAM_BLOCKS = 4;
/** Below this a plain product is as fast. */
const SMALL_GRAM = 256;

export function ortProducts(ort: Ort, sessionOptions: InferenceSession.SessionOptions = {}): MatrixProducts {
  const options = { ...CALM, ...sessionOptions };
  const sessions = new Map<string, Promise<InferenceSession>>();

  function session(key: string, model: () => Promise<Uint8Array>): Promise<InferenceSession> {
    let made = sessions.get(key);
    if (!made) {
      made = model().then((bytes) => ort.InferenceSession.create(bytes, options));
      sessions.set(key, made);
    }
    return made;
  }

  async function multiply<T extends Float32Array | Float64Array>(
    type: "float32" | "float64",
    a: T,
    b: T,
    { m, k, n, transA = false, transB = false }: ProductShape,
  ): Promise<T> {
    const gemm = await session(`${type} ${transA} ${transB}`, () => gemmModel(type, transA, transB));
    const A = new ort.Tensor(type, a, transA ? [k, m] : [m, k]);
    const B = new ort.Tensor(type, b, transB ? [n, k] : [k, n]);
    const { C } = await gemm.run({ A, B });
    return C.data as T;
  }

  async function gram(x: Float32Array, m: number, n: number): Promise<Float32Array> {
    if (n < SMALL_GRAM) return multiply("float32", x, x, { m: n, k: m, n, transA: true });
    const starts = gramStarts(n);
    const gramSession = await session(`gram ${n}`, () => gramModel(n));
    const blocks = await gramSession.run({ X: new ort.Tensor("float32", x, [m, n]) });
    const out = new Float32Array(n * n);
    for (let i = 0; i < GRAM_BLOCKS; i++) {
      for (let j = i; j < GRAM_BLOCKS; j++) {
        const block = blocks[`${i} ${j}`].data as Float32Array;
        const width = starts[j + 1] - starts[j];
        for (let r = 0; r < starts[i + 1] - starts[i]; r++) {
          const row = starts[i] + r;
          out.set(block.subarray(r * width, (r + 1) * width), row * n + starts[j]);
          if (i === j) continue;
          for (let c = 0; c < width; c++) out[(starts[j] + c) * n + row] = block[r * width + c];
        }
      }
    }
    return out;
  }

  return {
    gram,
    f32: (a, b, shape) => multiply("float32", a, b, shape),
    f64: (a, b, shape) => multiply("float64", a, b, shape),
    async dispose() {
      for (const made of sessions.values()) await (await made).release();
      sessions.clear();
    },
  };
}

/** C (m, n) = op(A) op(B) */
function gemmModel(type: ElementType, transA: boolean, transB: boolean): Promise<Uint8Array> {
  const g = new Graph("product");
  const A = g.input("A", type, transA ? ["k", "m"] : ["m", "k"]);
  const B = g.input("B", type, transB ? ["n", "k"] : ["k", "n"]);
  const attributes = { transA: Number(transA), transB: Number(transB) };
  const [C] = g.node("Gemm", [A, B], [{ type, shape: ["m", "n"], name: "C" }], { attributes });
  g.output(C);
  return toBytes(g);
}

/** First column of each block, and the end. */
function gramStarts(n: number): number[] {
  return Array.from({ length: GRAM_BLOCKS + 1 }, (_, i) => Math.floor((i * n) / GRAM_BLOCKS));
}

/** X (m, n) cut into column blocks; output "i j" = Xiᵀ Xj for i <= j. */
function gramModel(n: number): Promise<Uint8Array> {
  const g = new Graph("gram");
  const X = g.input("X", "float32", ["m", n]);
  const starts = gramStarts(n);
  const parts = splitLast(
    g,
    X,
    starts.slice(1).map((end, i) => end - starts[i]),
  );
  for (let i = 0; i < GRAM_BLOCKS; i++) {
    for (let j = i; j < GRAM_BLOCKS; j++) {
      const shape = [parts[i].shape[1], parts[j].shape[1]];
      const attributes = { transA: 1 };
      const [block] = g.node("Gemm", [parts[i], parts[j]], [{ type: "float32", shape, name: `${i} ${j}` }], {
        attributes,
      });
      g.output(block);
    }
  }
  return toBytes(g);
}
