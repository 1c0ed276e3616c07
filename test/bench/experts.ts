/**
 * A mixture's experts at 4 bits: plain operators with one MatMulNBits per matrix (what Nibble exports) against QMoE, in one
 * run on the CPU provider. QMoE normalises the chosen experts' weights; where a family does not, its output is multiplied
 * by their sum.
 *   npx tsx test/bench/experts.ts [hidden,inner,experts,perToken]
 */
import * as ort from "onnxruntime-node";
import { ModelBuilder } from "../../src/arch/model-builder.ts";
import { mixtureOfExperts } from "../../src/arch/moe.ts";
import type { Weights } from "../../src/arch/weights.ts";
import { fullKv } from "../../src/kv/full.ts";
import { toBytes } from "../../src/onnx/external-data.ts";
import { float, Graph, type Value } from "../../src/onnx/graph.ts";
import * as ops from "../../src/onnx/ops.ts";
import { packCodes, packZeros } from "../../src/tensor/pack.ts";
import { dequantize, type QuantizedMatrix } from "../../src/tensor/quantized.ts";

const [hidden, inner, experts, perToken] = (process.argv[2] ?? "1024,512,64,8").split(",").map(Number);
const GROUP = 32;
let state = 1;
const random = () => {
  state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
  return state / 2 ** 32;
};

function randomMatrix(rows: number, cols: number): QuantizedMatrix {
  const groups = (rows * cols) / GROUP;
  return {
    rows,
    cols,
    bits: 4,
    groupSize: GROUP,
    codes: Uint8Array.from({ length: rows * cols }, () => Math.floor(random() * 16)),
    scales: Float32Array.from({ length: groups }, () => 0.02 * (0.5 + random())),
    zeros: Uint8Array.from({ length: groups }, () => 6 + Math.floor(random() * 4)),
  };
}

const matrices = new Map<string, QuantizedMatrix>();
for (let expert = 0; expert < experts; expert++) {
  matrices.set(`moe.experts.${expert}.gate_proj.weight`, randomMatrix(inner, hidden));
  matrices.set(`moe.experts.${expert}.up_proj.weight`, randomMatrix(inner, hidden));
  matrices.set(`moe.experts.${expert}.down_proj.weight`, randomMatrix(hidden, inner));
}
const router = Float32Array.from({ length: experts * hidden }, () => (random() - 0.5) / 2);

const weightsOf = (quantized: boolean): Weights => ({
  has: (tensor) => matrices.has(tensor) || tensor === "moe.gate.weight",
  shape: (tensor) => {
    const matrix = matrices.get(tensor);
    return matrix ? [matrix.rows, matrix.cols] : [experts, hidden];
  },
  load: async (tensor) => (matrices.has(tensor) ? dequantize(matrices.get(tensor)!) : router),
  quantized: (tensor) => {
    const matrix = matrices.get(tensor);
    return quantized && matrix ? { ...matrix, symmetric: false, load: async () => matrix } : undefined;
  },
});
const builderOf = (g: Graph, quantized: boolean) =>
  new ModelBuilder(g, {
    weights: weightsOf(quantized),
    kv: fullKv(),
    maxPositions: 1,
    scaleType: "float32",
    accuracyLevel: 4,
    fuseLinears: true,
  });

async function plain(quantized: boolean): Promise<ort.InferenceSession> {
  const g = new Graph("plain");
  const m = builderOf(g, quantized);
  const x = g.input("x", "float32", ["batch", "seq", hidden]);
  g.output(mixtureOfExperts(m, x, "moe", { experts, perToken, normalised: false, activation: "silu" }), "y");
  return ort.InferenceSession.create(await toBytes(g));
}

/** QMoE wants gate and up interleaved row by row, all experts in one tensor. */
async function fused(): Promise<ort.InferenceSession> {
  const g = new Graph("fused");
  const m = builderOf(g, true);
  const x = g.input("x", "float32", ["batch", "seq", hidden]);
  const tokens = ops.reshape(g, x, [-1, hidden], ["tokens", hidden]);
  const logits = m.router(tokens, "moe.gate");
  const part = (name: string, rows: number, cols: number, interleaved: readonly string[]) => {
    const sources = Array.from({ length: experts }, (_, e) =>
      interleaved.map((linear) => matrices.get(`moe.experts.${e}.${linear}.weight`)!),
    );
    const gather = (pick: (matrix: QuantizedMatrix) => Uint8Array, width: number) => {
      const out = new Uint8Array(experts * rows * width);
      sources.forEach((group, expert) => {
        group.forEach((matrix, which) => {
          const packed = pick(matrix);
          for (let row = 0; row < matrix.rows; row++) {
            const to = (expert * rows + row * group.length + which) * width;
            out.set(packed.subarray(row * width, (row + 1) * width), to);
          }
        });
      });
      return out;
    };
    const scaleBytes = ({ scales }: QuantizedMatrix) =>
      new Uint8Array(scales.buffer, scales.byteOffset, scales.byteLength);
    const groups = cols / GROUP;
    return {
      codes: g.initializer(`${name}/codes`, "uint8", [experts, rows, cols / 2], gather(packCodes, cols / 2)),
      scales: g.initializer(`${name}/scales`, "float32", [experts, rows, groups], gather(scaleBytes, groups * 4)),
      zeros: g.initializer(
        `${name}/zeros`,
        "uint8",
        [experts, rows, groups / 2],
        gather((matrix) => packZeros(matrix)!, groups / 2),
      ),
    };
  };
  const up = part("up", 2 * inner, hidden, ["gate_proj", "up_proj"]);
  const down = part("down", hidden, inner, ["down_proj"]);
  const none: (Value | undefined)[] = [undefined, undefined, undefined];
  const [mixed] = g.node(
    "QMoE",
    [tokens, logits, up.codes, up.scales, undefined, down.codes, down.scales, undefined, ...none, up.zeros, down.zeros],
    [{ type: "float32", shape: ["tokens", hidden] }],
    {
      domain: "com.microsoft",
      attributes: {
        k: perToken,
        activation_type: "swiglu",
        swiglu_fusion: 1,
        activation_alpha: float(1),
        activation_beta: float(0),
        normalize_routing_weights: 1,
        expert_weight_bits: 4,
        block_size: GROUP,
      },
    },
  );
  const [chosen] = ops.topK(g, ops.softmax(g, logits), perToken);
  g.output(ops.reshapeLike(g, ops.mul(g, mixed, ops.reduceSum(g, chosen, 1, true)), x), "y");
  return ort.InferenceSession.create(await toBytes(g));
}

const sessions = { float: await plain(false), "MatMulNBits per expert": await plain(true), QMoE: await fused() };
for (const tokens of [1, 16]) {
  const data = Float32Array.from({ length: tokens * hidden }, () => 2 * random() - 1);
  const x = new ort.Tensor("float32", data, [1, tokens, hidden]);
  const reference = (await sessions.float.run({ x })).y.data as Float32Array;
  for (const [name, session] of Object.entries(sessions)) {
    let best = Number.POSITIVE_INFINITY;
    let y = reference;
    for (let run = 0; run < 8; run++) {
      const started = performance.now();
      y = (await session.run({ x })).y.data as Float32Array;
      best = Math.min(best, performance.now() - started);
    }
    const error = reference.reduce((worst, value, i) => Math.max(worst, Math.abs(value - y[i])), 0);
    console.log(`${tokens} tokens, ${name}: best ${best.toFixed(2)} ms, off by ${error.toExponential(1)} at most`);
  }
}
