/** Gains of key channels: what they are least for, counted on keys and queries made here. */
import { describe, expect, test } from "vitest";
import { decodeRow, encodeRow } from "../../src/kv/int4-tiers.ts";
import { keyGains } from "../../src/kv/key-gains.ts";
import { headRotation, timesMatrix } from "../../src/kv/rotation.ts";
import { normals } from "../arch/random-checkpoint.ts";

const HEAD_DIM = 64;
const TOKENS = 400;

describe("the gains of keys", () => {
  test("leave a head of equal energies as it is, and one that is all 0", () => {
    const ones = new Float32Array(HEAD_DIM).fill(1);
    expect(keyGains({ spread: ones.map(() => 3), querySquares: ones.map(() => 7) }, HEAD_DIM)).toEqual(ones);
    expect(keyGains({ spread: ones.map(() => 0), querySquares: ones.map(() => 0) }, HEAD_DIM)).toEqual(ones);
  });

  test("keep a head's energy, and stay finite where a channel has none", () => {
    const spread = Float32Array.from({ length: 2 * HEAD_DIM }, (_, i) => (i % 5 ? 1 + (i % 7) : 0));
    const querySquares = spread.map((_, i) => (i % 3 ? 1 / (1 + (i % 11)) : 0));
    const gains = keyGains({ spread, querySquares }, HEAD_DIM);
    expect(gains.every((gain) => gain > 0.01 && gain < 100)).toBe(true);
    for (let head = 0; head < 2; head++) {
      const energy = (factor: (i: number) => number) =>
        spread
          .subarray(head * HEAD_DIM, (head + 1) * HEAD_DIM)
          .reduce((sum, x, i) => sum + x * factor(head * HEAD_DIM + i), 0);
      // channels without any count a little
      expect(energy((i) => gains[i] ** 2) / energy(() => 1)).toBeCloseTo(1, 1);
    }
  });

  test("take the share off the error of scores that the formula says", () => {
    const normal = normals(1);
    // what is large in keys is small in queries, and the other way round
    const keySize = normal(HEAD_DIM, 1.2).map(Math.exp);
    const querySize = normal(HEAD_DIM, 0.5).map((x, i) => Math.exp(x) / keySize[i]);
    const rows = (size: Float32Array) =>
      Array.from({ length: TOKENS }, () => normal(HEAD_DIM).map((x, i) => x * size[i]));
    const [keys, queries] = [rows(keySize), rows(querySize)];
    const square = (x: Float32Array) => x.map((deviation) => deviation * deviation);
    const energies = { spread: square(keySize), querySquares: square(querySize) };
    const H = headRotation(HEAD_DIM);
    const scoreError = (gains: Float32Array) => {
      let error = 0;
      for (const [t, key] of keys.entries()) {
        const codes = new Uint8Array(HEAD_DIM / 2);
        const turned = timesMatrix(
          key.map((x, i) => x * gains[i]),
          H,
          HEAD_DIM,
        );
        const kept = decodeRow(codes, encodeRow(turned, codes));
        const query = timesMatrix(
          queries[t].map((x, i) => x / gains[i]),
          H,
          HEAD_DIM,
        );
        error += kept.reduce((sum, x, i) => sum + (x - turned[i]) * query[i], 0) ** 2;
      }
      return error;
    };
    const sum = (of: (i: number) => number) => keys[0].reduce((total, _, i) => total + of(i), 0);
    const { spread, querySquares } = energies;
    const share =
      sum((i) => Math.sqrt(spread[i] * querySquares[i])) ** 2 / (sum((i) => spread[i]) * sum((i) => querySquares[i]));
    expect(share).toBeLessThan(0.5);
    const measured = scoreError(keyGains(energies, HEAD_DIM)) / scoreError(new Float32Array(HEAD_DIM).fill(1));
    expect(measured / share).toBeGreaterThan(0.6);
    expect(measured / share).toBeLessThan(1.6);
  });
});
