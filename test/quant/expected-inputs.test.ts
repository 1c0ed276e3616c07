import { expect, test } from "vitest";
import { ExpectedInputs } from "../../quant/expected-inputs.ts";
import type { ScalingGroup } from "../../src/arch/architecture.ts";
import type { Weights } from "../../src/arch/weights.ts";
import { normals, random } from "./random.ts";

const HIDDEN = 24;
const HEADS = 8;
const groups: readonly ScalingGroup[] = [
  { from: { norm: "norm" }, to: ["v"] },
  // two columns of o read each row of v, as under grouped-query attention
  { from: { linear: "v" }, to: ["o"], source: (column) => Math.floor(column / 2) },
];

function weightsOf(tensors: Record<string, Float32Array>): Weights {
  return {
    has: (name: string) => name in tensors,
    shape: (name: string) => [tensors[name].length],
    load: async (name: string) => tensors[name],
    quantized: () => undefined,
  };
}

const next = random(1);
const gain = normals(HIDDEN, next);
const bias = normals(HIDDEN, next);
const v = { rows: HEADS, cols: HIDDEN, data: normals(HEADS * HIDDEN, next) };
const o = { rows: 4, cols: 2 * HEADS, data: normals(4 * 2 * HEADS, next) };

async function expectedOf(norm: Record<string, Float32Array>, made = v) {
  const expected = new ExpectedInputs(weightsOf(norm), groups);
  return { v: await expected.of(["v"], [made]), o: await expected.of(["o"], [o]) };
}

/** The share of its mean by which a mean square of 20,000 normals is off: 5 times sqrt(2 / 20,000). */
const SAMPLING = 0.05;

test("mean squares behind a norm and behind a linear are those of independent inputs of unit size", async () => {
  const expected = await expectedOf({ "norm.weight": gain, "norm.bias": bias });
  const tokens = 20_000;
  const before = new Float64Array(HIDDEN);
  const behind = new Float64Array(HEADS);
  for (let token = 0; token < tokens; token++) {
    const x = normals(HIDDEN, next).map((unit, c) => unit * gain[c] + bias[c]);
    for (let c = 0; c < HIDDEN; c++) before[c] += x[c] ** 2 / tokens;
    for (let r = 0; r < HEADS; r++) {
      let y = 0;
      for (let c = 0; c < HIDDEN; c++) y += v.data[r * HIDDEN + c] * (x[c] - bias[c]);
      behind[r] += y ** 2 / tokens;
    }
  }
  for (let c = 0; c < HIDDEN; c++) expect(Math.abs(expected.v![c] / before[c] - 1)).toBeLessThan(SAMPLING);
  const unbiased = await expectedOf({ "norm.weight": gain });
  for (let c = 0; c < 2 * HEADS; c++) {
    expect(Math.abs(unbiased.o![c] / behind[Math.floor(c / 2)] - 1)).toBeLessThan(SAMPLING);
  }
});

test("a checkpoint whose scale is split otherwise between norm and linear expects inputs scaled alike", async () => {
  const plain = await expectedOf({ "norm.weight": gain });
  const factors = Float64Array.from({ length: HIDDEN }, () => 2 ** Math.floor(6 * next() - 3));
  const rescaled = await expectedOf(
    { "norm.weight": gain.map((g, c) => g * factors[c]) },
    { ...v, data: v.data.map((w, i) => w / factors[i % HIDDEN]) },
  );
  expect(rescaled.v).toEqual(plain.v!.map((square, c) => square * factors[c] ** 2));
  expect(rescaled.o).toEqual(plain.o);
});

test("nothing is known of inputs that no norm and no linear makes", async () => {
  const expected = new ExpectedInputs(weightsOf({}), groups);
  expect(await expected.of(["down"], [o])).toBeUndefined();
  expect(await expected.of(["o"], [o])).toBeUndefined(); // v was not seen
});
