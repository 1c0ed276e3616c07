import { describe, expect, test } from "vitest";
import { ChannelMoment, SecondMoment, scaledTokens, streamShares, tokenWindows } from "../../quant/calibrate.ts";
import { gptqMatrix } from "../../quant/gptq.ts";
import { rowLosses } from "../../quant/loss.ts";
import { type InputStatistics, roundScaleToF16 } from "../../quant/types.ts";
import { plainProducts } from "../../src/tensor/linalg.ts";
import { correlatedInputs, normals, random, secondMoment } from "./random.ts";

describe("second moments", () => {
  test("batches add up to the moment of all tokens", async () => {
    const X = normals(60 * 8, random(1));
    const moment = new SecondMoment(8, plainProducts);
    for (const [start, end] of [
      [0, 10],
      [10, 10], // an expert that no token of a batch was routed to
      [10, 60],
    ])
      await moment.add(X.subarray(start * 8, end * 8));
    const { H, meanAbs, tokens } = moment.statistics();
    const expected = secondMoment(X, 60, 8);
    expect(tokens).toBe(60);
    for (let i = 0; i < 64; i++) expect(H[i]).toBeCloseTo(expected[i], 5);
    for (let c = 0; c < 8; c++) {
      let sum = 0;
      for (let t = 0; t < 60; t++) sum += Math.abs(X[t * 8 + c]);
      expect(meanAbs![c]).toBeCloseTo(sum / 60, 5);
    }
  });

  test("channels alone have its diagonal", async () => {
    const X = normals(60 * 8, random(4));
    const whole = new SecondMoment(8, plainProducts);
    const channels = new ChannelMoment(8);
    for (const part of [X.subarray(0, 80), X.subarray(80)]) {
      await whole.add(part);
      channels.add(part);
    }
    const [a, b] = [whole.statistics(), channels.statistics()];
    expect(b.tokens).toBe(60);
    expect(b.H.length).toBe(8);
    for (let c = 0; c < 8; c++) {
      expect(b.H[c]).toBeCloseTo(a.H[c * 9], 5);
      expect(b.meanAbs![c]).toBeCloseTo(a.meanAbs![c], 5);
    }
  });

  test("beside it comes the product with what the float prefix has for the same tokens", async () => {
    const next = random(2);
    const [X, F] = [normals(20 * 4, next), normals(20 * 3, next)];
    const moment = new SecondMoment(4, plainProducts);
    for (const [start, end] of [
      [0, 7],
      [7, 20],
    ])
      await moment.add(X.subarray(start * 4, end * 4), F.subarray(start * 3, end * 3));
    const { FX } = moment.statistics();
    for (let r = 0; r < 3; r++)
      for (let c = 0; c < 4; c++) {
        let sum = 0;
        for (let t = 0; t < 20; t++) sum += F[t * 3 + r] * X[t * 4 + c];
        expect(FX![r * 4 + c]).toBeCloseTo(sum / 20, 5);
      }
  });

  test("there is no such product where part of the tokens have nothing to compare with", async () => {
    const X = normals(20 * 4, random(3));
    const moment = new SecondMoment(4, plainProducts);
    await moment.add(X, X);
    await moment.add(X);
    expect(moment.statistics().FX).toBeUndefined();
  });
});

describe("shares of the residual stream", () => {
  test("make every token's stream the same size", () => {
    const stream = normals(12 * 6, random(5)).map((x, i) => (i < 6 ? 1000 * x : x));
    const scaled = scaledTokens(stream, streamShares(stream, 6));
    for (let token = 0; token < 12; token++) {
      let squares = 0;
      for (let i = token * 6; i < (token + 1) * 6; i++) squares += scaled[i] ** 2;
      expect(squares / 6).toBeCloseTo(1, 5);
    }
    expect([...streamShares(new Float32Array(6), 6)]).toEqual([0]); // a token of zeros has nothing that a norm could raise
  });

  test("let GPTQ see the tokens beside one that is a thousand times larger", async () => {
    const next = random(6);
    const [tokens, rows, cols] = [256, 24, 32];
    const W = { rows, cols, data: normals(rows * cols, next) };
    const ordinary = correlatedInputs(tokens, cols, next);
    const X = ordinary.slice();
    for (let i = 0; i < cols; i++) X[i] = i === 3 ? 30_000 : X[i];
    const { f32, gramSum } = plainProducts;
    const stream = await f32(X, W.data, { m: tokens, k: cols, n: rows, transB: true });
    const moment = async (inputs: Float32Array): Promise<InputStatistics> => {
      const sum = gramSum(cols);
      await sum.add(inputs, tokens);
      return { tokens, H: sum.total().XX.map((value) => value / tokens) };
    };
    const spec = { bits: 4, groupSize: 32, symmetric: false, roundScale: roundScaleToF16 };
    const others = secondMoment(ordinary, tokens, cols);
    const lossBy = async (statistics: InputStatistics) => {
      const losses = await rowLosses(W, await gptqMatrix(W, spec, statistics, plainProducts), others, plainProducts);
      return losses.reduce((sum, loss) => sum + loss, 0);
    };
    const blind = await lossBy(await moment(X));
    const seeing = await lossBy(await moment(scaledTokens(X, streamShares(stream, rows))));
    expect(seeing).toBeLessThan(0.2 * blind);
    expect(seeing).toBeLessThan(1.05 * (await lossBy(await moment(ordinary))));
  });
});

describe("calibration windows", () => {
  const tokenizer = { encode: (text: string) => [...text].map((letter) => letter.charCodeAt(0)) };

  test("are whole, of equal length and spread over all of the text", () => {
    const text = "a".repeat(40) + "b".repeat(40) + "c".repeat(7);
    const windows = tokenWindows(tokenizer, { texts: [text], sequenceLength: 10, windows: 4 });
    expect(windows.map((ids) => String.fromCharCode(ids[0]))).toEqual(["a", "a", "b", "b"]);
    expect(windows.every((ids) => ids.length === 10)).toBe(true);
  });

  test("too little text is refused with what it has", () => {
    expect(() => tokenWindows(tokenizer, { texts: ["abc"], sequenceLength: 10, windows: 4 })).toThrow(/3 tokens/);
  });
});
