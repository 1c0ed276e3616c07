import { expect, test } from "vitest";
import { Random } from "../../src/runtime/random.ts";
import { exponentiate } from "../../src/runtime/softmax.ts";

test.each([1, 0.7, 0.01, 3])(
  "temperature %f: Math.exp's weights to a float32's last digit, and their sum",
  (temperature) => {
    const random = new Random(1);
    const logits = Float32Array.from({ length: 20_000 }, () => (random.uniform() - 0.5) * 60);
    const max = Math.max(...logits);
    const wanted = logits.map((logit) => Math.exp((logit - max) / temperature));
    const total = exponentiate(logits, max, temperature);
    for (const [id, weight] of logits.entries()) {
      expect(Math.abs(weight - wanted[id])).toBeLessThanOrEqual(wanted[id] * 2 ** -23 + 2 ** -149);
    }
    expect(total).toBeCloseTo(
      wanted.reduce((a, b) => a + b),
      5,
    );
    expect(Math.max(...logits)).toBe(1);
  },
);

test("what weighs nothing: -infinity, no number, and all but the largest as the temperature nears 0", () => {
  const logits = Float32Array.of(1, Number.NEGATIVE_INFINITY, Number.NaN, -3e38, 1);
  expect([exponentiate(logits, 1, 1), ...logits]).toEqual([2, 1, 0, 0, 0, 1]);
  const cold = Float32Array.of(1, 0.999, 1);
  expect([exponentiate(cold, 1, 5e-324), ...cold]).toEqual([2, 1, 0, 1]);
});
