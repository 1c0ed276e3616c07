import { describe, expect, test } from "vitest";
import { chooseBuild, type DeviceReport } from "../../src/web/device.ts";

const bare: DeviceReport = {
  gpu: undefined,
  noGpuReason: "this browser has no WebGPU",
  crossOriginIsolated: false,
  cores: 8,
  memoryBytes: 8 * 2 ** 30,
  jspi: true,
  storage: undefined,
};
const gpu = { vendor: "nvidia", architecture: "ada", software: false, shaderF16: true, maxTensorBytes: 2 ** 31 };

describe("the ONNX Runtime build for a device", () => {
  test("a real GPU takes WebGPU, with the smaller build where JSPI exists", () => {
    expect(chooseBuild({ ...bare, gpu })).toMatchObject({ build: "webgpu-jspi", device: "webgpu" });
    expect(chooseBuild({ ...bare, gpu, jspi: false })).toMatchObject({ build: "webgpu-asyncify" });
  });

  test("a software adapter is used only when asked for", () => {
    const software = { ...bare, gpu: { ...gpu, software: true } };
    expect(chooseBuild(software).device).toBe("wasm");
    expect(chooseBuild(software, "webgpu").device).toBe("webgpu");
  });

  test("without isolation WASM has one thread, and the sentence says why", () => {
    const choice = chooseBuild(bare);
    expect(choice).toMatchObject({ build: "wasm", threads: 1 });
    expect(choice.reason).toContain("COOP and COEP");
    expect(choice.reason).toContain("no WebGPU");
  });

  test("with isolation WASM has half the cores, two at least where there are two, at most four", () => {
    const threads = (cores: number) => chooseBuild({ ...bare, crossOriginIsolated: true, cores }).threads;
    expect([1, 2, 3, 4, 8, 64].map(threads)).toEqual([1, 2, 2, 2, 4, 4]);
  });

  test("WebGPU asked for and not there is an error that says what to do", () => {
    expect(() => chooseBuild(bare, "webgpu")).toThrow(/no WebGPU; use "wasm" or "auto"/);
  });
});
