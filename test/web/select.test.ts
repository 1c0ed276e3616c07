import { describe, expect, test } from "vitest";
import type { BuildChoice, DeviceReport } from "../../src/web/device.ts";
import { parseSource } from "../../src/web/remote.ts";
import { checkFit, kvBytesOf, selectFiles } from "../../src/web/select.ts";

const wasm: BuildChoice = { build: "wasm", device: "wasm", threads: 1, reason: "" };
const webgpu: BuildChoice = { ...wasm, build: "webgpu-jspi", device: "webgpu" };
const report: DeviceReport = {
  gpu: { vendor: "", architecture: "", software: false, shaderF16: true, maxTensorBytes: 2 ** 30 },
  noGpuReason: undefined,
  crossOriginIsolated: true,
  cores: 2,
  memoryBytes: 4 * 2 ** 30,
  jspi: true,
  storage: { quotaBytes: 1000, usedBytes: 400, persistent: false },
};
const file = (path: string, sizeBytes = 10) => ({ path, sizeBytes });
const folder = [
  file("config.json"),
  file("tokenizer.json"),
  file("README.md"),
  file("model.safetensors", 900),
  file("onnx/model_q4.onnx"),
  file("onnx/model_q4.kv-int8.onnx"),
  file("onnx/model_q4.onnx_data", 100),
  file("onnx/model_q4f16.onnx"),
  file("onnx/model_q4f16.onnx_data", 80),
];
const paths = (choice: BuildChoice, wanted?: string) =>
  selectFiles(folder, choice, report, wanted).files.map(({ path }) => path);

describe("the files a device fetches", () => {
  test("are the side files, one graph, its data and the graphs that share them", () => {
    expect(paths(wasm)).toEqual([
      "config.json",
      "tokenizer.json",
      "onnx/model_q4.onnx",
      "onnx/model_q4.kv-int8.onnx",
      "onnx/model_q4.onnx_data",
    ]);
    expect(selectFiles(folder, wasm, report)).toMatchObject({ sizeBytes: 140, weightBytes: 110 });
  });

  test("are the f16 ones only with shader-f16", () => {
    expect(selectFiles(folder, webgpu, report).graph).toBe("onnx/model_q4f16.onnx");
    const noF16 = { ...report, gpu: { ...report.gpu!, shaderF16: false } };
    expect(selectFiles(folder, webgpu, noF16).graph).toBe("onnx/model_q4.onnx");
  });

  test("of a variant include its weights, which carry the name of the first graph", () => {
    expect(paths(wasm, "onnx/model_q4.kv-int8.onnx")).toContain("onnx/model_q4.onnx_data");
  });

  test("of a folder without a graph are an error that lists what is there", () => {
    const bad = () => selectFiles([file("onnx/encoder.onnx")], wasm, report);
    expect(bad).toThrow(/none of onnx\/model_q4.onnx.*it has onnx\/encoder.onnx/);
  });
});

describe("a model that cannot fit", () => {
  const need = { downloadBytes: 500, weightBytes: 500, kvBytes: 0, tensorBytes: 0, twin: false };
  test("in storage is refused with both numbers", () => {
    expect(() => checkFit(need, wasm, report)).not.toThrow();
    expect(() => checkFit({ ...need, downloadBytes: 601 }, wasm, report)).toThrow(/needs 601 bytes.*there are 600/);
  });
  test("in 32-bit WASM memory is refused there and not on WebGPU", () => {
    const large = { ...need, weightBytes: 5 * 2 ** 30 };
    const roomy = { ...report, memoryBytes: 8 * 2 ** 30 };
    expect(() => checkFit(large, wasm, roomy)).toThrow(/WASM memory/);
    expect(() => checkFit(large, webgpu, roomy)).not.toThrow();
  });
  test("is refused for its cache, and for the twin that is made of it", () => {
    const roomy = { ...report, memoryBytes: 8 * 2 ** 30, storage: undefined };
    expect(() => checkFit({ ...need, kvBytes: 5 * 2 ** 30 }, wasm, roomy)).toThrow(/WASM memory/);
    const large = { ...need, weightBytes: 2.5 * 2 ** 30 };
    expect(() => checkFit(large, wasm, roomy)).not.toThrow();
    expect(() => checkFit({ ...large, twin: true }, wasm, roomy)).toThrow(/WASM memory/);
    expect(() => checkFit({ ...need, twin: true }, wasm, report)).toThrow(/needs 1,500 bytes of this site's storage/);
  });
  test("takes its cache's size from the config, whatever family's names it has", () => {
    const smollm = { num_hidden_layers: 30, num_attention_heads: 9, num_key_value_heads: 3, hidden_size: 576 };
    expect(kvBytesOf({ ...smollm, max_position_embeddings: 8192 }, 4096)).toBe(4096 * 30 * 2 * 3 * 64 * 4);
    expect(kvBytesOf({ ...smollm, max_position_embeddings: 512 }, 4096)).toBe(512 * 30 * 2 * 3 * 64 * 4);
    expect(kvBytesOf({ n_layer: 2, n_head: 4, n_embd: 64, n_positions: 128 }, 100)).toBe(100 * 2 * 2 * 64 * 4);
    expect(kvBytesOf({}, 4096)).toBe(0);
  });
  test("is refused for a tensor larger than a buffer of the GPU, and runs on WASM", () => {
    const wide = { ...need, tensorBytes: 2 ** 30 + 1 };
    expect(() => checkFit(wide, webgpu, report)).toThrow(
      /needs 1,073,741,825 bytes of one buffer of the GPU; there are 1,073,741,824/,
    );
    expect(() => checkFit(wide, wasm, report)).not.toThrow();
  });
  test("in the machine's memory is refused", () => {
    expect(() => checkFit({ ...need, weightBytes: 3 * 2 ** 30 }, webgpu, report)).toThrow(/bytes of memory/);
  });
});

describe("what a user types as a model", () => {
  test("is a URL, a path of this host, or a hub id with a revision", () => {
    expect(parseSource(" https://host/m/ ")).toEqual({ kind: "url", url: "https://host/m/" });
    expect(parseSource("./models/a")).toEqual({ kind: "url", url: "./models/a" });
    expect(parseSource("org/name@v1.0")).toEqual({ kind: "hub", id: "org/name", revision: "v1.0" });
  });
  test("is refused when it is none of these", () => {
    expect(() => parseSource("smollm")).toThrow(/is no model/);
  });
});
