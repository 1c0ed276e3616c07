import { describe, expect, test } from "vitest";
import { blockSizeOf, containerBits, packMatrix, unpackMatrix } from "../../quant/pack.ts";
import { dequantize, type QuantizedMatrix } from "../../src/tensor/quantized.ts";
import { random } from "./random.ts";

function randomMatrix(
  rows: number,
  cols: number,
  bits: number,
  groupSize: number,
  symmetric: boolean,
  seed = 1,
): QuantizedMatrix {
  const next = random(seed);
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

describe("packing for MatMulNBits", () => {
  test("two 4-bit codes share a byte, the even column in the low nibble", () => {
    const codes = Uint8Array.from({ length: 16 }, (_, i) => i);
    const packed = packMatrix({
      rows: 1,
      cols: 16,
      bits: 4,
      groupSize: 16,
      codes,
      scales: Float32Array.of(1),
      zeros: Uint8Array.of(5),
    });
    expect([...packed.codes]).toEqual([0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0xdc, 0xfe]);
    expect([...packed.zeros!]).toEqual([0x05]);
  });

  for (const bits of [2, 4, 8])
    for (const cols of [64, 172, 576, 33])
      for (const groupSize of [16, 32, 128])
        for (const symmetric of [true, false])
          test(`${bits} bits, ${cols} columns in groups of ${groupSize}, ${symmetric ? "symmetric" : "asymmetric"}: unpacking gives the same matrix`, () => {
            const matrix = randomMatrix(3, cols, bits, groupSize, symmetric);
            expect(unpackMatrix(packMatrix(matrix))).toEqual(matrix);
          });

  for (const bits of [3, 5, 6, 7])
    for (const symmetric of [true, false])
      test(`${bits} bits ride in ${containerBits(bits)} with the same values (${symmetric ? "symmetric" : "asymmetric"})`, () => {
        const matrix = randomMatrix(4, 50, bits, 16, symmetric);
        expect(dequantize(unpackMatrix(packMatrix(matrix)))).toEqual(dequantize(matrix));
      });

  test("padding columns hold the code that means 0", () => {
    const packed = packMatrix(randomMatrix(2, 172, 4, 32, false));
    const wide = unpackMatrix({ ...packed, cols: packed.blocks * packed.blockSize });
    const values = dequantize(wide);
    for (let row = 0; row < 2; row++)
      for (let col = 172; col < wide.cols; col++) expect(Math.abs(values[row * wide.cols + col])).toBe(0);
  });

  test("a whole-row group and a group of 96 repeat their scale over blocks with the same values", () => {
    for (const [cols, groupSize] of [
      [172, 172],
      [600, 600],
      [192, 96],
    ]) {
      const matrix = randomMatrix(3, cols, 4, groupSize, false);
      expect(dequantize(unpackMatrix(packMatrix(matrix)))).toEqual(dequantize(matrix));
    }
    expect(blockSizeOf({ cols: 192, groupSize: 96 })).toBe(32);
  });

  test("a group size that no block divides is refused", () => {
    expect(() => blockSizeOf({ cols: 64, groupSize: 24 })).toThrow(/no multiple of 16/);
  });
});
