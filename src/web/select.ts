/** Which files of a model folder this device needs, and whether they fit, before a byte of them is fetched. */
import { NibbleError } from "../errors.ts";
import type { BuildChoice, DeviceReport } from "./device.ts";
import type { RemoteFile } from "./remote.ts";

/** Graph suffixes by device, best first; `q4f16` needs shader-f16, and WASM computes in float32 only. */
function graphOrder(choice: BuildChoice, report: DeviceReport): string[] {
  const graphs = ["model_q4", "model", "model_q2", "model_quantized"];
  return choice.device === "webgpu" && report.gpu?.shaderF16 ? ["model_q4f16", ...graphs, "model_fp16"] : graphs;
}

export interface Selection {
  /** "onnx/model_q4.onnx" */
  readonly graph: string;
  readonly files: readonly RemoteFile[];
  readonly sizeBytes: number;
  /** Bytes of the graph and its external data: what the runtime has to hold. */
  readonly weightBytes: number;
}

/** Side files, one graph with its data, and the small graphs that share the data. @param wanted the graph, where the user chose one. */
export function selectFiles(
  files: readonly RemoteFile[],
  choice: BuildChoice,
  report: DeviceReport,
  wanted?: string,
): Selection {
  const paths = new Set(files.map(({ path }) => path));
  const order = wanted ? [wanted] : graphOrder(choice, report).map((name) => `onnx/${name}.onnx`);
  const graph = order.find((path) => paths.has(path));
  if (!graph) {
    const there = [...paths].filter((path) => path.endsWith(".onnx"));
    const has = there.length ? `it has ${there.join(", ")}` : "it has no .onnx file";
    throw new NibbleError("not_found", `The model has none of ${order.join(", ")}: ${has}.`);
  }
  // "onnx/model_q4.kv-int8.onnx" shares the data files of "onnx/model_q4.onnx".
  const base = baseOf(graph);
  const isGraph = (path: string) => path.endsWith(".onnx") && baseOf(path) === base;
  const isData = (path: string) => path.startsWith(`${base}.onnx_data`);
  const chosen = files.filter(({ path }) => (path.includes("/") ? isGraph(path) || isData(path) : isSideFile(path)));
  const sum = (part: readonly RemoteFile[]) => part.reduce((total, { sizeBytes }) => total + sizeBytes, 0);
  return {
    graph,
    files: chosen,
    sizeBytes: sum(chosen),
    weightBytes: sum(chosen.filter(({ path }) => path === graph || isData(path))),
  };
}

function baseOf(graph: string): string {
  return graph.replace(/(\.[^/.]+)?\.onnx$/, "");
}

/** Configs, tokenizers and templates; not checkpoints, pictures or readmes that a hub repository also holds. */
function isSideFile(path: string): boolean {
  return /\.(json|jinja)$/.test(path) || path === "tokenizer.model" || /^LICENSE/.test(path);
}

/** WASM memory is addressed with 32 bits; the runtime's own code and buffers take about this much of it. */
const WASM_ADDRESS_BYTES = 2 ** 32;
const RUNTIME_BYTES = 200 * 2 ** 20;
/** A page that takes more than this share of the machine is closed by the browser. */
const MEMORY_SHARE = 0.75;

/** An integer twin holds a byte for every 4-bit weight, and what is float stays as it is. */
const TWIN_GROWTH = 2;

export interface Need {
  readonly downloadBytes: number;
  /** Of the graph and its data, as they are stored. */
  readonly weightBytes: number;
  readonly kvBytes: number;
  /** Its largest tensor, which a GPU holds in one buffer; 0 where that is not known before the download. */
  readonly tensorBytes: number;
  /** It runs as an integer twin, made after the download and kept beside it. */
  readonly twin: boolean;
}

type Json = Readonly<Record<string, unknown>>;

/** The float32 cache of so many tokens, by the names that configs use; 0 where a config tells too little. */
export function kvBytesOf(config: Json, tokens: number): number {
  const number = (...names: string[]) => names.map((name) => Number(config[name])).find((value) => value > 0) ?? 0;
  const heads = number("num_attention_heads", "n_head");
  const kvHeads = number("num_key_value_heads") || heads;
  const headDim = number("head_dim") || (heads && number("hidden_size", "n_embd") / heads);
  const bytesPerToken = number("num_hidden_layers", "n_layer") * kvHeads * headDim * 2 * Float32Array.BYTES_PER_ELEMENT;
  return bytesPerToken * Math.min(tokens, number("max_position_embeddings", "n_positions", "n_ctx") || tokens);
}

/** Throws `no_space` with the bytes needed and the bytes there are, when a model cannot fit. */
export function checkFit(need: Need, choice: BuildChoice, report: DeviceReport): void {
  const refuse = (what: string, needed: number, there: number, advice: string): never => {
    const message = `The model needs ${needed.toLocaleString("en")} bytes of ${what}; there are ${there.toLocaleString("en")}. ${advice}`;
    throw new NibbleError("no_space", message);
  };
  const twinBytes = need.twin ? need.weightBytes * TWIN_GROWTH : 0;
  if (report.storage) {
    const free = report.storage.quotaBytes - report.storage.usedBytes;
    const kept = need.downloadBytes + twinBytes;
    if (kept > free) refuse("this site's storage", kept, free, "Delete a stored model or free disk space.");
  }
  const memory = (twinBytes || need.weightBytes) + need.kvBytes + RUNTIME_BYTES;
  if (choice.device === "wasm" && memory > WASM_ADDRESS_BYTES) {
    refuse("WASM memory", memory, WASM_ADDRESS_BYTES, "Take a smaller model or context, or a browser with WebGPU.");
  }
  if (choice.device === "webgpu" && report.gpu && need.tensorBytes > report.gpu.maxTensorBytes) {
    refuse("one buffer of the GPU", need.tensorBytes, report.gpu.maxTensorBytes, "Take a smaller model, or WASM.");
  }
  // navigator.deviceMemory is capped (8 GiB in most browsers): at the cap the machine may have more.
  const cap = 8 * 2 ** 30;
  if (report.memoryBytes !== undefined && report.memoryBytes < cap && memory > report.memoryBytes * MEMORY_SHARE) {
    refuse("memory", memory, report.memoryBytes * MEMORY_SHARE, "Take a smaller model or a shorter context.");
  }
}
