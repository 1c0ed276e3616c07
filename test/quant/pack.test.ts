import { describe, expect, test } from "vitest";
import { blockSizeOf, inBlocks, widened } from "../../quant/pack.ts";
import { packCodes, packPlane, packZeros, planeBytes, planesOf, unpackMatrix } from "../../src/tensor/pack.ts";
import { dequantize, type QuantizedMatrix } from "../../src/tensor/quantized.ts";
import { random } from "./random.ts";

function randomMatrix(
  rows: number,
  cols: number,
  bits: number,
  groupSize: number,
  symmetric: boolean,
): QuantizedMatrix {
  const next = random(1);
  const groups = Math.ceil(cols / groupSize);
  const code = () => Math.floor(next() * 2 ** bits);
  return {
    rows,
    cols,
    bits,
    groupSize,
    codes: Uint8Array.from({ length: rows * cols }, code),
    scales: Float32Array.from({ length: rows * groups }, () => next() - 0.5),
    zeros: symmetric ? undefined : Uint8Array.from({ length: rows * groups }, code),
  };
}

const kind = (symmetric: boolean) => (symmetric ? "symmetric" : "asymmetric");

describe("matrices in MatMulNBits' containers", () => {
  for (const bits of [2, 4, 8])
    for (const cols of [64, 172, 576, 33])
      for (const groupSize of [16, 32, 128])
        for (const symmetric of [true, false])
          test(`${bits} bits, ${cols} columns in groups of ${groupSize}, ${kind(symmetric)}: bytes unpack to the same matrix`, () => {
            const matrix = randomMatrix(3, cols, bits, groupSize, symmetric);
            expect(inBlocks(matrix)).toBe(matrix);
            const bytes = packCodes(matrix);
            expect(unpackMatrix(matrix, bytes, matrix.scales, packZeros(matrix))).toEqual(matrix);
          });

  for (const bits of [3, 5, 6, 7])
    for (const symmetric of [true, false]) {
      test(`${bits} bits (${kind(symmetric)}) keep their values in a wider container`, () => {
        const matrix = randomMatrix(4, 50, bits, 16, symmetric);
        const wide = widened(matrix);
        expect(wide.bits).toBe(bits === 3 ? 4 : 8);
        expect(dequantize(wide)).toEqual(dequantize(matrix));
      });

      test(`${bits} bits (${kind(symmetric)}) come back from their planes byte for byte`, () => {
        for (const [rows, cols] of [
          [8, 64],
          [3, 172],
          [5, 33],
        ]) {
          const matrix = randomMatrix(rows, cols, bits, 16, symmetric);
          for (const bytes of [packCodes(matrix), packZeros(matrix) ?? new Uint8Array(1)]) {
            const whole = new Uint8Array(bytes.length);
            let stored = 0;
            for (const plane of planesOf(bits)) {
              const { width, offset, mask } = plane;
              const packed = packPlane(plane, bytes);
              const run = planeBytes(plane, bytes.length);
              stored += packed.length;
              for (let i = 0; i < whole.length; i++) {
                const field = (packed[i % run] >> (Math.floor(i / run) * width)) & mask;
                whole[i] |= field << offset;
              }
            }
            expect(whole).toEqual(bytes);
            const exact = (bytes.length * bits) / (bits === 3 ? 4 : 8);
            expect(stored).toBeGreaterThanOrEqual(exact);
            expect(stored).toBeLessThan(exact + planesOf(bits).length);
          }
        }
      });
    }

  test("2, 4 and 8 bits fill their container and have no planes", () => {
    for (const bits of [2, 4, 8]) expect(planesOf(bits)).toEqual([]);
  });

  test("whole rows and groups of 96 repeat their scale over blocks with the same values", () => {
    for (const [cols, groupSize, block] of [
      [172, 172, 256],
      [600, 600, 256],
      [20, 20, 32],
      [192, 96, 32],
    ]) {
      const matrix = randomMatrix(3, cols, 4, groupSize, false);
      const blocked = inBlocks(matrix);
      expect(blocked.groupSize).toBe(block);
      expect(dequantize(blocked)).toEqual(dequantize(matrix));
    }
  });

  test("a group size that no block divides is refused", () => {
    expect(() => blockSizeOf({ cols: 64, groupSize: 24 })).toThrow(/no multiple of 16/);
  });
});
