/** The check that 8-bit products are added up exactly: true here, false where two of them end at 16 bits. */
import * as ort from "onnxruntime-node";
import { expect, test } from "vitest";
import { capiOrt } from "../../src/node/capi.ts";
import { addsExactly } from "../../src/node/exact-products.ts";
import type { Ort } from "../../src/onnx/ort.ts";

const real = ort as unknown as Ort;

/** A library whose sums of 64 products are 32 of at most 32,767. */
const saturating: Ort = {
  Tensor: real.Tensor,
  InferenceSession: {
    create: async () => {
      const data = new Float32Array(64 * 64).fill(32 * 32_767);
      return { run: async () => ({ sums: { data } }), release: async () => undefined } as never;
    },
  },
};

test("both bindings say the same of this CPU, and a CPU that ends at 16 bits is found out", async () => {
  expect(await addsExactly(await capiOrt())).toBe(await addsExactly(real));
  expect(await addsExactly(saturating)).toBe(false);
});
