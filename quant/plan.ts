/**
 * How each matrix of a model is stored, as data: what `--fit` and `--max-kl` compute, nibble.json keeps and `--plan`
 * replays. Linears of one site (q, k, v; gate, up) are one product in the graph and have one format.
 */
import { type Model, resolveModel } from "../src/arch/index.ts";
import { floatWeights, type Weights } from "../src/arch/weights.ts";
import type { Checkpoint } from "../src/checkpoint/checkpoint.ts";
import { NibbleError } from "../src/errors.ts";
import { blockGraph } from "../src/export/graphs.ts";
import { fullKv } from "../src/kv/full.ts";
import { containerBits } from "../src/tensor/pack.ts";
import type { ScaleBits } from "../src/tensor/quantized.ts";
import { blockSizeOf } from "./pack.ts";
import { checkFormat, type Recipe } from "./recipes.ts";

export interface WeightFormat {
  readonly bits: number;
  readonly groupSize: number | "row";
  readonly symmetric: boolean;
  readonly scaleBits?: ScaleBits;
}

/** By name of the linear; embedding and head under theirs, and float where they are left out. */
export type Plan = Readonly<Record<string, WeightFormat>>;

/** Matrices that get one format. */
export interface Site {
  readonly linears: readonly string[];
  /** Rows of each, and the columns that they share. */
  readonly rows: readonly number[];
  readonly cols: number;
  /** Of the block; undefined for embedding and head. */
  readonly layer: number | undefined;
}

/** Every site of the model in the order in which it runs, embedding and head (one where they are tied) at the end. */
export function sitesOf(model: Model): Site[] {
  const { arch, config, checkpoint } = model;
  const weights = floatWeights(checkpoint);
  const site = (linears: readonly string[], layer: number | undefined): Site => {
    const shapes = linears.map((linear) => weights.shape(`${linear}.weight`));
    return { linears, rows: shapes.map(([rows]) => rows), cols: shapes[0][1], layer };
  };
  const sites = Array.from({ length: config.layers }, (_, layer) => {
    const { builder } = blockGraph(model, layer, { weights, kv: fullKv({ cached: false }), maxPositions: 1 });
    return builder.sites.map(({ linears }) => site(linears, layer));
  }).flat();
  const ends = new Set([arch.embeddingName, arch.headName(config)]);
  return [...sites, ...[...ends].map((name) => site([name], undefined))];
}

export const parametersOf = ({ rows, cols }: Site): number => rows.reduce((sum, count) => sum + count, 0) * cols;

/** A recipe that stores each matrix as the plan says; its own bits are then those of most weights. */
export function withPlan(checkpoint: Checkpoint, recipe: Recipe, plan: Plan): Recipe {
  if (recipe.rotation !== undefined || recipe.inputBits !== undefined) {
    const what = recipe.inputBits ? recipe.name : "a rotated model";
    throw new NibbleError(
      "unsupported",
      `A plan says how matrices of the model as it is are stored: not for ${what}.`,
      {
        param: "plan",
      },
    );
  }
  const model = resolveModel(checkpoint);
  const sites = sitesOf(model);
  checkPlan(checkpoint.name, sites, plan);
  const weightsOf = new Map<number, number>();
  for (const site of sites) {
    const format = plan[site.linears[0]];
    if (!format) continue;
    const container = containerBits(format.bits);
    weightsOf.set(container, (weightsOf.get(container) ?? 0) + parametersOf(site));
  }
  const [[most]] = [...weightsOf].sort((a, b) => b[1] - a[1]);
  const largest = sites
    .filter(({ linears: [name] }) => plan[name] && containerBits(plan[name].bits) === most)
    .reduce((a, b) => (parametersOf(b) > parametersOf(a) ? b : a));
  const { scaleBits: _, ...rest } = recipe;
  const head = sites.map(({ linears, layer }) => (layer === undefined ? plan[linears[0]] : undefined)).find(Boolean);
  return { ...rest, ...plan[largest.linears[0]], head, plan };
}

/** Error `bad_file` where the plan is not one for these sites. */
function checkPlan(name: string, sites: readonly Site[], plan: Plan): void {
  const wrong = (what: string) =>
    new NibbleError("bad_file", `The plan does not fit ${name}: ${what}.`, { param: "plan" });
  const known = new Set(sites.flatMap(({ linears }) => linears));
  for (const [linear, format] of Object.entries(plan)) {
    if (!known.has(linear)) throw wrong(`it names ${linear}, which this model does not have`);
    checkFormat(format);
  }
  for (const { linears, layer } of sites) {
    const missing = linears.filter((linear) => !plan[linear]);
    if (layer !== undefined && missing.length > 0) throw wrong(`it says nothing of ${missing.join(", ")}`);
    if (new Set(linears.map((linear) => formatName(plan[linear]))).size > 1) {
      throw wrong(`${linears.join(", ")} are one product and need one format`);
    }
  }
}

/** "4g32", "3g64s8", "8row", "4g32 sym"; "float" for undefined. */
export function formatName(format: WeightFormat | undefined): string {
  if (!format) return "float";
  const { bits, groupSize, symmetric, scaleBits = 16 } = format;
  const group = groupSize === "row" ? "row" : `g${groupSize}`;
  return `${bits}${group}${scaleBits === 16 ? "" : `s${scaleBits}`}${symmetric ? " sym" : ""}`;
}

/** The plan in the text of a plan file or of a nibble.json. Error `bad_file`. */
export function parsePlan(name: string, text: string): Plan {
  const wrong = (what: string) => new NibbleError("bad_file", `${name}: ${what}.`, { param: "plan" });
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    throw wrong("no JSON");
  }
  const { plan, recipe } = (value ?? {}) as { plan?: unknown; recipe?: { plan?: unknown } };
  const found = plan ?? recipe?.plan;
  if (typeof found !== "object" || found === null || Array.isArray(found)) {
    throw wrong(
      'neither a plan ({"plan": {"<linear>": {"bits": 4, "groupSize": 32, ...}}}) nor a nibble.json with one',
    );
  }
  for (const [linear, format] of Object.entries(found)) {
    const { bits, groupSize, symmetric } = (format ?? {}) as Partial<WeightFormat>;
    if (typeof bits !== "number" || typeof symmetric !== "boolean" || groupSize === undefined) {
      throw wrong(`${linear} needs bits, groupSize and symmetric`);
    }
  }
  return found as Plan;
}

/** What a graph has to know to be built with the plan's formats; there is nothing to load yet. */
export function plannedWeights({ checkpoint }: Model, plan: Plan): Weights {
  const base = floatWeights(checkpoint);
  return {
    ...base,
    quantized: (tensor) => {
      const format = tensor.endsWith(".weight") ? plan[tensor.slice(0, -".weight".length)] : undefined;
      if (!format) return undefined;
      const [rows, cols] = base.shape(tensor);
      const groupSize = blockSizeOf({ cols, groupSize: format.groupSize === "row" ? cols : format.groupSize });
      return {
        ...format,
        rows,
        cols,
        groupSize,
        load: () => Promise.reject(new NibbleError("engine", `${tensor}: a plan has no codes`)),
      };
    },
  };
}
