/**
 * A forward pass that holds one block's weights at a time: the model's own float graph, run block by block over windows
 * of text. Memory is one block plus the windows' hidden states, whatever the model's size.
 */
import type { InferenceSession } from "onnxruntime-common";
import type { Model } from "../arch/index.ts";
import type { WeightInput } from "../arch/model-builder.ts";
import { gatherRows, rowsOf, type Weights } from "../arch/weights.ts";
import { blockGraph, embeddingGraph, headGraph } from "../export/graphs.ts";
import { sha256Hex } from "../hash.ts";
import { fullKv } from "../kv/full.ts";
import { toBytes } from "../onnx/external-data.ts";
import type { Graph } from "../onnx/graph.ts";
import type { Ort } from "../onnx/ort.ts";

/** Hidden states of one window, (seq, hidden). */
export type Hidden = Float32Array;

interface LoadedBlock {
  readonly session: InferenceSession;
  /** Weights as feeds, read once for all windows. */
  readonly feeds: InferenceSession.FeedsType;
}

export class BlockForward {
  constructor(
    private readonly ort: Ort,
    readonly model: Model,
    private readonly weights: Weights,
    /** Longest window, in tokens. */
    private readonly maxPositions: number,
    private readonly sessionOptions: InferenceSession.SessionOptions = {},
    /** Blocks of one structure share a session: their weights are inputs. Several models may share them too. */
    private readonly sessions = new Map<string, Promise<InferenceSession>>(),
  ) {}

  /** Token ids of each window -> its hidden states before the first block. */
  async embed(windows: readonly (readonly number[])[]): Promise<Hidden[]> {
    // of the table no more rows than the text has tokens
    const used = [...new Set(windows.flat())].sort((a, b) => a - b);
    const placeOf = new Map(used.map((id, place) => [id, place]));
    const table = `${this.model.arch.embeddingName}.weight`;
    const graph = embeddingGraph(this.model, {
      weights: {
        ...this.weights,
        shape: (tensor) =>
          tensor === table ? [used.length, this.weights.shape(table)[1]] : this.weights.shape(tensor),
        load: (tensor) => (tensor === table ? gatherRows(this.weights, table, used) : this.weights.load(tensor)),
      },
      kv: fullKv({ cached: false }),
      maxPositions: this.maxPositions,
    });
    const session = await this.ort.InferenceSession.create(await toBytes(graph), this.sessionOptions);
    try {
      const hidden: Hidden[] = [];
      for (const ids of windows) {
        const places = ids.map((id) => placeOf.get(id)!);
        const input_ids = this.ints(places, [1, ids.length]);
        const feeds: Record<string, InstanceType<Ort["Tensor"]>> = { input_ids };
        if (session.inputNames.includes("attention_mask")) feeds.attention_mask = this.mask(ids.length);
        hidden.push((await session.run(feeds)).output.data as Float32Array);
      }
      return hidden;
    } finally {
      await session.release();
    }
  }

  /** Hidden states of every window after one block, in place of those before it. */
  async block(layer: number, hidden: Hidden[], signal?: AbortSignal): Promise<void> {
    const { session, feeds } = await this.loadBlock(layer);
    const { hiddenSize } = this.model.config;
    for (const [i, x] of hidden.entries()) {
      signal?.throwIfAborted();
      const seq = x.length / hiddenSize;
      const hidden_states = new this.ort.Tensor("float32", x, [1, seq, hiddenSize]);
      const { output } = await session.run({ ...feeds, hidden_states, attention_mask: this.mask(seq) });
      hidden[i] = output.data as Float32Array;
    }
  }

  /** Logits (seq, vocab) of each window, one at a time: they are the largest tensor of all. */
  async *logits(hidden: readonly Hidden[]): AsyncGenerator<Float32Array> {
    const head = await this.head(0, this.headRows);
    for (const x of hidden) yield head(x);
  }

  /** Token ids that have a logit. */
  get headRows(): number {
    const { arch, config } = this.model;
    return this.weights.shape(`${arch.headName(config)}.weight`)[0];
  }

  /** The head for the token ids [first, end): hidden states (seq, hidden) -> logits (seq, end - first). */
  async head(first: number, end: number): Promise<(x: Hidden) => Promise<Float32Array>> {
    const { arch, config } = this.model;
    const { weights } = this;
    const name = arch.headName(config);
    const isCut = (tensor: string) => tensor === `${name}.weight` || tensor === `${name}.bias`;
    const { graph, builder } = headGraph(this.model, {
      weights: {
        ...weights,
        shape: (tensor) => (isCut(tensor) ? weights.shape(tensor).with(0, end - first) : weights.shape(tensor)),
        load: (tensor) => (isCut(tensor) ? rowsOf(weights, tensor, first, end) : weights.load(tensor)),
      },
      kv: fullKv({ cached: false }),
      maxPositions: this.maxPositions,
      weightInputName: (tensor) => tensor,
    });
    const { session, feeds } = await this.load(graph, builder.weightInputs);
    return async (x) => {
      const hidden_states = new this.ort.Tensor("float32", x, [1, x.length / config.hiddenSize, config.hiddenSize]);
      return (await session.run({ ...feeds, hidden_states }, ["logits"])).logits.data as Float32Array;
    };
  }

  private async loadBlock(layer: number): Promise<LoadedBlock> {
    const blockName = this.model.arch.blockName(layer);
    const { graph, builder } = blockGraph(this.model, layer, {
      weights: this.weights,
      kv: fullKv({ cached: false }),
      maxPositions: this.maxPositions,
      weightInputName: (tensor) => tensor.replace(blockName, "block"),
    });
    return this.load(graph, builder.weightInputs);
  }

  /** A graph whose weights are inputs; graphs of one structure share a session. */
  private async load(graph: Graph, weightInputs: ReadonlyMap<string, WeightInput>): Promise<LoadedBlock> {
    const bytes = await toBytes(graph);
    const key = sha256Hex(bytes);
    let session = this.sessions.get(key);
    if (!session) {
      session = this.ort.InferenceSession.create(bytes, this.sessionOptions);
      this.sessions.set(key, session);
    }
    return { session: await session, feeds: await this.readWeights(weightInputs) };
  }

  private async readWeights(inputs: ReadonlyMap<string, WeightInput>): Promise<InferenceSession.FeedsType> {
    const feeds: Record<string, InstanceType<Ort["Tensor"]>> = {};
    for (const [name, { shape, load }] of inputs) feeds[name] = new this.ort.Tensor("float32", await load(), shape);
    return feeds;
  }

  private mask(length: number): InstanceType<Ort["Tensor"]> {
    return new this.ort.Tensor("int64", new BigInt64Array(length).fill(1n), [1, length]);
  }

  private ints(ids: readonly number[], shape: readonly number[]): InstanceType<Ort["Tensor"]> {
    return new this.ort.Tensor("int64", BigInt64Array.from(ids, BigInt), shape);
  }

  async dispose(): Promise<void> {
    for (const session of this.sessions.values()) await (await session).release();
    this.sessions.clear();
  }
}
