/** int8 weights of rotated columns against their plain definition. */
import { expect, test } from "vitest";
import { BLOCK, blockRotation, rotatedColumns } from "../../src/export/rotated-columns.ts";
import { hadamard, timesHadamard } from "../../src/tensor/hadamard.ts";
import { unpackMatrix } from "../../src/tensor/pack.ts";
import { dequantize } from "../../src/tensor/quantized.ts";

const INT8_MAX = 127;
/** Sums of 64 products of numbers of float32, in another order. */
const ROUNDING = 1e-5;

const noise = (length: number, seed: number) =>
  Uint8Array.from({ length }, (_, i) => (Math.imul(i + seed, 2654435761) >>> 11) & 255);

test.each([
  ["with zero points", 32, true],
  ["symmetric", 32, false],
  ["with a ragged last group", 128, true],
])("a row is that of the matrix times H, within half a step: %s", (_, groupSize, asymmetric) => {
  const [rows, cols, bits] = [70, 192, 4]; // more than a tile
  const groups = Math.ceil(cols / groupSize);
  const scales = Float32Array.from(noise(rows * groups, 1), (byte, i) => (i < groups ? 0 : (byte - 100) / 1000));
  const codes = noise((rows * groups * groupSize) / 2, 2);
  const zeros = asymmetric ? noise(rows * Math.ceil(groups / 2), 3) : undefined;
  const expected = Float64Array.from(dequantize(unpackMatrix({ rows, cols, bits, groupSize }, codes, scales, zeros)));
  timesHadamard(expected, hadamard(BLOCK));
  const { values, rowScales } = rotatedColumns({ rows, cols, bits, groupSize, codes, scales, zeros });
  for (let row = 1; row < rows; row++) {
    const own = expected.subarray(row * cols, (row + 1) * cols);
    const step = rowScales[row];
    expect(step).toBeCloseTo(Math.max(...own.map(Math.abs)) / INT8_MAX, 6);
    for (let col = 0; col < cols; col++) {
      expect(Math.abs(values[col * rows + row] * step - own[col])).toBeLessThanOrEqual(step * (0.5 + ROUNDING));
    }
  }
  const first = Array.from({ length: cols }, (_, col) => values[col * rows]);
  expect([rowScales[0], ...first]).toEqual(Array(cols + 1).fill(0));
});

test("activations are rotated by the same H, which is its own inverse", () => {
  const H = blockRotation();
  const unit = new Float64Array(BLOCK * BLOCK);
  for (let i = 0; i < BLOCK; i++) unit[i * BLOCK + i] = 1;
  timesHadamard(unit, hadamard(BLOCK));
  expect([...H]).toEqual([...unit]);
  for (const [i, j] of [
    [0, 0],
    [5, 5],
    [5, 6],
    [63, 1],
  ]) {
    let sum = 0;
    for (let k = 0; k < BLOCK; k++) sum += H[i * BLOCK + k] * H[j * BLOCK + k];
    expect(sum).toBe(i === j ? 1 : 0);
  }
});
