/**
 * Walks a model block by block. In each block, in the order in which its linears run:
 *
 *   inputs of the site, from the quantized prefix -> H            calibrate.ts
 *   per-channel factors folded into what makes the input          awq.ts      (recipe.fold)
 *   grids, then codes                                             grid.ts, rtn.ts, hqq.ts, gptq.ts
 *   the site's matrices become their quantized values, and the next site is computed from them
 *
 * Before that the model may be turned into other bases (rotate.ts), after it scales and gains may be tuned (tune.ts).
 * Memory holds one block's weights and the windows' activations at the cut, whatever the model's size.
 */

import type { Tensor } from "onnxruntime-common";
import type { ScalingGroup } from "../src/arch/architecture.ts";
import type { Model } from "../src/arch/index.ts";
import { floatWeights } from "../src/arch/weights.ts";
import { NibbleError } from "../src/errors.ts";
import { BlockForward } from "../src/eval/block-forward.ts";
import type { Ort } from "../src/onnx/ort.ts";
import type { OnProgress } from "../src/progress.ts";
import type { MatrixProducts } from "../src/tensor/linalg.ts";
import { dequantize } from "../src/tensor/quantized.ts";
import { type Fold, foldColumns, foldMoment, searchFold, unfoldColumns, unfoldedValues } from "./awq.ts";
import { type Activations, BlockRunner, floatName, type OpenBlock } from "./block-runner.ts";
import { ChannelMoment, SecondMoment, scaledTokens, streamShares } from "./calibrate.ts";
import { ExpectedInputs } from "./expected-inputs.ts";
import { quantizeTable, tablesOf } from "./head.ts";
import { LearnedBlocks } from "./learned-blocks.ts";
import { asFloat32 } from "./loss.ts";
import { pruneMatrices } from "./prune.ts";
import { QuantizedModel } from "./quantized-model.ts";
import { type Recipe, windowsOf } from "./recipes.ts";
import {
  decodeLayer,
  encodeLayer,
  type LayerRecord,
  type LayerStore,
  type LinearRecord,
  memoryLayerStore,
} from "./record.ts";
import { rotateModel } from "./rotate.ts";
import { quantizeMatrix, relativeErrors, rowsOf, specOf, stackRows } from "./site-matrices.ts";
import { searchSmoothing, TokenSampler } from "./smoothquant.ts";
import { tune } from "./tune.ts";
import type { GridSpec, InputStatistics, Matrix } from "./types.ts";

export interface QuantizeTools {
  readonly ort: Ort;
  readonly products: MatrixProducts;
  /**
   * Where finished layers are kept, and where the result reads them; the caller gives each model, recipe and text a store
   * of their own. Default: in memory.
   */
  readonly store?: LayerStore;
  readonly onProgress?: OnProgress;
  readonly signal?: AbortSignal;
  /** Milliseconds per phase, for benchmarks. */
  readonly onTime?: (phase: "forward" | "moments" | "fold" | "round", ms: number) => void;
}

/** Windows computed together: products of 2,048 rows keep every core busy, and more only takes memory. */
const BATCH_TOKENS = 2048;

/** @param windows token ids, all of one length; not read by recipes without calibration. */
export async function quantizeModel(
  model: Model,
  recipe: Recipe,
  windows: readonly (readonly number[])[],
  tools: QuantizeTools,
): Promise<QuantizedModel> {
  if (recipe.prune && recipe.learned) {
    throw new NibbleError(
      "unsupported",
      `${recipe.name}: learned rounding moves pruned weights; use default or gptq.`,
      {
        param: "prune",
      },
    );
  }
  if (recipe.learned && recipe.windows === 0) {
    throw new NibbleError("bad_option", `${recipe.name} sees no text to learn from; use default or gptq.`, {
      param: "learn",
    });
  }
  if (windowsOf(recipe) > 0 && windows.length === 0) {
    throw new NibbleError("bad_option", `${recipe.name} needs calibration text.`, { param: "calibration" });
  }
  const turned = recipe.rotation === undefined ? model : rotateModel(model, recipe.rotation);
  const walk = new BlockWalk(turned, recipe, windows.slice(0, recipe.windows), tools);
  let quantized: QuantizedModel;
  try {
    quantized = await walk.run();
  } finally {
    await walk.dispose();
  }
  const { tuning } = recipe;
  if (tuning) quantized.tuned = await tune(quantized, windows.slice(0, tuning.windows), tuning, tools);
  return quantized;
}

class BlockWalk {
  private readonly runner: BlockRunner;
  private readonly calibrated: boolean;
  private readonly store: LayerStore;

  constructor(
    private readonly model: Model,
    private readonly recipe: Recipe,
    private readonly windows: readonly (readonly number[])[],
    private readonly tools: QuantizeTools,
  ) {
    this.calibrated = recipe.windows > 0;
    this.store = tools.store ?? memoryLayerStore();
    this.runner = new BlockRunner(tools.ort, model, windows[0]?.length ?? 1);
  }

  async run(): Promise<QuantizedModel> {
    const { model, recipe, tools } = this;
    const { layers } = model.config;
    const result = new QuantizedModel(model, recipe);
    if (!(await this.readBack(result))) await this.walk(result);
    tools.onProgress?.({ stage: "quantize", done: layers, total: layers, unit: "layers" });
    return result;
  }

  /** Takes what an earlier run finished; true when nothing is left to do. */
  private async readBack(result: QuantizedModel): Promise<boolean> {
    const { layers } = this.model.config;
    const tables = [...tablesOf(this.model, this.recipe).keys()];
    for (const key of [...Array.from({ length: layers }, (_, layer) => layerKey(layer)), ...tables.map(tableKey)]) {
      const stored = await this.store.get(key);
      if (!stored) return false;
      result.addLayer(decodeLayer(stored), key, this.store);
    }
    return true;
  }

  private async walk(result: QuantizedModel): Promise<void> {
    const { model, recipe, tools, store } = this;
    const { layers } = model.config;
    let hidden = this.calibrated ? await this.embed() : [];
    // the float prefix's hidden states, where GPTAQ compares with them
    let float = this.calibrated && recipe.asymmetry > 0 ? hidden.map(inputOf) : undefined;
    const learned =
      recipe.learned && this.calibrated ? new LearnedBlocks(tools.ort, model, recipe.learned, hidden) : undefined;
    for (let layer = 0; layer < layers; layer++) {
      tools.signal?.throwIfAborted();
      tools.onProgress?.({ stage: `quantize layer ${layer}`, done: layer, total: layers, unit: "layers" });
      const key = layerKey(layer);
      const stored = await store.get(key);
      const block = await this.runner.open(layer);
      const aims = float && (await this.runFloat(block, float, !stored));
      float = undefined; // no later site asks for it
      block.forgetFloat();
      const sites = new SiteWalk(this.model, layer, block, this.recipe, this.tools);
      const inputs = learned?.inputs(hidden);
      let record = stored ? decodeLayer(stored) : await sites.quantize(hidden, aims);
      await learned?.advance(layer);
      if (stored) await sites.replay(record, hidden);
      else {
        if (learned && inputs) {
          record = await learned.improve(layer, record, inputs, tools.signal);
          hidden = inputs.map((input) => new Map([[BlockRunner.input, input]]));
          await sites.replay(record, hidden);
        }
        await store.put(key, encodeLayer(record));
      }
      result.addLayer(record, key, store);
      if (this.calibrated) {
        hidden = hidden.map((batch) => new Map([[BlockRunner.input, batch.get(outputOf(block))!]]));
        float = aims?.map((batch) => batch.get(outputOf(block))!);
      }
    }
    await learned?.dispose();
    await this.quantizeTables(hidden, float, result);
  }

  private async quantizeTables(
    hidden: readonly Activations[],
    float: readonly Tensor[] | undefined,
    result: QuantizedModel,
  ): Promise<void> {
    for (const [tensor, format] of tablesOf(this.model, this.recipe)) {
      this.tools.signal?.throwIfAborted();
      const matrix = await quantizeTable(this.model, this.recipe, format, tensor, hidden, float, this.tools);
      const entry: LinearRecord = { matrix, columnScales: undefined, rowScales: undefined, report: undefined };
      const record: LayerRecord = {
        linears: new Map([[tensor.replace(/\.weight$/, ""), entry]]),
        floats: new Map(),
      };
      await this.store.put(tableKey(tensor), encodeLayer(record));
      result.addLayer(record, tableKey(tensor), this.store);
    }
  }

  /** The block in float: its output and, for quantizing, what its sites aim at. Takes the inputs out of their list as it goes. */
  private async runFloat(block: OpenBlock, inputs: Tensor[], quantizing: boolean): Promise<Activations[]> {
    const wanted = quantizing ? block.segments.flatMap((segment) => floatName(segment) ?? []) : [];
    const results: Activations[] = [];
    for (let input = inputs.shift(); input; input = inputs.shift()) {
      this.tools.signal?.throwIfAborted();
      const started = performance.now();
      results.push(await block.runFloat(input, wanted));
      this.tools.onTime?.("forward", performance.now() - started);
    }
    return results;
  }

  /** Hidden states before the first block, in batches of whole windows. */
  private async embed(): Promise<Activations[]> {
    const { model, windows, tools } = this;
    const seq = windows[0].length;
    const { hiddenSize } = model.config;
    const forward = new BlockForward(tools.ort, model, floatWeights(model.checkpoint), seq);
    const states = await forward.embed(windows);
    await forward.dispose();
    const perBatch = Math.max(1, Math.floor(BATCH_TOKENS / seq));
    const batches: Activations[] = [];
    for (let start = 0; start < states.length; start += perBatch) {
      const part = states.slice(start, start + perBatch);
      const data = new Float32Array(part.length * seq * hiddenSize);
      for (const [i, state] of part.entries()) data.set(state, i * seq * hiddenSize);
      const tensor = new tools.ort.Tensor("float32", data, [part.length, seq, hiddenSize]);
      batches.push(new Map([[BlockRunner.input, tensor]]));
    }
    return batches;
  }

  async dispose(): Promise<void> {
    await this.runner.dispose();
  }
}

const layerKey = (layer: number) => `layer-${layer}.bin`;
const tableKey = (tensor: string) => `${tensor}.bin`;

const inputOf = (batch: Activations) => batch.get(BlockRunner.input)!;
const outputOf = (block: OpenBlock) => block.segments.at(-1)!.writes[0];

type Gathered = ReturnType<SecondMoment["statistics"]>;

/** The sites of one block, one after the other. */
class SiteWalk {
  private readonly record: LayerRecord = { linears: new Map(), floats: new Map() };
  private readonly groups: readonly ScalingGroup[];
  /** What stands in for statistics where there is no text. */
  private readonly expected: ExpectedInputs;

  constructor(
    private readonly model: Model,
    layer: number,
    private readonly block: OpenBlock,
    private readonly recipe: Recipe,
    private readonly tools: QuantizeTools,
  ) {
    this.groups = model.arch.scalingGroups(layer, model.config);
    this.expected = new ExpectedInputs(floatWeights(model.checkpoint), this.groups);
  }

  /** `aims`: what the float prefix makes of the same batches. */
  async quantize(batches: readonly Activations[], aims: readonly Activations[] | undefined): Promise<LayerRecord> {
    const { block, recipe } = this;
    for (const [index, linears] of block.sites.entries()) {
      this.tools.signal?.throwIfAborted();
      const gathered = recipe.windows > 0 ? await this.gather(index, batches, aims) : undefined;
      await this.quantizeSite(index, linears, gathered);
    }
    if (recipe.windows > 0) await this.runSegment(block.sites.length, batches);
    return this.record;
  }

  /** Computes what a layer quantized earlier gives for the windows. */
  async replay(record: LayerRecord, batches: readonly Activations[]): Promise<void> {
    if (this.recipe.windows === 0) return;
    for (const [linear, entry] of record.linears) this.block.setWeight(`${linear}.weight`, effectiveValues(entry));
    for (const linear of this.block.sites.flat()) {
      const pruned = record.floats.get(`${linear}.weight`);
      if (pruned) this.block.setWeight(`${linear}.weight`, pruned);
    }
    for (let index = 0; index <= this.block.sites.length; index++) await this.runSegment(index, batches);
  }

  private async runSegment(
    index: number,
    batches: readonly Activations[],
    each?: (batch: Activations, i: number) => Promise<void>,
  ): Promise<void> {
    const segment = this.block.segments[index];
    const later = new Set(this.block.segments.slice(index + 1).flatMap((next) => next.reads));
    for (const [i, batch] of batches.entries()) {
      this.tools.signal?.throwIfAborted();
      const started = performance.now();
      await this.block.run(segment, batch);
      this.tools.onTime?.("forward", performance.now() - started);
      await each?.(batch, i);
      for (const name of batch.keys()) {
        if (!later.has(name) && !(segment.tap === undefined && segment.writes.includes(name))) batch.delete(name);
      }
    }
  }

  /** Runs up to a site's input and takes its second moment, and its product with what the float prefix has there. */
  private async gather(
    index: number,
    batches: readonly Activations[],
    aims: readonly Activations[] | undefined,
  ): Promise<Gathered> {
    const segment = this.block.segments[index];
    const { residual } = segment;
    const wanted = floatName(segment)!;
    const cols = this.block.weight(this.block.sites[index][0]).shape[1];
    const moment = this.recipe.channelMoments ? new ChannelMoment(cols) : new SecondMoment(cols, this.tools.products);
    const sampler = this.recipe.inputBits && new TokenSampler(cols);
    const later = this.block.segments.slice(index + 1).flatMap((next) => floatName(next) ?? []);
    const keep = [...later, outputOf(this.block)].includes(wanted);
    const scratch = { X: new Float32Array(0), missing: new Float32Array(0) }; // new pages for every batch take longer than the sums
    await this.runSegment(index, batches, async (batch, i) => {
      const started = performance.now();
      const X = floatsOf(batch, segment.tap!);
      sampler?.add(X);
      const float = aims && floatsOf(aims[i], wanted);
      if (!keep) aims?.[i].delete(wanted);
      if (float && residual) {
        const shares = streamShares(float, this.model.config.hiddenSize);
        const { before } = residual;
        if (scratch.X.length !== X.length) scratch.X = new Float32Array(X.length);
        if (scratch.missing.length !== float.length) scratch.missing = new Float32Array(float.length);
        const missing = difference(float, floatsOf(batch, before), scratch.missing);
        await moment.add(scaledTokens(X, shares, scratch.X), scaledTokens(missing, shares, missing));
      }
      // routed experts may see other tokens in the two prefixes; there is nothing to compare then
      else await moment.add(X, float?.length === X.length ? float : undefined);
      this.tools.onTime?.("moments", performance.now() - started);
    });
    return { ...moment.statistics(), ...(sampler && { sample: sampler.sample() }) };
  }

  private async quantizeSite(index: number, linears: readonly string[], gathered: Gathered | undefined): Promise<void> {
    const { block, recipe, tools } = this;
    const unreached = gathered?.tokens === 0;
    const measured = unreached ? undefined : gathered;
    const dense = linears.map((linear): Matrix => {
      const { shape, data } = block.weight(linear);
      return { rows: shape[0], cols: shape[1], data };
    });
    const matrices = recipe.prune ? await pruneMatrices(dense, recipe.prune, measured, tools.products) : dense;
    if (recipe.rounding === "none") {
      for (const [i, linear] of linears.entries()) {
        this.record.floats.set(`${linear}.weight`, matrices[i].data);
        block.setWeight(`${linear}.weight`, matrices[i].data);
      }
      return;
    }
    const spec = specOf(recipe.plan?.[linears[0]] ?? recipe, matrices[0].cols);
    let started = performance.now();
    const fold = recipe.fold ? await this.fold(linears, matrices, spec, gathered ? measured : "expected") : undefined;
    tools.onTime?.("fold", performance.now() - started);
    started = performance.now();
    // rows of one site share H and its factorization, so they are quantized as one matrix
    const stacked = (all: readonly Matrix[]) =>
      stackRows(fold ? all.map((m) => foldColumns(m, fold.source, fold.scales)) : all);
    const dYX = measured && (await this.missing(index, stackRows(dense), measured));
    const statistics =
      fold && measured
        ? {
            ...measured,
            H: foldMoment(measured.H, fold.source, fold.scales), // nobody reads the unfolded one after this
            dYX: dYX && unfoldColumns(dYX, fold.source, fold.scales),
          }
        : measured && { ...measured, dYX };
    const whole = stacked(matrices);
    const float = recipe.prune ? stacked(dense) : whole;
    const { matrix, losses } = await quantizeMatrix(whole, spec, recipe, statistics, tools.products);
    const errors =
      statistics &&
      (await relativeErrors(float, matrix, recipe.prune ? undefined : losses, matrices, statistics, tools.products));
    let row = 0;
    for (const [i, linear] of linears.entries()) {
      const end = row + matrices[i].rows;
      const entry: LinearRecord = {
        matrix: rowsOf(matrix, row, end),
        columnScales: fold && Float64Array.from(fold.source, (channel) => fold.scales[channel]),
        rowScales: undefined,
        report: { relativeError: errors?.[i], foldExponent: fold?.exponent, ...(unreached && { unreached }) },
      };
      row = end;
      this.record.linears.set(linear, entry);
      if (gathered) block.setWeight(`${linear}.weight`, effectiveValues(entry));
    }
    tools.onTime?.("round", performance.now() - started);
  }

  /** (rows, cols) how far the float prefix's outputs W F are from W X, or F from the stream with W X added: times Xᵀ. */
  private async missing(index: number, W: Matrix, { H, FX }: Gathered): Promise<Float32Array | undefined> {
    if (!FX) return undefined;
    const { products } = this.tools;
    const shape = { m: W.rows, k: W.cols, n: W.cols };
    const residual = this.block.segments[index].residual !== undefined;
    const wanted = residual ? FX : await products.f32(W.data, FX, shape);
    const WH = await products.f32(W.data, asFloat32(H), shape);
    for (let i = 0; i < WH.length; i++) WH[i] = wanted[i] - WH[i];
    return WH;
  }

  /** Searches the site's fold and applies its other half to what makes the input. */
  private async fold(
    linears: readonly string[],
    matrices: readonly Matrix[],
    spec: GridSpec,
    statistics: InputStatistics | "expected" | undefined,
  ): Promise<(Fold & { readonly source: Int32Array }) | undefined> {
    const group = this.groups.find(
      ({ to }) => to.length === linears.length && to.every((name) => linears.includes(name)),
    );
    if (!group || statistics === undefined) return undefined;
    const { cols } = matrices[0];
    const source = Int32Array.from({ length: cols }, (_, c) => group.source?.(c) ?? c);
    const channels = "linear" in group.from ? this.block.weight(group.from.linear).shape[0] : cols;
    let fold: Fold;
    if (statistics === "expected") {
      const diagonal = await this.expected.of(linears, matrices);
      if (!diagonal) return undefined;
      fold = await searchFold(matrices, source, channels, spec, { H: diagonal }, this.tools.products);
    } else {
      fold = statistics.sample
        ? searchSmoothing(matrices, source, channels, statistics.sample)
        : await searchFold(matrices, source, channels, spec, statistics, this.tools.products);
    }
    if (fold.exponent === undefined) return undefined;
    await this.divideSource(group.from, fold.scales);
    return { ...fold, source };
  }

  private async divideSource(from: ScalingGroup["from"], scales: Float64Array): Promise<void> {
    const { checkpoint } = this.model;
    const name = "linear" in from ? from.linear : from.norm;
    const divide = async (tensor: string, offset = 0) => {
      if (!checkpoint.tensors.has(tensor)) return;
      const data = this.record.floats.get(tensor) ?? (await checkpoint.readTensor(tensor)).data;
      this.record.floats.set(
        tensor,
        data.map((value, c) => (value + offset) / scales[c] - offset),
      );
    };
    await divide(`${name}.bias`);
    if ("norm" in from) {
      await divide(`${name}.weight`, from.gainOffset);
      return;
    }
    const made = this.record.linears.get(name);
    if (!made) throw new NibbleError("unsupported", `${name} runs after the linears that its outputs feed.`);
    this.record.linears.set(name, { ...made, rowScales: scales });
  }
}

/** a - b, in `out`. */
function difference(a: Float32Array, b: Float32Array, out: Float32Array): Float32Array {
  for (let i = 0; i < out.length; i++) out[i] = a[i] - b[i];
  return out;
}

const floatsOf = (batch: Activations, name: string) => batch.get(name)!.data as Float32Array;

/** What a record's matrix does to inputs that nothing was folded into. */
function effectiveValues({ matrix, columnScales }: LinearRecord): Float32Array {
  if (!columnScales) return dequantize(matrix);
  const columns = Int32Array.from({ length: matrix.cols }, (_, c) => c);
  return unfoldedValues(matrix, columns, columnScales);
}
