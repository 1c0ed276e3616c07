/** Plans for a budget: sensitivities measured once, then for any number of bytes or nats the best formats. */
import type { Model } from "../src/arch/index.ts";
import { NibbleError } from "../src/errors.ts";
import { type Allocation, allocateFor, allocateWithin, type Option } from "./allocate.ts";
import { type Plan, type Site, sitesOf, type WeightFormat } from "./plan.ts";
import type { QuantizeTools } from "./quantize.ts";
import type { Recipe } from "./recipes.ts";
import { measureSensitivity, type SiteSensitivity } from "./sensitivity.ts";

export interface FittedPlan {
  readonly plan: Plan;
  /** Graph and weights, as they will be written. */
  readonly sizeBytes: number;
  /** Sum of what each site is expected to cost. */
  readonly expectedKl: number;
}

/** What storing a model by a plan takes. */
export interface PlannedSize {
  /** Graph and data, all of it. */
  readonly sizeBytes: number;
  /** What belongs to each matrix, the nodes that unpack it included; by the first linear of its site. */
  readonly perSite: ReadonlyMap<string, number>;
}

/** Formats that a plan chooses from; scales of fewer bits cost next to nothing (src/arch/stored-width.ts). */
export function candidateFormats(symmetric: boolean): WeightFormat[] {
  const formats: WeightFormat[] = [];
  for (const bits of [2, 3, 4, 5, 6]) {
    for (const groupSize of [16, 32, 64, 128]) formats.push({ bits, groupSize, symmetric, scaleBits: 8 });
  }
  for (const groupSize of [32, 128]) formats.push({ bits: 8, groupSize, symmetric, scaleBits: 8 });
  return formats;
}

/** A graph's nodes and padding are not quite the sum of its sites'. */
const SIZE_SLACK = 0.02;

export class PlanFitter {
  private readonly options: (readonly Option[])[];
  private readonly fixedBytes: number;

  private constructor(
    private readonly model: Model,
    private readonly formats: readonly WeightFormat[],
    private readonly sensitivities: readonly SiteSensitivity[],
    private readonly sizeOf: (plan: Plan) => PlannedSize,
  ) {
    const sizes = formats.map((format) => sizeOf(this.planOf(() => format)));
    this.options = sensitivities.map(({ site, costs }) =>
      formats.map((_, i) => ({ sizeBytes: sizes[i].perSite.get(site.linears[0])!, cost: costs[i] })),
    );
    const [{ sizeBytes, perSite }] = sizes;
    this.fixedBytes = sizeBytes - [...perSite.values()].reduce((sum, bytes) => sum + bytes, 0);
  }

  /**
   * @param recipe how the plan's matrices will be rounded; where its head is float, embedding and head stay so.
   * @param windows calibration text.
   */
  static async measure(
    model: Model,
    recipe: Recipe,
    windows: readonly (readonly number[])[],
    sizeOf: (plan: Plan) => PlannedSize,
    tools: QuantizeTools,
  ): Promise<PlanFitter> {
    const formats = candidateFormats(recipe.symmetric);
    return new PlanFitter(model, formats, await measureSensitivity(model, recipe, windows, formats, tools), sizeOf);
  }

  /** The least drift within a budget. Error `bad_option` where the model does not get so small. */
  within(budgetBytes: number): FittedPlan {
    let room = budgetBytes - this.fixedBytes;
    for (;;) {
      const found = room > 0 ? allocateWithin(this.options, room) : undefined;
      if (!found) {
        const { sizeBytes } = this.sizeOf(this.planOf((options) => this.formats[smallest(options)]));
        throw new NibbleError(
          "bad_option",
          `${this.model.checkpoint.name}: ${megabytes(budgetBytes)} is too little; its smallest plan takes ${megabytes(sizeBytes)}.`,
          { param: "fit" },
        );
      }
      const fitted = this.fitted(found);
      if (fitted.sizeBytes <= budgetBytes) return fitted;
      room -= fitted.sizeBytes - budgetBytes; // a mixed graph's nodes and padding are not quite the sum of its sites'
    }
  }

  /** The fewest bytes at an expected KL of at most `limit`. Error `bad_option` where no plan is that good. */
  forKl(limit: number): FittedPlan {
    const found = allocateFor(this.options, limit);
    if (found) return this.fitted(found);
    const least = this.options.reduce((sum, options) => sum + Math.min(...options.map(({ cost }) => cost)), 0);
    throw new NibbleError(
      "bad_option",
      `${this.model.checkpoint.name}: a KL of ${limit} is more than 8 bits can keep; about ${least.toPrecision(2)} is possible.`,
      { param: "max-kl" },
    );
  }

  /** The best that one format for all linears and one for embedding and head give within a budget, if any fits. */
  single(budgetBytes: number): FittedPlan | undefined {
    const settings = this.formats.flatMap((linears) => this.formats.map((ends) => this.planBySite(linears, ends)));
    const costs = new Map(settings.map((plan) => [plan, this.expectedKl(plan)]));
    for (const [plan, expectedKl] of [...costs].sort((a, b) => a[1] - b[1])) {
      if (this.estimatedSize(plan) > budgetBytes * (1 + SIZE_SLACK)) continue;
      const { sizeBytes } = this.sizeOf(plan);
      if (sizeBytes <= budgetBytes) return { plan, sizeBytes, expectedKl };
    }
    return undefined;
  }

  /** What a plan of these formats is expected to cost. */
  expectedKl(plan: Plan): number {
    return this.chosen(plan).reduce((sum, { cost }) => sum + cost, 0);
  }

  private estimatedSize(plan: Plan): number {
    return this.chosen(plan).reduce((sum, { sizeBytes }) => sum + sizeBytes, this.fixedBytes);
  }

  private chosen(plan: Plan): Option[] {
    return this.sensitivities.map(({ site }, i) => {
      const wanted = plan[site.linears[0]];
      return this.options[i][this.formats.findIndex((format) => sameFormat(format, wanted))];
    });
  }

  private planBySite(linears: WeightFormat, ends: WeightFormat): Plan {
    const formatOf = ({ layer }: Site) => (layer === undefined ? ends : linears);
    return Object.fromEntries(
      this.sensitivities.flatMap(({ site }) => site.linears.map((name) => [name, formatOf(site)] as const)),
    );
  }

  private fitted({ choice, cost }: Allocation): FittedPlan {
    let next = 0;
    const plan = this.planOf(() => this.formats[choice[next++]]);
    return { plan, sizeBytes: this.sizeOf(plan).sizeBytes, expectedKl: cost };
  }

  /** Sites in their order, each with the format that `of` gives it. */
  private planOf(of: (options: readonly Option[]) => WeightFormat): Plan {
    const plan: Record<string, WeightFormat> = {};
    for (const [i, { site }] of this.sensitivities.entries()) {
      const format = of(this.options?.[i] ?? []);
      for (const linear of site.linears) plan[linear] = format;
    }
    return plan;
  }
}

const smallest = (options: readonly Option[]): number =>
  options.reduce((best, { sizeBytes }, i) => (sizeBytes < options[best].sizeBytes ? i : best), 0);

const sameFormat = (a: WeightFormat, b: WeightFormat): boolean =>
  a.bits === b.bits && a.groupSize === b.groupSize && a.symmetric === b.symmetric && a.scaleBits === b.scaleBits;

const megabytes = (bytes: number): string => `${(bytes / 1e6).toFixed(1)} MB`;

/** What each site's tensors take in a graph, by the names that src/arch/quantized-layers.ts gives them. */
export function sizeBySite(
  model: Model,
  initializers: Iterable<{ readonly name: string; readonly sizeBytes: number }>,
  graphBytes: number,
): ReadonlyMap<string, number> {
  const sites = sitesOf(model);
  const siteOf = new Map<string, string>(
    sites.flatMap(({ linears }) => linears.map((name) => [`${name}.weight`, linears[0]] as const)),
  );
  const perSite = new Map<string, number>();
  for (const { name, sizeBytes } of initializers) {
    // "model.layers.0.mlp.gate_proj.weight+model.layers.0.mlp.up_proj.weight/codes"
    const site = name.includes("/") ? siteOf.get(name.split(/[+/]/)[0]) : undefined;
    if (site !== undefined) perSite.set(site, (perSite.get(site) ?? 0) + sizeBytes);
  }
  for (const site of perSite.keys()) perSite.set(site, perSite.get(site)! + graphBytes / perSite.size);
  return perSite;
}
