/** How prompts are multiplied: what is chosen, what is refused. */
import { expect, test } from "vitest";
import { choosePromptProducts, type PromptWish } from "../../src/node/prompt-choice.ts";

const wish: PromptWish = { device: "cpu", int8Bytes: 100e6, weightBytes: 80e6, spareBytes: 1e9 };
const choose = (changes: Partial<PromptWish>) => choosePromptProducts("folder", { ...wish, ...changes });

test("int8 on a CPU with memory for it, else as stored", () => {
  expect(choose({})).toEqual({ products: "int8" });
  expect(choose({ promptProducts: "stored" })).toEqual({ products: "stored" });
  expect(choose({ device: "webgpu" })).toEqual({ products: "stored" });
  expect(choose({ int8Bytes: 0 })).toEqual({ products: "stored" });
});

test("too little memory is said, and refused where int8 was asked for", () => {
  expect(choose({ spareBytes: 400e6 })).toMatchObject({
    products: "stored",
    note: expect.stringContaining("int8 weights of 100 MB take 460 MB while they load, and 400 MB are left"),
  });
  const refused = expect.objectContaining({ code: "no_space", param: "promptProducts" });
  expect(() => choose({ promptProducts: "int8", spareBytes: 400e6 })).toThrow(refused);
});

test("int8 by name is refused where there is none", () => {
  const refused = expect.objectContaining({ code: "unsupported", param: "promptProducts" });
  expect(() => choose({ promptProducts: "int8", device: "webgpu" })).toThrow(refused);
  expect(() => choose({ promptProducts: "int8", int8Bytes: 0 })).toThrow(refused);
});
