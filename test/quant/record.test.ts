import { expect, test } from "vitest";
import { decodeLayer, encodeLayer, type LayerRecord } from "../../quant/record.ts";

const record: LayerRecord = {
  linears: new Map([
    [
      "model.layers.0.mlp.up_proj",
      {
        matrix: {
          rows: 2,
          cols: 3,
          bits: 4,
          groupSize: 32,
          codes: Uint8Array.of(1, 2, 3, 4, 5, 6),
          scales: Float32Array.of(0.5, 0.25),
          zeros: Uint8Array.of(7, 8),
        },
        columnScales: Float64Array.of(1, 2, 1 / 3),
        rowScales: undefined,
        report: { relativeError: 0.01, foldExponent: 0.5 },
      },
    ],
    [
      "model.layers.0.mlp.down_proj",
      {
        matrix: {
          rows: 1,
          cols: 2,
          bits: 4,
          groupSize: 32,
          codes: Uint8Array.of(9, 10),
          scales: Float32Array.of(2),
          zeros: undefined,
        },
        columnScales: undefined,
        rowScales: Float64Array.of(4),
        report: {},
      },
    ],
  ]),
  floats: new Map([["model.layers.0.input_layernorm.weight", Float32Array.of(1, 2, 3)]]),
};

test("a layer's record comes back as it was", () => {
  expect(decodeLayer(encodeLayer(record))).toEqual(record);
});

test("a record comes back from bytes at an odd place in memory", () => {
  const bytes = encodeLayer(record);
  const shifted = new Uint8Array(bytes.length + 3);
  shifted.set(bytes, 3);
  expect(decodeLayer(shifted.subarray(3))).toEqual(record);
});

test("a record cut anywhere is refused", () => {
  const bytes = encodeLayer(record);
  for (const length of [0, 7, 20, bytes.length / 2, bytes.length - 8]) {
    expect(() => decodeLayer(bytes.slice(0, length))).toThrow(/damaged/);
  }
});
