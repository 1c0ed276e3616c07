import { describe, expect, test } from "vitest";
import { speedOf, threadsThatPay } from "../../src/web/thread-choice.ts";

const NOW = 1_800_000_000_000;
const even = Array.from({ length: 40 }, (_, i) => 23 + (i % 3));
/** Two threads on one core: a step now and then finds both cores free. */
const held = Array.from({ length: 40 }, (_, i) => (i % 5 === 0 ? 19 : 60));
const at = (steps: readonly number[], when = NOW) => speedOf(steps, when)!;

describe("threads that pay", () => {
  test("a short answer tells nothing, a slow growth with the context is even", () => {
    expect(speedOf(even.slice(0, 5), NOW)).toBeUndefined();
    expect(at(even)).toMatchObject({ stepMs: 24, at: NOW });
    expect(at(even.map((step, i) => step + 3 * i)).unevenness).toBeLessThan(1.6);
    expect(at(held).unevenness).toBeGreaterThan(3);
  });

  test("as many as the cores allow, until their steps were uneven; then the faster of both", () => {
    expect(threadsThatPay(2, {}, NOW)).toBe(2);
    expect(threadsThatPay(2, { 2: at(even) }, NOW)).toBe(2);
    expect(threadsThatPay(2, { 2: at(held) }, NOW)).toBe(1);
    expect(threadsThatPay(4, { 4: at(held), 1: at(even.map((step) => 1.3 * step)) }, NOW)).toBe(1);
    expect(threadsThatPay(4, { 4: at(held), 1: at(even.map((step) => 4 * step)) }, NOW)).toBe(4);
    expect(threadsThatPay(1, { 1: at(held) }, NOW)).toBe(1);
  });

  test("what held a core the day before yesterday is forgotten", () => {
    expect(threadsThatPay(2, { 2: at(held, NOW - 2 * 24 * 3600 * 1000) }, NOW)).toBe(2);
  });
});
