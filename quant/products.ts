/** Matrix products through ONNX Runtime: one-operator sessions, the same in Node (120 GFLOPS on 2 threads) and in a page. */
import type { InferenceSession, Tensor } from "onnxruntime-common";
import { toBytes } from "../src/onnx/external-data.ts";
import { type ElementType, Graph } from "../src/onnx/graph.ts";
import { add, splitLast } from "../src/onnx/ops.ts";
import type { Ort } from "../src/onnx/ort.ts";
import type { GramSum, MatrixProducts, ProductShape } from "../src/tensor/linalg.ts";

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
    add?: T,
  ): Promise<T> {
    const key = `${type} ${transA} ${transB} ${add !== undefined}`;
    const gemm = await session(key, () => gemmModel(type, transA, transB, add !== undefined));
    const A = new ort.Tensor(type, a, transA ? [k, m] : [m, k]);
    const B = new ort.Tensor(type, b, transB ? [n, k] : [k, n]);
    const { Y } = await gemm.run(add ? { A, B, C: new ort.Tensor(type, add, [m, n]) } : { A, B });
    return Y.data as T;
  }

  function gramSum(n: number): GramSum {
    const starts = gramStarts(n);
    const count = starts.length - 1;
    const names = Array.from({ length: count }, (_, i) => Array.from({ length: count - i }, (_, j) => `${i} ${i + j}`));
    let sums: Record<string, Tensor> = { abs: new ort.Tensor("float32", new Float32Array(n), [1, n]) };
    const width = (i: number) => starts[i + 1] - starts[i];
    for (const name of names.flat()) {
      const [i, j] = name.split(" ").map(Number);
      sums[name] = new ort.Tensor("float32", new Float32Array(width(i) * width(j)), [width(i), width(j)]);
    }
    return {
      async add(X, m) {
        const gram = await session(`gram ${n}`, () => gramModel(n));
        const feeds = Object.fromEntries(Object.entries(sums).map(([name, sum]) => [`before ${name}`, sum]));
        sums = (await gram.run({ ...feeds, X: new ort.Tensor("float32", X, [m, n]) })) as Record<string, Tensor>;
      },
      total() {
        const XX = new Float32Array(n * n);
        for (const name of names.flat()) {
          const [i, j] = name.split(" ").map(Number);
          const block = sums[name].data as Float32Array;
          for (let r = 0; r < width(i); r++) {
            const row = starts[i] + r;
            XX.set(block.subarray(r * width(j), (r + 1) * width(j)), row * n + starts[j]);
            if (i === j) continue;
            for (let c = 0; c < width(j); c++) XX[(starts[j] + c) * n + row] = block[r * width(j) + c];
          }
        }
        return { XX, abs: sums.abs.data as Float32Array };
      },
    };
  }

  return {
    gramSum,
    f32: (a, b, shape, add) => multiply("float32", a, b, shape, add),
    f64: (a, b, shape) => multiply("float64", a, b, shape),
    async dispose() {
      for (const made of sessions.values()) await (await made).release();
      sessions.clear();
    },
  };
}

/** Y (m, n) = op(A) op(B), plus C */
function gemmModel(type: ElementType, transA: boolean, transB: boolean, withC: boolean): Promise<Uint8Array> {
  const g = new Graph("product");
  const inputs = [
    g.input("A", type, transA ? ["k", "m"] : ["m", "k"]),
    g.input("B", type, transB ? ["n", "k"] : ["k", "n"]),
    ...(withC ? [g.input("C", type, ["m", "n"])] : []),
  ];
  const attributes = { transA: Number(transA), transB: Number(transB) };
  const [Y] = g.node("Gemm", inputs, [{ type, shape: ["m", "n"], name: "Y" }], { attributes });
  g.output(Y);
  return toBytes(g);
}

/** First column of each block, and the end; small matrices are one block. */
function gramStarts(n: number): number[] {
  const blocks = n < SMALL_GRAM ? 1 : GRAM_BLOCKS;
  return Array.from({ length: blocks + 1 }, (_, i) => Math.floor((i * n) / blocks));
}

/** X (m, n) cut into column blocks; output "i j" = "before i j" + Xᵢᵀ Xⱼ for i <= j, "abs" = "before abs" + the sums of |X|. */
function gramModel(n: number): Promise<Uint8Array> {
  const g = new Graph("gram");
  const X = g.input("X", "float32", ["m", n]);
  const starts = gramStarts(n);
  const parts = splitLast(
    g,
    X,
    starts.slice(1).map((end, i) => end - starts[i]),
  );
  for (let i = 0; i < parts.length; i++) {
    for (let j = i; j < parts.length; j++) {
      const shape = [parts[i].shape[1], parts[j].shape[1]];
      const before = g.input(`before ${i} ${j}`, "float32", shape);
      const attributes = { transA: 1 };
      const [block] = g.node("Gemm", [parts[i], parts[j], before], [{ type: "float32", shape, name: `${i} ${j}` }], {
        attributes,
      });
      g.output(block);
    }
  }
  const [abs] = g.node("ReduceL1", [X, g.ints([0])], [{ type: "float32", shape: [1, n] }], {
    attributes: { keepdims: 1 },
  });
  g.output(add(g, g.input("before abs", "float32", [1, n]), abs), "abs");
  return toBytes(g);
}
