/**
 * The vocabulary in which architecture files state a model: layers by checkpoint name on top of ONNX operators. What a
 * linear layer becomes (float product, MatMulNBits, graph input) depends on the weights, not on the architecture.
 */
import { NibbleError } from "../errors.ts";
import type { KvGraph } from "../kv/policy.ts";
import { elementSize, type Graph, type Value } from "../onnx/graph.ts";
import * as ops from "../onnx/ops.ts";
import { f32ToF16 } from "../tensor/dtypes.ts";
import { embeddingLookup, quantizedLinear } from "./quantized-layers.ts";
import { type Rope, rotaryTable } from "./rope.ts";
import type { Weights } from "./weights.ts";

export interface AttentionSpec {
  readonly layer: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  /** Default 1 / sqrt(headDim). */
  readonly scale?: number;
  /** Left out: no rotation (NoPE, learned positions). */
  readonly rope?: Rope;
  /** Positions a query sees, its own included; left out = all. */
  readonly window?: number;
  /** cap * tanh(scores / cap) before the softmax (Gemma 2). */
  readonly softcap?: number;
}

/** Linears that read one input, in the order in which they run: what calibration taps. */
export interface LinearSite {
  readonly linears: readonly string[];
  /** (batch, seq, inFeatures) */
  readonly input: Value;
}

/** A tensor that the graph takes as an input instead of holding it (calibration feeds weights block by block). */
export interface WeightInput {
  readonly tensor: string;
  readonly shape: readonly number[];
  /** In float32, transformed as the graph expects it. */
  load(): Promise<Float32Array>;
}

export interface ModelBuilderOptions {
  readonly weights: Weights;
  readonly activations?: "float32" | "float16";
  readonly kv: KvGraph;
  /** Rows of rotary tables and of learned positions. */
  readonly maxPositions: number;
  /** MatMulNBits' attribute: 4 rounds activations to int8, 0 computes in float. */
  readonly accuracyLevel?: number;
  /** How scales of quantized matrices are stored; float16 goes through a Cast that is folded when the file is opened. */
  readonly scaleType?: "float32" | "float16";
  /** One product for linears that share an input and a format. */
  readonly fuseLinears?: boolean;
  /** Gives float tensors to the graph as inputs under this name. */
  readonly weightInputName?: (tensor: string) => string;
}

/** hidden_act spellings of config.json; gelu_new, gelu_fast and gelu_pytorch_tanh are one function. */
export const ACTIVATIONS = ["silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu"] as const;

export type Activation = (typeof ACTIVATIONS)[number];

export class ModelBuilder {
  readonly weights: Weights;
  readonly activations: "float32" | "float16";
  readonly options: ModelBuilderOptions;
  readonly sites: LinearSite[] = [];
  /** By input name; filled where `weightInputName` is given. */
  readonly weightInputs = new Map<string, WeightInput>();
  private readonly packed = new Map<string, { whole: Value; index: number; count: number }>();
  private readonly shared = new Map<string, unknown>();
  private readonly casts = new Map<string, Value>();
  private cachedLengths: { seqlensK: Value; totalSequenceLength: Value } | undefined;
  private cachedPositions: Value | undefined;
  private sequence: Value | undefined;

  constructor(
    readonly g: Graph,
    options: ModelBuilderOptions,
  ) {
    this.options = options;
    this.weights = options.weights;
    this.activations = options.activations ?? "float32";
  }

  /** Tells which value carries (batch, seq) first; positions are derived from it. */
  setSequence(value: Value): void {
    this.sequence ??= value;
  }

  /** A checkpoint tensor in the activations' type; `transform` changes its float32 values on the way. */
  tensor(name: string, transform?: (data: Float32Array) => Float32Array, shape = this.weights.shape(name)): Value {
    const load = async () => {
      const data = await this.weights.load(name);
      return transform ? transform(data) : data;
    };
    return this.floatValue(name, shape, load);
  }

  private floatValue(name: string, shape: readonly number[], load: () => Promise<Float32Array>): Value {
    const inputName = this.options.weightInputName?.(name);
    if (inputName !== undefined) {
      this.weightInputs.set(inputName, { tensor: name, shape, load });
      return this.g.input(inputName, this.activations, shape);
    }
    return this.g.initializer(name, this.activations, shape, async () => this.toBytes(await load()));
  }

  /**
   * A constant in the activations' type by one Cast, however many read it. Constants are cast before anything gathers
   * from them: a WebGPU adapter without shader-f16 runs no node on float16, but those are folded when the file is opened.
   */
  castOnce(constant: Value): Value {
    const known = this.casts.get(constant.name);
    if (known) return known;
    const value = ops.cast(this.g, constant, this.activations);
    this.casts.set(constant.name, value);
    return value;
  }

  /** float32 values as bytes in the activations' type. */
  toBytes(values: Float32Array): Uint8Array {
    const typed = this.activations === "float16" ? f32ToF16(values) : values;
    return new Uint8Array(typed.buffer, typed.byteOffset, typed.length * elementSize(this.activations));
  }

  /** Rows of an embedding matrix: ids (batch, seq) -> (batch, seq, hidden). */
  embedding(ids: Value, name: string): Value {
    this.setSequence(ids);
    const tensor = `${name}.weight`;
    const quantized = this.weights.quantized(tensor);
    return quantized ? embeddingLookup(this, tensor, quantized, ids) : ops.gather(this.g, this.tensor(tensor), ids);
  }

  /** Rows of a learned position table (GPT-2): (batch, seq, hidden) */
  learnedPositions(name: string): Value {
    return ops.gather(this.g, this.tensor(`${name}.weight`), this.positions());
  }

  /** RMSNorm; `offset` is added to the gain (Gemma stores gain - 1). */
  rmsNorm(x: Value, name: string, epsilon: number, { offset = 0 }: { offset?: number } = {}): Value {
    const gain = this.tensor(`${name}.weight`, offset ? (data) => data.map((w) => w + offset) : undefined);
    return ops.simplifiedLayerNormalization(this.g, x, gain, epsilon);
  }

  /** LayerNorm with gain and, where the checkpoint has one, bias. */
  layerNorm(x: Value, name: string, epsilon: number): Value {
    const bias = this.weights.has(`${name}.bias`) ? this.tensor(`${name}.bias`) : undefined;
    return ops.layerNormalization(this.g, x, this.tensor(`${name}.weight`), bias, epsilon);
  }

  /** RMSNorm of each head by itself (Qwen3, Gemma 3): x (batch, seq, heads * headDim), gain (headDim). */
  headNorm(x: Value, name: string, heads: number, epsilon: number, { offset = 0 }: { offset?: number } = {}): Value {
    const headDim = (x.shape[2] as number) / heads;
    const split = ops.reshape(this.g, x, [0, 0, heads, headDim], [x.shape[0], x.shape[1], heads, headDim]);
    return ops.reshape(this.g, this.rmsNorm(split, name, epsilon, { offset }), [0, 0, -1], x.shape);
  }

  /**
   * LayerNorm of each head by itself: `names` has one gain (headDim) for all heads (Phi), or one for each (StableLM 2).
   */
  headLayerNorm(x: Value, names: readonly string[], heads: number, epsilon: number): Value {
    const { g } = this;
    const headDim = (x.shape[2] as number) / heads;
    const split = ops.reshape(g, x, [0, 0, heads, headDim], [x.shape[0], x.shape[1], heads, headDim]);
    const together = (value: Value) => ops.reshape(g, value, [0, 0, -1], x.shape);
    if (names.length === 1) return together(this.layerNorm(split, names[0], epsilon));
    const perHead = (part: "weight" | "bias") =>
      ops.reshape(
        g,
        ops.concat(
          g,
          names.map((name) => this.tensor(`${name}.${part}`)),
          0,
        ),
        [heads, headDim],
        [heads, headDim],
      );
    const ones = g.initializer(
      `ones/${headDim}`,
      this.activations,
      [headDim],
      this.toBytes(new Float32Array(headDim).fill(1)),
    );
    const scaled = this.mul(ops.layerNormalization(g, split, ones, undefined, epsilon), perHead("weight"));
    return together(this.weights.has(`${names[0]}.bias`) ? this.add(scaled, perHead("bias")) : scaled);
  }

  /** x Wᵀ (+ bias where the checkpoint has `name.bias`): (..., inFeatures) -> (..., outFeatures) */
  linear(x: Value, name: string): Value {
    return this.linears(x, [name])[0];
  }

  /** A small linear that stays float and is no site of calibration: the router of a mixture, the gate of a shared expert. */
  router(x: Value, name: string): Value {
    this.checkLinear(x, name);
    return this.floatLinear(x, name);
  }

  /** Several linears of one input, as one product where their formats agree. */
  linears(x: Value, names: readonly string[]): Value[] {
    this.sites.push({ linears: names, input: x });
    for (const name of names) this.checkLinear(x, name);
    const quantized = names.map((name) => this.weights.quantized(`${name}.weight`));
    const [first] = quantized;
    const alike =
      first !== undefined &&
      quantized.every(
        (w) =>
          w?.bits === first.bits &&
          w.groupSize === first.groupSize &&
          w.symmetric === first.symmetric &&
          w.scaleBits === first.scaleBits,
      );
    if (names.length > 1 && alike && this.options.fuseLinears) {
      const sizes = quantized.map((w) => w!.rows);
      const whole = quantizedLinear(
        this,
        x,
        names,
        quantized.map((w) => w!),
      );
      const parts = ops.splitLast(this.g, whole, sizes);
      for (const [index, part] of parts.entries()) this.packed.set(part.name, { whole, index, count: parts.length });
      return parts;
    }
    return names.map((name, i) => {
      const weight = quantized[i];
      return weight ? quantizedLinear(this, x, [name], [weight]) : this.floatLinear(x, name);
    });
  }

  private checkLinear(x: Value, name: string): void {
    const shape = this.weights.shape(`${name}.weight`);
    const inFeatures = x.shape.at(-1);
    if (shape.length !== 2 || (typeof inFeatures === "number" && shape[1] !== inFeatures)) {
      throw new NibbleError(
        "bad_weights",
        `${name}.weight has shape [${shape.join(", ")}]; config.json asks for [outFeatures, ${inFeatures}].`,
      );
    }
  }

  private floatLinear(x: Value, name: string): Value {
    const { g } = this;
    const tensor = `${name}.weight`;
    const product = this.options.weightInputName
      ? ops.fusedMatMul(g, x, this.tensor(tensor), { transB: true })
      : ops.matMul(g, x, this.transposed(tensor));
    return this.weights.has(`${name}.bias`) ? ops.add(g, product, this.tensor(`${name}.bias`)) : product;
  }

  /** A matrix (rows, cols) stored as (cols, rows), or, where an embedding holds it already, transposed when the file is opened. */
  private transposed(tensor: string): Value {
    const shared = this.g.initializers.get(tensor);
    if (shared) return ops.transpose(this.g, shared, [1, 0]);
    const [rows, cols] = this.weights.shape(tensor);
    return this.g.initializer(`${tensor}/transposed`, this.activations, [cols, rows], async () =>
      this.toBytes(transpose(await this.weights.load(tensor), rows, cols)),
    );
  }

  add(a: Value, b: Value): Value {
    return ops.add(this.g, a, b);
  }

  mul(a: Value, b: Value): Value {
    return ops.mul(this.g, a, b);
  }

  /** The last dimension in `count` equal parts. */
  split(x: Value, count: number): Value[] {
    return ops.splitLast(this.g, x, Array<number>(count).fill((x.shape.at(-1) as number) / count));
  }

  sigmoid(x: Value): Value {
    return ops.sigmoid(this.g, x);
  }

  /** x times a constant. */
  scale(x: Value, factor: number): Value {
    return factor === 1 ? x : ops.mul(this.g, x, this.g.scalar(factor, this.activations));
  }

  /** cap * tanh(x / cap) */
  softcap(x: Value, cap: number): Value {
    return this.scale(ops.tanh(this.g, this.scale(x, 1 / cap)), cap);
  }

  activation(x: Value, kind: Activation): Value {
    switch (kind) {
      case "silu":
      case "swish":
        return ops.quickGelu(this.g, x, 1);
      case "gelu":
        return ops.gelu(this.g, x, "none");
      case "gelu_new":
      case "gelu_fast":
      case "gelu_pytorch_tanh":
        return ops.gelu(this.g, x, "tanh");
      case "relu":
        return ops.relu(this.g, x);
    }
  }

  /** The gated MLP of most families: down(act(gate(x)) * up(x)). */
  gatedMlp(x: Value, at: string, activation: Activation): Value {
    const [gate, up] = this.linears(x, [`${at}.gate_proj`, `${at}.up_proj`]);
    return this.linear(this.mul(this.activation(gate, activation), up), `${at}.down_proj`);
  }

  /** Causal attention over the cache: q (batch, seq, heads * headDim), k and v (batch, seq, kvHeads * headDim). */
  attention(q: Value, k: Value, v: Value, spec: AttentionSpec): Value {
    const [a, b, c] = [q, k, v].map((value) => this.packed.get(value.name));
    const whole = a && b && c && a.count === 3 && a.whole === b.whole && b.whole === c.whole ? a.whole : undefined;
    return this.options.kv.attend(this, { q, k, v, packed: whole }, spec);
  }

  /** (maxPositions, rotaryDim / 2) each, in the activations' type; `pad` rotates that many more pairs by 0. */
  rotary(rope: Rope, which: "short" | "long" | "both" = "short", pad = 0): { cos: Value; sin: Value } {
    const { maxPositions } = this.options;
    const sets =
      which === "both"
        ? [rope.frequencies, rope.long!.frequencies]
        : [which === "long" ? rope.long!.frequencies : rope.frequencies];
    const half = rope.rotaryDim / 2 + pad;
    const key = `rotary/${which}/${half}/${fingerprint(sets)}`;
    const build = (part: "cos" | "sin") => async () => {
      const rows = new Float32Array(sets.length * maxPositions * half).fill(part === "cos" ? 1 : 0);
      sets.forEach((frequencies, set) => {
        const table = rotaryTable(frequencies, rope.attentionFactor, maxPositions)[part];
        for (let position = 0; position < maxPositions; position++) {
          const from = position * (half - pad);
          rows.set(table.subarray(from, from + half - pad), (set * maxPositions + position) * half);
        }
      });
      return this.toBytes(rows);
    };
    const shape = [sets.length * maxPositions, half];
    return {
      cos: this.g.initializer(`${key}/cos`, this.activations, shape, build("cos")),
      sin: this.g.initializer(`${key}/sin`, this.activations, shape, build("sin")),
    };
  }

  /** Values that every layer shares, made by the first that asks for them. */
  once<T>(key: string, make: () => T): T {
    if (!this.shared.has(key)) {
      const scope = this.g.scope;
      this.g.scope = "shared";
      this.shared.set(key, make());
      this.g.scope = scope;
    }
    return this.shared.get(key) as T;
  }

  /** attention_mask (batch, total) int64: 1 for tokens, 0 for padding on the right. */
  attentionMask(): Value {
    return this.g.input("attention_mask", "int64", ["batch_size", "total_sequence_length"]);
  }

  /** Tokens of each sequence minus 1, int32 (batch), and the longest sequence, int32 scalar. */
  lengths(): { seqlensK: Value; totalSequenceLength: Value } {
    if (this.cachedLengths) return this.cachedLengths;
    const { g } = this;
    const scope = g.scope;
    g.scope = "lengths";
    const mask = this.attentionMask();
    const seqlensK = ops.cast(g, ops.sub(g, ops.reduceSum(g, mask, 1), g.ints([1])), "int32");
    const total = ops.squeeze(g, ops.shapeOf(g, mask, 1), 0);
    this.cachedLengths = { seqlensK, totalSequenceLength: ops.cast(g, total, "int32") };
    g.scope = scope;
    return this.cachedLengths;
  }

  /** How many of the rows given now are tokens, the rest being padding: int64 (batch, 1). */
  newTokens(): Value {
    if (!this.sequence)
      throw new NibbleError("engine", "newTokens() before the graph has a sequence: call setSequence.");
    const { g } = this;
    const total = ops.reduceSum(g, this.attentionMask(), 1, true); // (batch, 1), what came before included
    const seq = ops.shapeOf(g, this.sequence, 1);
    return g.node("Min", [total, seq], [{ type: "int64", shape: ["batch_size", 1] }])[0];
  }

  /** Position of every token, int64 (batch, seq): tokens already there (none in a padded prefill) plus 0, 1, 2, ... */
  positions(): Value {
    if (this.cachedPositions) return this.cachedPositions;
    const { g } = this;
    const scope = g.scope;
    g.scope = "positions";
    if (!this.sequence)
      throw new NibbleError("engine", "positions() before the graph has a sequence: call setSequence.");
    const total = ops.reduceSum(g, this.attentionMask(), 1, true); // (batch, 1)
    const seq = ops.shapeOf(g, this.sequence, 1); // (1)
    const [past] = g.node("Max", [ops.sub(g, total, seq), g.ints([0])], [{ type: "int64", shape: ["batch_size", 1] }]);
    const range = g.node(
      "Range",
      [g.ints([0], []), ops.squeeze(g, seq, 0), g.ints([1], [])],
      [{ type: "int64", shape: ["sequence_length"] }],
    )[0];
    this.cachedPositions = ops.add(g, past, range);
    g.scope = scope;
    return this.cachedPositions;
  }
}

/** (rows, cols) -> (cols, rows), in tiles so that both sides stay in cache. */
export function transpose(data: Float32Array, rows: number, cols: number): Float32Array {
  const out = new Float32Array(data.length);
  const tile = 32;
  for (let r0 = 0; r0 < rows; r0 += tile) {
    for (let c0 = 0; c0 < cols; c0 += tile) {
      for (let r = r0; r < Math.min(rows, r0 + tile); r++) {
        for (let c = c0; c < Math.min(cols, c0 + tile); c++) out[c * rows + r] = data[r * cols + c];
      }
    }
  }
  return out;
}

/** Tells rotary tables apart by their numbers. */
function fingerprint(sets: readonly Float32Array[]): string {
  let hash = 2166136261; // FNV-1a
  for (const set of sets) {
    for (const byte of new Uint8Array(set.buffer, set.byteOffset, set.byteLength)) {
      hash = Math.imul(hash ^ byte, 16777619) >>> 0;
    }
  }
  return hash.toString(16);
}
