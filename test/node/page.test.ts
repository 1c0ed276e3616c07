import { basename } from "node:path";
import { expect, test } from "vitest";
import { pageFile } from "../../src/node/page.ts";

test("ONNX Runtime's files come from its package", () => {
  expect(basename(pageFile("ort/ort-wasm-simd-threaded.wasm") ?? "")).toBe("ort-wasm-simd-threaded.wasm");
});

test("no path leads out of the page's folders", () => {
  for (const path of ["../../package.json", "ort/../../package.json", "../dist", "ort/", "", "/etc/passwd"]) {
    expect(pageFile(path)).toBeUndefined();
  }
});
