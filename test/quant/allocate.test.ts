/** The knapsack beside trying everything. */
import { describe, expect, test } from "vitest";
import { allocateFor, allocateWithin, type Option } from "../../quant/allocate.ts";
import { random } from "./random.ts";

function problem(seed: number): Option[][] {
  const next = random(seed);
  return Array.from({ length: 6 }, () =>
    Array.from({ length: 4 }, (_, i) => ({ sizeBytes: Math.ceil(next() * 100) + 30 * i, cost: next() / (i + 1) })),
  );
}

/** Every choice, one after the other. */
function* everyChoice(sites: readonly (readonly Option[])[]): Generator<{ sizeBytes: number; cost: number }> {
  for (let n = 0; n < 4 ** sites.length; n++) {
    const chosen = sites.map((options, site) => options[Math.floor(n / 4 ** site) % 4]);
    yield {
      sizeBytes: chosen.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0),
      cost: chosen.reduce((sum, { cost }) => sum + cost, 0),
    };
  }
}

/** A budget is divided in 200,000 steps, and each of six sizes rounded up to one: far below a byte here. */
describe("an allocation", () => {
  test("within a budget is the best of all that fit", () => {
    for (let seed = 1; seed < 6; seed++) {
      const sites = problem(seed);
      const budget = 450;
      const fitting = [...everyChoice(sites)].filter(({ sizeBytes }) => sizeBytes < budget);
      const best = Math.min(...fitting.map(({ cost }) => cost));
      const found = allocateWithin(sites, budget)!;
      expect(found.sizeBytes).toBeLessThanOrEqual(budget);
      expect(found.cost).toBeCloseTo(best, 12);
      expect(found.choice.reduce((sum, index, site) => sum + sites[site][index].cost, 0)).toBeCloseTo(best, 12);
    }
  });

  test("for a drift is the smallest of all that are good enough", () => {
    for (let seed = 1; seed < 6; seed++) {
      const sites = problem(seed);
      const limit = 1.2;
      const good = [...everyChoice(sites)].filter(({ cost }) => cost <= limit);
      const found = allocateFor(sites, limit)!;
      expect(found.cost).toBeLessThanOrEqual(limit);
      expect(found.sizeBytes).toBe(Math.min(...good.map(({ sizeBytes }) => sizeBytes)));
    }
  });

  test("is none where nothing fits", () => {
    expect(allocateWithin(problem(1), 20)).toBeUndefined();
    expect(allocateFor(problem(1), 1e-6)).toBeUndefined();
  });
});
