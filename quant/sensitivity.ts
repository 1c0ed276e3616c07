/**
 * What storing each matrix in fewer bits would cost, measured on the float model with little text:
 *   t[site, option]   relative error of a site's outputs, from its inputs' second moment H and a sample of its rows
 *   α[site]           KL per unit of t: the site alone is rounded to 4 bits, and the rest of the model runs in float
 * A table that is looked up and multiplied by counts twice: as embedding, where every direction counts alike, and as head,
 * by the moment of what it multiplies.
 * Every disturbed copy of the text goes through the blocks together with the undisturbed one, so each block is read once.
 */
import type { Tensor } from "onnxruntime-common";
import type { Model } from "../src/arch/index.ts";
import { floatWeights, type Weights } from "../src/arch/weights.ts";
import { BlockForward, type Hidden } from "../src/eval/block-forward.ts";
import { LogitComparer } from "../src/eval/compare.ts";
import { dequantize } from "../src/tensor/quantized.ts";
import { foldColumns, foldMoment, searchFold } from "./awq.ts";
import { type Activations, BlockRunner, type OpenBlock } from "./block-runner.ts";
import { SecondMoment } from "./calibrate.ts";
import { gptqMatrix } from "./gptq.ts";
import { searchGrid } from "./grid.ts";
import { headStatistics } from "./head.ts";
import { rowErrors, rowLosses, rowPowers } from "./loss.ts";
import { type Site, sitesOf, type WeightFormat } from "./plan.ts";
import type { QuantizeTools } from "./quantize.ts";
import type { Recipe } from "./recipes.ts";
import { rtnMatrix } from "./rtn.ts";
import { specOf } from "./site-matrices.ts";
import type { InputStatistics, Matrix } from "./types.ts";

export interface SiteSensitivity {
  readonly site: Site;
  /** Expected KL of each option, in nats: α t, for a tied table the sum of its two uses. */
  readonly costs: readonly number[];
}

/** Windows for the second moments, of the length they come in. */
const MOMENT_WINDOWS = 8;
/** Sequences whose drift is measured for each site, and their tokens: the mean over 256 positions is known to about a tenth. */
const PROBES = 2;
const PROBE_TOKENS = 128;
/** Rows of a site that errors are measured on. */
const SAMPLE_ROWS = 48;
/** Rows that a disturbance is measured on: all of a linear, a part of a vocabulary. */
const DISTURBED_ROWS = 8192;
/** Rounding that disturbs a site: small enough that its effect stays proportional to the error. */
const DISTURBANCE: WeightFormat = { bits: 4, groupSize: 32, symmetric: false };
/** Sequences that run through a block in one call. */
const BATCH = 16;

/**
 * Embedding and head are left out where the recipe leaves them float.
 * @param windows token ids; @param options formats to judge, the same for every site.
 */
export async function measureSensitivity(
  model: Model,
  recipe: Recipe,
  windows: readonly (readonly number[])[],
  options: readonly WeightFormat[],
  tools: QuantizeTools,
): Promise<SiteSensitivity[]> {
  const probes = windows.slice(0, PROBES).map((ids) => ids.slice(0, PROBE_TOKENS));
  const walk = new SensitivityWalk(model, recipe, options, tools, windows[0].length, probes);
  try {
    return await walk.run(windows.slice(0, MOMENT_WINDOWS));
  } finally {
    await walk.dispose();
  }
}

/** One disturbed copy of the probes, on its way through the blocks: a site has one, a tied table one for each use. */
interface Disturbed {
  readonly site: Site;
  readonly disturbance: number;
  readonly errors: readonly number[];
  /** A hidden state (tokens, hidden) for each probe. */
  states: Hidden[];
  /** What the head multiplies by, where the site is the head. */
  readonly head?: Weights;
}

class SensitivityWalk {
  private readonly runner: BlockRunner;
  private readonly forward: BlockForward;
  private readonly float: Weights;
  private readonly disturbed: Disturbed[] = [];

  constructor(
    private readonly model: Model,
    private readonly recipe: Recipe,
    private readonly options: readonly WeightFormat[],
    private readonly tools: QuantizeTools,
    sequence: number,
    private readonly probes: readonly (readonly number[])[],
  ) {
    this.runner = new BlockRunner(tools.ort, model, sequence);
    this.float = floatWeights(model.checkpoint);
    this.forward = new BlockForward(tools.ort, model, this.float, sequence);
  }

  async run(windows: readonly (readonly number[])[]): Promise<SiteSensitivity[]> {
    const { model, tools } = this;
    const sites = sitesOf(model);
    let text = await this.forward.embed(windows);
    let probes = await this.forward.embed(this.probes);
    const { embeddingName, headName } = model.arch;
    const table = (name: string) =>
      this.recipe.head && sites.find(({ layer, linears }) => layer === undefined && linears[0] === name);
    const embedding = table(embeddingName);
    if (embedding) this.disturbed.push(await this.disturbEmbedding(embedding));
    for (let layer = 0; layer < model.config.layers; layer++) {
      tools.signal?.throwIfAborted();
      tools.onProgress?.({ stage: "sensitivity", done: layer, total: model.config.layers, unit: "layers" });
      const block = await this.runner.open(layer);
      // the disturbed copies of earlier sites go on, those of this block's sites begin
      const earlier = await this.advance(block, [...probes, ...this.disturbed.flatMap(({ states }) => states)]);
      const per = probes.length;
      for (const [i, one] of this.disturbed.entries()) one.states = earlier.slice((i + 1) * per, (i + 2) * per);
      const own = sites.filter((site) => site.layer === layer);
      text = await this.measureBlock(layer, block, own, text, probes);
      probes = earlier.slice(0, per);
    }
    const head = table(headName(model.config));
    if (head) this.disturbed.push(await this.disturbHead(head, text, probes));
    return this.judge(probes);
  }

  /** Hidden states after the block, in float. */
  private async advance(block: OpenBlock, states: readonly Hidden[]): Promise<Hidden[]> {
    const after: Hidden[] = [];
    for (let start = 0; start < states.length; start += BATCH) {
      this.tools.signal?.throwIfAborted();
      const batch = states.slice(start, start + BATCH);
      const made = await block.runFloat(this.stacked(batch), []);
      after.push(...this.unstacked(made.get(block.segments.at(-1)!.writes[0])!, batch.length));
    }
    return after;
  }

  /** Moments of each site's inputs from `text`, and the probes with each site disturbed; gives the text after the block. */
  private async measureBlock(
    layer: number,
    block: OpenBlock,
    sites: readonly Site[],
    text: readonly Hidden[],
    probes: readonly Hidden[],
  ): Promise<Hidden[]> {
    const { products } = this.tools;
    const batches: Activations[] = [];
    const perBatch = Math.max(1, Math.floor((BATCH * PROBE_TOKENS) / (text[0].length / this.model.config.hiddenSize)));
    for (let start = 0; start < text.length; start += perBatch) {
      batches.push(new Map([[BlockRunner.input, this.stacked(text.slice(start, start + perBatch))]]));
    }
    for (const [index, linears] of block.sites.entries()) {
      const site = sites.find((one) => one.linears[0] === linears[0])!;
      const { segments } = block;
      const moment = new SecondMoment(site.cols, products);
      for (const batch of batches) {
        this.tools.signal?.throwIfAborted();
        await block.run(segments[index], batch);
        await moment.add(batch.get(segments[index].tap!)!.data as Float32Array);
      }
      const statistics = moment.statistics();
      const matrices = linears.map((linear): Matrix => {
        const { shape, data } = block.weight(linear);
        return { rows: shape[0], cols: shape[1], data };
      });
      const { disturbance, values } = await this.disturb(matrices, statistics);
      for (const [i, linear] of linears.entries()) block.setWeight(`${linear}.weight`, values[i]);
      const batch: Activations = new Map([[BlockRunner.input, this.stacked(probes)]]);
      for (const segment of segments) await block.run(segment, batch);
      for (const [i, linear] of linears.entries()) block.setWeight(`${linear}.weight`, matrices[i].data);
      const errors = await this.errorsOf(layer, site, matrices, statistics);
      const states = this.unstacked(batch.get(segments.at(-1)!.writes[0])!, probes.length);
      this.disturbed.push({ site, disturbance, errors, states });
    }
    const last = block.segments.at(-1)!;
    const perWindow: Hidden[] = [];
    for (const batch of batches) {
      await block.run(last, batch);
      const made = batch.get(last.writes[0])!;
      perWindow.push(...this.unstacked(made, made.dims[0]));
    }
    return perWindow;
  }

  /** The site's matrices rounded plainly, and the relative error of their outputs. */
  private async disturb(
    matrices: readonly Matrix[],
    { H }: Pick<InputStatistics, "H">,
  ): Promise<{ disturbance: number; values: Float32Array[] }> {
    const { products } = this.tools;
    let lost = 0;
    let power = 0;
    const values: Float32Array[] = [];
    for (const matrix of matrices) {
      const rounded = dequantize(rtnMatrix(matrix, specOf(DISTURBANCE, matrix.cols)));
      const sample = sampleRows([matrix], DISTURBED_ROWS);
      const after = sampleRows([{ ...matrix, data: rounded }], DISTURBED_ROWS).data;
      lost += total(await rowErrors(sample, after, H, products));
      power += total(await rowPowers(sample, H, products));
      values.push(rounded);
    }
    return { disturbance: power > 0 ? lost / power : 0, values };
  }

  /** The relative error that each option would leave, on a sample of the site's rows, by the recipe's own steps. */
  private async errorsOf(
    layer: number | undefined,
    site: Site,
    matrices: readonly Matrix[],
    statistics: InputStatistics,
  ): Promise<number[]> {
    const { recipe, model, tools } = this;
    const { products } = tools;
    const { cols } = site;
    let sample = sampleRows(matrices, SAMPLE_ROWS);
    let { H } = statistics;
    const power = total(await rowPowers(sample, H, products));
    if (!(power > 0)) return this.options.map(() => 0);
    const group =
      layer === undefined
        ? undefined
        : model.arch
            .scalingGroups(layer, model.config)
            .find(({ to }) => to.every((name) => site.linears.includes(name)));
    if (recipe.fold && group && group.to.length === site.linears.length) {
      const source = Int32Array.from({ length: cols }, (_, c) => group.source?.(c) ?? c);
      const channels = 1 + source.reduce((max, channel) => Math.max(max, channel), 0);
      const spec = specOf(DISTURBANCE, cols);
      const { scales } = await searchFold([sample], source, channels, spec, statistics, products);
      sample = foldColumns(sample, source, scales);
      H = foldMoment(H.slice(), source, scales);
    }
    const importance = Float64Array.from({ length: cols }, (_, c) => H[c * (cols + 1)]);
    const lossOf = async (format: WeightFormat) =>
      total(await rowLosses(sample, rtnMatrix(sample, specOf(format, cols), searchGrid, importance), H, products));
    let gain = 1;
    if (recipe.rounding === "gptq") {
      const walked = await gptqMatrix(sample, specOf(DISTURBANCE, cols), { ...statistics, H }, products);
      gain = total(await rowLosses(sample, walked, H, products)) / (await lossOf(DISTURBANCE));
    }
    const errors: number[] = [];
    for (const format of this.options) errors.push((gain * (await lossOf(format))) / power);
    return errors;
  }

  private async disturbEmbedding(site: Site): Promise<Disturbed> {
    const H = new Float32Array(site.cols * site.cols); // rows are not multiplied by anything: 1
    for (let c = 0; c < site.cols; c++) H[c * (site.cols + 1)] = 1;
    const { weights, ...measured } = await this.disturbTable(site, { tokens: 1, H });
    const forward = new BlockForward(this.tools.ort, this.model, weights, PROBE_TOKENS);
    const states = await forward.embed(this.probes);
    await forward.dispose();
    return { site, ...measured, states };
  }

  /** @param text the moment windows' hidden states after the last block. */
  private async disturbHead(site: Site, text: readonly Hidden[], probes: readonly Hidden[]): Promise<Disturbed> {
    const batches = text.map((states) => new Map([[BlockRunner.input, this.stacked([states])]]));
    const statistics = await headStatistics(this.model, site.cols, batches, this.tools);
    const { weights, ...measured } = await this.disturbTable(site, statistics);
    return { site, ...measured, states: [...probes], head: weights };
  }

  /** The float weights with the site's table rounded, and what that and each option loses. */
  private async disturbTable(site: Site, statistics: InputStatistics) {
    const { float } = this;
    const tensor = `${site.linears[0]}.weight`;
    const matrix: Matrix = { rows: site.rows[0], cols: site.cols, data: await float.load(tensor) };
    const { disturbance, values } = await this.disturb([matrix], statistics);
    const errors = await this.errorsOf(undefined, site, [matrix], statistics);
    const { loadRows: _, ...whole } = float; // its rows would be the undisturbed ones
    const weights: Weights = { ...whole, load: async (one) => (one === tensor ? values[0] : float.load(one)) };
    return { disturbance, errors, weights };
  }

  private async judge(probes: readonly Hidden[]): Promise<SiteSensitivity[]> {
    const { model, tools } = this;
    const comparer = new LogitComparer(tools.ort);
    try {
      const reference: Float32Array[] = [];
      for await (const logits of this.forward.logits(probes)) reference.push(logits);
      const kls = new Map<Disturbed, number>();
      const judge = async (copies: readonly Disturbed[], forward: BlockForward) => {
        const kl = await this.meanKl(copies, reference, forward, comparer);
        for (const [i, copy] of copies.entries()) kls.set(copy, kl[i]);
      };
      for (const copy of this.disturbed.filter(({ head }) => head)) {
        const forward = new BlockForward(tools.ort, model, copy.head!, PROBE_TOKENS);
        await judge([copy], forward);
        await forward.dispose();
      }
      await judge(
        this.disturbed.filter(({ head }) => !head),
        this.forward,
      );
      const alphaOf = (one: Disturbed) => (one.disturbance > 0 ? Math.max(0, kls.get(one)!) / one.disturbance : 0);
      const sites = [...new Set(this.disturbed.map(({ site }) => site))];
      return sites.map((site) => ({
        site,
        costs: this.options.map((_, i) =>
          this.disturbed.filter((one) => one.site === site).reduce((sum, one) => sum + alphaOf(one) * one.errors[i], 0),
        ),
      }));
    } finally {
      await comparer.dispose();
    }
  }

  /** Of each copy, all through one session of the head. */
  private async meanKl(
    copies: readonly Disturbed[],
    reference: readonly Float32Array[],
    forward: BlockForward,
    comparer: LogitComparer,
  ): Promise<number[]> {
    const { tools, probes } = this;
    const sums = copies.map(() => 0);
    let at = 0;
    for await (const logits of forward.logits(copies.flatMap(({ states }) => states))) {
      tools.signal?.throwIfAborted();
      const probe = at % probes.length;
      // every position counts, the last one too: what comes next does not matter to KL
      const { kl } = await comparer.compare(reference[probe], logits, this.model.config.vocabSize, probes[probe]);
      sums[Math.floor(at / probes.length)] += kl.reduce((sum, value) => sum + value, 0) / (kl.length * probes.length);
      at++;
      tools.onProgress?.({
        stage: "sensitivity of sites",
        done: Math.floor(at / probes.length),
        total: copies.length,
        unit: "steps",
      });
    }
    return sums;
  }

  /** (sequences, tokens, hidden) */
  private stacked(states: readonly Hidden[]): Tensor {
    const { hiddenSize } = this.model.config;
    const [{ length }] = states;
    const data = new Float32Array(states.length * length);
    for (const [i, state] of states.entries()) data.set(state, i * length);
    return new this.tools.ort.Tensor("float32", data, [states.length, length / hiddenSize, hiddenSize]);
  }

  private unstacked({ data }: Tensor, count: number): Hidden[] {
    const size = data.length / count;
    return Array.from({ length: count }, (_, i) => (data as Float32Array).slice(i * size, (i + 1) * size));
  }

  async dispose(): Promise<void> {
    await this.runner.dispose();
    await this.forward.dispose();
  }
}

const total = (values: Float64Array) => values.reduce((sum, value) => sum + value, 0);

/** Rows spread evenly over all matrices, as one. */
function sampleRows(matrices: readonly Matrix[], count: number): Matrix {
  const [{ cols }] = matrices;
  const all = matrices.reduce((sum, { rows }) => sum + rows, 0);
  const rows = Math.min(count, all);
  const data = new Float32Array(rows * cols);
  for (let i = 0; i < rows; i++) {
    let row = Math.floor((i * all) / rows);
    const matrix = matrices.find((one) => {
      if (row < one.rows) return true;
      row -= one.rows;
      return false;
    })!;
    data.set(matrix.data.subarray(row * cols, (row + 1) * cols), i * cols);
  }
  return { rows, cols, data };
}
