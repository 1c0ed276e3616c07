/**
 * Which format each matrix gets, so that the stored bytes stay in a budget and the expected drift is least. By the
 * linearity theorem (Malinovskii et al. 2024, HIGGS, arXiv 2411.17525) small errors add up:
 *   KL ≈ Σ over sites of α[site] t[site, option]     t the relative output error, α how much the model minds it
 * so the choice is a knapsack, and dynamic programming over bytes solves it exactly, in steps of `unit` bytes.
 */

/** One way to store a site. */
export interface Option {
  readonly sizeBytes: number;
  /** α t, in nats. */
  readonly cost: number;
}

export interface Allocation {
  /** Index of the option of each site. */
  readonly choice: readonly number[];
  readonly sizeBytes: number;
  readonly cost: number;
}

/** Steps that a budget is divided in; each site's size is rounded up to a step, so a budget is never exceeded. */
const STEPS = 200_000;

/** The least cost for every size up to `budget`; undefined where not even the smallest options fit. */
class Table {
  /** (steps + 1) least cost of the sites so far within so many units. */
  private best = new Float64Array(STEPS + 1);
  /** Per site (steps + 1) the option taken. */
  private readonly taken: Uint8Array[] = [];
  private readonly units: number[][] = [];

  constructor(
    private readonly sites: readonly (readonly Option[])[],
    private readonly unit: number,
  ) {
    for (const options of sites) this.add(options);
  }

  private add(options: readonly Option[]): void {
    const next = new Float64Array(STEPS + 1).fill(Number.POSITIVE_INFINITY);
    const taken = new Uint8Array(STEPS + 1);
    const units = options.map(({ sizeBytes }) => Math.ceil(sizeBytes / this.unit));
    for (const [index, { cost }] of options.entries()) {
      const { best } = this;
      const size = units[index];
      for (let at = size; at <= STEPS; at++) {
        const total = best[at - size] + cost;
        if (total < next[at]) {
          next[at] = total;
          taken[at] = index;
        }
      }
    }
    this.best = next;
    this.taken.push(taken);
    this.units.push(units);
  }

  /** The cheapest choice within so many units. */
  allocation(within: number): Allocation | undefined {
    if (!Number.isFinite(this.best[within])) return undefined;
    const choice = Array<number>(this.sites.length);
    let left = within;
    for (let site = this.sites.length - 1; site >= 0; site--) {
      choice[site] = this.taken[site][left];
      left -= this.units[site][choice[site]];
    }
    const of = (part: (option: Option) => number) =>
      choice.reduce((sum, index, site) => sum + part(this.sites[site][index]), 0);
    return { choice, sizeBytes: of(({ sizeBytes }) => sizeBytes), cost: of(({ cost }) => cost) };
  }

  /** The fewest units whose cost is at most `limit`. */
  unitsFor(limit: number): number | undefined {
    const found = this.best.findIndex((cost) => cost <= limit);
    return found < 0 ? undefined : found;
  }
}

/** The least cost within a budget; undefined where even the smallest options exceed it. */
export function allocateWithin(sites: readonly (readonly Option[])[], budgetBytes: number): Allocation | undefined {
  return new Table(sites, budgetBytes / STEPS).allocation(STEPS);
}

/** The fewest bytes at a cost of at most `limit`; undefined where even the best options cost more. */
export function allocateFor(sites: readonly (readonly Option[])[], limit: number): Allocation | undefined {
  const most = sites.reduce((sum, options) => sum + Math.max(...options.map(({ sizeBytes }) => sizeBytes)), 0);
  const table = new Table(sites, (most * (1 + sites.length / STEPS)) / STEPS);
  const units = table.unitsFor(limit);
  return units === undefined ? undefined : table.allocation(units);
}
