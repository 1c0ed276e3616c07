/**
 * Rotation (QuaRot: Ashkboos et al. 2024, arXiv 2404.00456; SpinQuant's R1 and R2: Liu et al. 2024, arXiv 2405.16406):
 * the residual stream, and each head's values, in another orthogonal basis, where no channel stands out. The function
 * stays; every matrix of a block becomes another one.
 *   R1 (hidden, hidden)     signs · Hadamard / sqrt(hidden); r' = r R1 on the whole residual stream
 *   R2 (headDim, headDim)   the same for a head's values, one for the model
 *   W' = W diag(gain) R1    what reads the stream through an RMSNorm, whose gain becomes 1
 *   W' = R1ᵀ W, b' = b R1   what writes to it
 *   v' = R2ᵀ v, o' = o R2   head by head
 * Embedding and head stay as they are, tied or not, quantized or not: the stream is turned once behind the embedding and
 * turned back before the last norm, by one matrix R1 of hidden² floats (SmolLM2: 1.3 MB in float32, 0.6 % of the
 * multiplications of a token). An untied head would cost 56 MB in float16 there instead.
 */
import type { Architecture, ScalingGroup } from "../src/arch/architecture.ts";
import type { Model } from "../src/arch/index.ts";
import { floatWeights } from "../src/arch/weights.ts";
import { NibbleError } from "../src/errors.ts";
import { blockGraph } from "../src/export/graphs.ts";
import { plainAttention } from "../src/kv/plain.ts";
import type { Node } from "../src/onnx/graph.ts";
import * as ops from "../src/onnx/ops.ts";
import { Random } from "../src/runtime/random.ts";
import type { FloatTensor } from "../src/tensor/dtypes.ts";
import { type Hadamard, hadamard, timesHadamard } from "../src/tensor/hadamard.ts";

/** The matrix R1 of a rotated model, under which the graph finds it. */
export const ROTATION = "rotation.weight";

/** The same function in rotated bases. Errors: `unsupported` for families whose residual stream is read without an RMSNorm
 * or written to by something else than a linear, and for sizes without a Hadamard matrix. */
export function rotateModel(model: Model, seed: number): Model {
  const { arch, config, checkpoint } = model;
  const random = new Random(seed);
  const R1 = new Rotation(config.hiddenSize, random);
  const R2 = new Rotation(config.headDim, random);
  const changes = new Map<string, (tensor: FloatTensor) => Promise<Float32Array>>();
  for (let layer = 0; layer < config.layers; layer++) rotateBlock(model, layer, R1, R2, changes);
  const identity = Float32Array.from({ length: config.hiddenSize ** 2 }, (_, i) =>
    Number(i % (config.hiddenSize + 1) === 0),
  );
  const shape = [config.hiddenSize, config.hiddenSize];
  const readTensor = async (name: string): Promise<FloatTensor> => {
    if (name === ROTATION) return { shape, data: R1.rows(identity) };
    const tensor = await checkpoint.readTensor(name);
    const change = changes.get(name);
    return change ? { ...tensor, data: await change(tensor) } : tensor;
  };
  const rotated: Architecture = {
    ...arch,
    embed: (m, ids, c) => ops.matMul(m.g, arch.embed(m, ids, c), m.tensor(ROTATION)),
    finalNorm: (m, x, c) => arch.finalNorm(m, ops.matMul(m.g, x, ops.transpose(m.g, m.tensor(ROTATION), [1, 0])), c),
  };
  return {
    arch: rotated,
    config,
    checkpoint: {
      ...checkpoint,
      tensors: new Map([...checkpoint.tensors, [ROTATION, { name: ROTATION, storedAs: "f32", shape }]]),
      readTensor,
      readRows: async (name, start, end) => {
        if (checkpoint.readRows && !changes.has(name) && name !== ROTATION)
          return checkpoint.readRows(name, start, end);
        const whole = await readTensor(name);
        const width = whole.data.length / whole.shape[0];
        return { shape: whole.shape.with(0, end - start), data: whole.data.subarray(start * width, end * width) };
      },
    },
  };
}

/** x -> x · diag(signs) · H / sqrt(size) */
class Rotation {
  private readonly H: Hadamard;
  private readonly signs: Float64Array;

  constructor(
    readonly size: number,
    random: Random,
  ) {
    this.H = hadamard(size);
    this.signs = Float64Array.from({ length: size }, () => (random.uniform() < 0.5 ? -1 : 1));
  }

  /** Each stretch of `size` numbers as a row vector times R; `gains` multiply the numbers first. */
  rows(data: Float32Array, gains?: Float32Array): Float32Array {
    const { size, signs } = this;
    const x = Float64Array.from(data, (value, i) => value * signs[i % size] * (gains ? gains[i % size] : 1));
    timesHadamard(x, this.H);
    return Float32Array.from(x);
  }

  /** Rᵀ W: each column of W (rows, cols), in stretches of `size` rows. */
  columns(data: Float32Array, cols: number): Float32Array {
    const rows = data.length / cols;
    return transposed(this.rows(transposed(data, rows, cols)), cols, rows);
  }
}

function transposed(data: Float32Array, rows: number, cols: number): Float32Array {
  const out = new Float32Array(data.length);
  for (let row = 0; row < rows; row++)
    for (let col = 0; col < cols; col++) out[col * rows + row] = data[row * cols + col];
  return out;
}

/** Adds what happens to a block's tensors. */
function rotateBlock(
  model: Model,
  layer: number,
  R1: Rotation,
  R2: Rotation,
  changes: Map<string, (tensor: FloatTensor) => Promise<Float32Array>>,
): void {
  const { checkpoint, config } = model;
  const groups = model.arch.scalingGroups(layer, config);
  const { norms, writers } = residualUsers(model, layer);
  const then = (tensor: string, change: (data: Float32Array, cols: number) => Float32Array | Promise<Float32Array>) => {
    if (!checkpoint.tensors.has(tensor)) return;
    const before = changes.get(tensor);
    changes.set(tensor, async (whole) => change(before ? await before(whole) : whole.data, whole.shape.at(-1)!));
  };
  for (const norm of norms) {
    const group = groups.find(({ from }) => "norm" in from && from.norm === norm);
    if (!group) throw unsupported(model, `what reads ${norm} is no linear`);
    const offset = "norm" in group.from ? (group.from.gainOffset ?? 0) : 0;
    const gains = async () => (await checkpoint.readTensor(`${norm}.weight`)).data.map((gain) => gain + offset);
    for (const reader of group.to) then(`${reader}.weight`, async (data) => R1.rows(data, await gains()));
    then(`${norm}.weight`, (data) => new Float32Array(data.length).fill(1 - offset));
  }
  for (const group of groups) {
    if (!("linear" in group.from) || !turnsHeads(group, model)) continue;
    then(`${group.from.linear}.weight`, (data, cols) => R2.columns(data, cols));
    then(`${group.from.linear}.bias`, (data) => R2.rows(data));
    for (const reader of group.to) then(`${reader}.weight`, (data) => R2.rows(data));
  }
  for (const writer of writers) {
    then(`${writer}.weight`, (data, cols) => R1.columns(data, cols));
    then(`${writer}.bias`, (data) => R1.rows(data));
  }
}

/** Whether a group is v -> o, each head's channels in their own order. */
function turnsHeads({ from, to, source }: ScalingGroup, { config, checkpoint }: Model): boolean {
  if (!("linear" in from) || !source) return false;
  const { heads, kvHeads, headDim } = config;
  const shape = (linear: string) => checkpoint.tensors.get(`${linear}.weight`)!.shape;
  if (shape(from.linear)[0] !== kvHeads * headDim || shape(to[0])[1] !== heads * headDim) return false;
  return Array.from({ length: heads * headDim }, (_, c) => c).every(
    (c) => source(c) === Math.floor(c / headDim / (heads / kvHeads)) * headDim + (c % headDim),
  );
}

/** The norms that read the residual stream of a block, and the linears whose outputs are added to it. */
function residualUsers(model: Model, layer: number): { norms: string[]; writers: string[] } {
  const { graph, builder, input } = blockGraph(model, layer, {
    weights: floatWeights(model.checkpoint),
    kv: plainAttention(),
    maxPositions: 1,
    fused: false,
    weightInputName: (tensor) => tensor,
  });
  const producer = new Map(graph.nodes.flatMap((node) => node.outputs.map((name) => [name, node] as const)));
  const stream = new Set([input.name]);
  const norms: string[] = [];
  const writers: string[] = [];
  const withoutSuffix = (tensor: string) => tensor.replace(/\.[^.]+$/, "");
  /** Follows bias and constant factors back to the product. */
  const writerOf = (node: Node | undefined): string | undefined => {
    if (!node) return undefined;
    const weight = node.inputs.find((name) => builder.weightInputs.has(name));
    if (node.opType === "FusedMatMul" && weight) return withoutSuffix(weight);
    const isScaling = node.opType === "Mul" && node.inputs.some((name) => graph.initializers.has(name));
    const isBias = node.opType === "Add" && weight !== undefined;
    if (!isScaling && !isBias) return undefined;
    return writerOf(node.inputs.map((name) => producer.get(name)).find((made) => made !== undefined));
  };
  for (const node of graph.nodes) {
    const read = node.inputs.filter((name) => stream.has(name));
    if (read.length === 0 || node.opType === "Shape") continue;
    if (node.opType === "SimplifiedLayerNormalization") norms.push(withoutSuffix(node.inputs[1]));
    else if (node.opType === "Identity") stream.add(node.outputs[0]);
    else if (node.opType === "Add") {
      for (const name of node.inputs) {
        if (stream.has(name)) continue;
        const writer = writerOf(producer.get(name));
        if (!writer) throw unsupported(model, "something else than a linear is added to the residual stream");
        writers.push(writer);
      }
      stream.add(node.outputs[0]);
    } else throw unsupported(model, `${node.opType} reads the residual stream`);
  }
  return { norms, writers };
}

function unsupported({ config }: Model, why: string): NibbleError {
  return new NibbleError(
    "unsupported",
    `${config.modelType} cannot be rotated: ${why}. Rotation needs blocks that read the residual stream through RMSNorms and add linears to it; leave --rotate out.`,
    { param: "rotate" },
  );
}
