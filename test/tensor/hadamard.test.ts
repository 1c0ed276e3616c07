import { describe, expect, test } from "vitest";
import { hadamard, timesHadamard } from "../../src/tensor/hadamard.ts";

/** H / sqrt(n), row by row. */
function matrixOf(size: number): Float64Array {
  const identity = new Float64Array(size * size);
  for (let i = 0; i < size; i++) identity[i * (size + 1)] = 1;
  timesHadamard(identity, hadamard(size));
  return identity;
}

describe("Hadamard matrices", () => {
  // every Paley core below 100, and the hidden sizes of the models that we know
  const sizes = [1, 2, 12, 20, 24, 28, 36, 44, 48, 60, 68, 72, 76, 80, 84, 64, 128, 288, 320, 576, 640, 896, 960, 1536];
  for (const size of sizes) {
    test(`size ${size}: entries are ±1 and H Hᵀ = size I`, () => {
      const H = matrixOf(size).map((x) => x * Math.sqrt(size));
      for (const x of H) expect(Math.abs(Math.abs(x) - 1)).toBeLessThan(1e-9);
      for (let a = 0; a < size; a += Math.ceil(size / 40)) {
        for (let b = 0; b < size; b++) {
          let sum = 0;
          for (let i = 0; i < size; i++) sum += H[a * size + i] * H[b * size + i];
          expect(Math.abs(sum - (a === b ? size : 0))).toBeLessThan(1e-6);
        }
      }
    });
  }

  test("the sizes of the issue have the cores that it names", () => {
    const cores = [576, 896, 1536].map((size) => hadamard(size).order);
    expect(cores).toEqual([36, 28, 12]);
  });

  test("a size that no construction reaches is refused with its number", () => {
    expect(() => hadamard(92)).toThrow(/size 92/);
    expect(() => hadamard(6)).toThrow(/size 6/);
  });
});
