/**
 * What this browser offers, and which one onnxruntime-web build fits it. Builds are not mixed: the two WebGPU ones have
 * no CPU kernel of GatherBlockQuantized, the plain one has no WebGPU.
 */
import { NibbleError } from "../errors.ts";

export interface GpuReport {
  readonly vendor: string;
  readonly architecture: string;
  /** A CPU rasterizer (SwiftShader) in the place of a GPU: right results, slower than WASM. */
  readonly software: boolean;
  readonly shaderF16: boolean;
  /** One tensor is one binding, so this bounds the largest weight. */
  readonly maxTensorBytes: number;
}

export interface StorageReport {
  readonly quotaBytes: number;
  readonly usedBytes: number;
  /** The browser promised not to evict what is stored. */
  readonly persistent: boolean;
}

export interface DeviceReport {
  readonly gpu: GpuReport | undefined;
  /** Why `gpu` is undefined. */
  readonly noGpuReason: string | undefined;
  /** SharedArrayBuffer, hence WASM threads, exist only where the page came with COOP and COEP headers. */
  readonly crossOriginIsolated: boolean;
  readonly cores: number;
  /** navigator.deviceMemory: rounded and capped by the browser; undefined where it does not tell. */
  readonly memoryBytes: number | undefined;
  /** JavaScript Promise Integration: allows the smaller WebGPU build. */
  readonly jspi: boolean;
  readonly storage: StorageReport | undefined;
}

export type OrtBuild = "webgpu-jspi" | "webgpu-asyncify" | "wasm";
/** `auto` takes a real GPU where there is one. */
export type DeviceWish = "auto" | "webgpu" | "wasm";

export interface BuildChoice {
  readonly build: OrtBuild;
  readonly device: "webgpu" | "wasm";
  readonly threads: number;
  /** One sentence for the user: why this build, and what would make it faster. */
  readonly reason: string;
}

/** More threads than this do not pay in ONNX Runtime's WASM pool; half the logical cores are physical ones. */
const MAX_THREADS = 4;
/** Of two cores both are taken: what of a token runs side by side is worth more than what a page needs meanwhile. */
const BOTH = 2;
const GIB = 2 ** 30;

async function probeGpu(): Promise<{ gpu?: GpuReport; reason?: string }> {
  if (!globalThis.navigator?.gpu) return { reason: "the browser knows no WebGPU" };
  const adapter = await navigator.gpu.requestAdapter().catch(() => null);
  if (!adapter) return { reason: "the browser offers no WebGPU adapter" };
  const { vendor, architecture, isFallbackAdapter } = adapter.info;
  return {
    gpu: {
      vendor,
      architecture,
      software: isFallbackAdapter || architecture === "swiftshader",
      shaderF16: adapter.features.has("shader-f16"),
      maxTensorBytes: Math.min(adapter.limits.maxBufferSize, adapter.limits.maxStorageBufferBindingSize),
    },
  };
}

async function probeStorage(): Promise<StorageReport | undefined> {
  const storage = globalThis.navigator?.storage;
  if (!storage?.estimate) return undefined;
  const [{ quota = 0, usage = 0 }, persistent] = await Promise.all([storage.estimate(), storage.persisted()]);
  return { quotaBytes: quota, usedBytes: usage, persistent };
}

/** Asks the browser; runs in a page or a worker. */
export async function probeDevice(): Promise<DeviceReport> {
  const [{ gpu, reason }, storage] = await Promise.all([probeGpu(), probeStorage()]);
  const memoryGib = (navigator as Navigator & { deviceMemory?: number }).deviceMemory;
  return {
    gpu,
    noGpuReason: reason,
    crossOriginIsolated: globalThis.crossOriginIsolated === true,
    cores: navigator.hardwareConcurrency ?? 1,
    memoryBytes: memoryGib === undefined ? undefined : memoryGib * GIB,
    jspi: "Suspending" in WebAssembly,
    storage,
  };
}

/** WASM threads that this browser's cores and the host's headers allow. */
export function mostThreads({ crossOriginIsolated, cores }: DeviceReport): number {
  const most = Math.max(Math.min(BOTH, cores), Math.ceil(cores / 2));
  return crossOriginIsolated ? Math.max(1, Math.min(MAX_THREADS, most)) : 1;
}

/** The build for a device; throws `unsupported` when WebGPU was asked for and there is no adapter. */
export function chooseBuild(report: DeviceReport, wish: DeviceWish = "auto"): BuildChoice {
  const { gpu } = report;
  if (wish === "webgpu" && !gpu) {
    throw new NibbleError("unsupported", `WebGPU was asked for, but ${report.noGpuReason}; use "wasm" or "auto".`);
  }
  if (gpu && (wish === "webgpu" || (wish === "auto" && !gpu.software))) {
    const name = [gpu.vendor, gpu.architecture].filter(Boolean).join(" ") || "unnamed adapter";
    const build = report.jspi ? "webgpu-jspi" : "webgpu-asyncify";
    return { build, device: "webgpu", threads: 1, reason: `WebGPU on ${name}` };
  }
  const threads = mostThreads(report);
  const why =
    wish === "wasm" ? "as asked" : gpu ? "the WebGPU adapter is a software one, which is slower" : report.noGpuReason;
  const how = report.crossOriginIsolated
    ? `${threads} ${threads === 1 ? "thread" : "threads"}`
    : "1 thread: the host sends no COOP and COEP headers, so threads are off";
  return { build: "wasm", device: "wasm", threads, reason: `WASM (${why}), ${how}` };
}
