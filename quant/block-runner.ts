/**
 * Runs one block of the float graph over all calibration windows, segment by segment (segments.ts), with the weights of
 * the moment: those of sites already quantized, float ones for the rest. Blocks of one structure share their sessions.
 */
import type { InferenceSession, Tensor } from "onnxruntime-common";
import type { Model } from "../src/arch/index.ts";
import { floatWeights } from "../src/arch/weights.ts";
import { blockGraph } from "../src/export/graphs.ts";
import { sha256Hex } from "../src/hash.ts";
import { fullKv } from "../src/kv/full.ts";
import { toBytes } from "../src/onnx/external-data.ts";
import type { Ort } from "../src/onnx/ort.ts";
import { CALM } from "./products.ts";
import { cutAtSites, type Segment } from "./segments.ts";

/** Values of one batch of windows that cross cuts, by name. */
export type Activations = Map<string, Tensor>;

export interface OpenBlock {
  readonly segments: readonly Segment[];
  /** The linears of each site: what is quantized together. */
  readonly sites: readonly (readonly string[])[];
  /** Replaces a weight (rows, cols) by full tensor name, before the segment that reads it runs. */
  setWeight(tensor: string, data: Float32Array): void;
  /** The float weight of a linear as the checkpoint has it: "model.layers.0.mlp.up_proj" -> (rows, cols). */
  weight(linear: string): { readonly shape: readonly number[]; readonly data: Float32Array };
  /** Runs one segment on one batch: reads and extends its activations. */
  run(segment: Segment, activations: Activations): Promise<void>;
  /** Runs the whole block with the checkpoint's weights: its output, and of what segments make, what is `wanted`. */
  runFloat(input: Tensor, wanted: readonly string[]): Promise<Activations>;
  /** No more of `runFloat`: the checkpoint's weights go as they are replaced. */
  forgetFloat(): void;
}

/** What the float prefix is compared by at each site: the stream after it, or its input where it feeds no stream alone. */
export function floatName({ residual, tap }: Segment): string | undefined {
  return residual?.after ?? tap;
}

const floatNames = (segments: readonly Segment[]) => segments.flatMap((segment) => floatName(segment) ?? []);

export class BlockRunner {
  private readonly sessions = new Map<string, Promise<InferenceSession>>();

  constructor(
    private readonly ort: Ort,
    private readonly model: Model,
    private readonly maxPositions: number,
    private readonly sessionOptions: InferenceSession.SessionOptions = CALM,
  ) {}

  /** Name of the block's input in the first batch of activations. */
  static readonly input = "hidden_states";

  async open(layer: number): Promise<OpenBlock> {
    const blockName = this.model.arch.blockName(layer);
    const block = blockGraph(this.model, layer, {
      weights: floatWeights(this.model.checkpoint),
      kv: fullKv({ cached: false }),
      maxPositions: this.maxPositions,
      weightInputName: (tensor) => tensor.replace(blockName, "block"),
    });
    const segments = cutAtSites(block);
    const { weightInputs, sites } = block.builder;
    const feeds: Record<string, Tensor> = {};
    for (const [name, { shape, load }] of weightInputs) {
      feeds[name] = new this.ort.Tensor("float32", await load(), shape);
    }
    const inputOf = new Map([...weightInputs].map(([name, { tensor }]) => [tensor, name]));
    // OLMo 2's first linears read the block's input itself: nothing runs before them
    const sessions = await Promise.all(
      segments.map(async ({ graph }) => (graph.nodes.length > 0 ? this.session(await toBytes(graph)) : undefined)),
    );
    let float = { ...feeds };
    const { graph, output } = block;
    for (const name of floatNames(segments)) {
      const value = graph.values.get(name);
      if (value && !graph.outputs.some((other) => other.name === name)) graph.output(value);
    }
    let whole: Promise<InferenceSession> | undefined;
    const mask = ({ dims: [batch, seq] }: Tensor) =>
      new this.ort.Tensor("int64", new BigInt64Array(batch * seq).fill(1n), [batch, seq]);
    return {
      segments,
      sites: sites.map(({ linears }) => linears),
      setWeight: (tensor, data) => {
        const name = inputOf.get(tensor)!;
        feeds[name] = new this.ort.Tensor("float32", data, feeds[name].dims);
      },
      weight: (linear) => {
        const { dims, data } = feeds[inputOf.get(`${linear}.weight`)!];
        return { shape: dims, data: data as Float32Array };
      },
      run: async (segment, activations) => {
        const session = sessions[segments.indexOf(segment)];
        if (!session || segment.writes.length === 0) return;
        const inputs: Record<string, Tensor> = {};
        for (const name of segment.reads) inputs[name] = activations.get(name)!;
        for (const name of segment.weights) inputs[name] = feeds[name];
        if (segment.graph.inputs.some(({ name }) => name === "attention_mask")) {
          inputs.attention_mask = mask([...activations.values()][0]);
        }
        const results = await session.run(inputs);
        for (const name of segment.writes) activations.set(name, results[name] as Tensor);
      },
      runFloat: async (input, wanted) => {
        whole ??= toBytes(graph).then((bytes) => this.session(bytes));
        const inputs: Record<string, Tensor> = { ...float, [BlockRunner.input]: input };
        if (graph.inputs.some(({ name }) => name === "attention_mask")) inputs.attention_mask = mask(input);
        const made = [...new Set([output.name, ...wanted])].filter((name) => name !== BlockRunner.input);
        const results = await (await whole).run(inputs, made);
        const values: Activations = new Map(made.map((name) => [name, results[name] as Tensor]));
        return wanted.includes(BlockRunner.input) ? values.set(BlockRunner.input, input) : values;
      },
      forgetFloat: () => {
        float = {};
      },
    };
  }

  private session(bytes: Uint8Array): Promise<InferenceSession> {
    const key = sha256Hex(bytes);
    let session = this.sessions.get(key);
    if (!session) {
      session = this.ort.InferenceSession.create(bytes, this.sessionOptions);
      this.sessions.set(key, session);
    }
    return session;
  }

  async dispose(): Promise<void> {
    for (const session of this.sessions.values()) await (await session).release();
    this.sessions.clear();
  }
}
