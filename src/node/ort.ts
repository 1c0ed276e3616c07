/** ONNX Runtime for an engine's worker: which binding, which provider, how many threads. */
import { readFile } from "node:fs/promises";
import { basename, dirname } from "node:path";
import type { InferenceSession } from "onnxruntime-common";
import { NibbleError } from "../errors.ts";
import { hasNarrowConstants, locationOf, unpackedModel } from "../export/open-graph.ts";
import type { MemoryFile } from "../onnx/fold-constants.ts";
import { elementCode } from "../onnx/graph.ts";
import type { Lent, Ort } from "../onnx/ort.ts";
import { decodeModel, encodeModel, type ModelProto } from "../onnx/proto.ts";
import type { Binding } from "./binding.ts";
import { nodeFolder } from "./files.ts";

export interface OpenSessionOptions {
  readonly device: "cpu" | "webgpu";
  readonly threads?: number;
  /** Whether its threads wait for the next run by spinning (default) or give the cores away. */
  readonly spinBetweenRuns?: boolean;
}

export function sessionOptions({
  device,
  threads,
  spinBetweenRuns = true,
}: OpenSessionOptions): InferenceSession.SessionOptions {
  return {
    executionProviders: [device],
    graphOptimizationLevel: "all",
    // warnings of the graph optimizer (initializers it removed) are nobody's business; errors arrive as exceptions
    logSeverityLevel: 3,
    ...(threads === undefined ? {} : { intraOpNumThreads: threads }),
    ...(spinBetweenRuns ? {} : { extra: { session: { force_spinning_stop: "1" } } }),
  };
}

/** Loads one binding and not the other. */
export async function ortFor(binding: Binding): Promise<Ort> {
  if (binding === "capi") return (await import("./capi.ts")).capiOrt();
  return (await import("onnxruntime-node")) as unknown as Ort;
}

/** ONNX Runtime's session option for where the weights of a graph in memory lie. */
const WEIGHTS_FOLDER = "model_external_initializers_file_folder_path";

/**
 * A session on a graph file, or in memory where its constants have to be unpacked first or `changed` is another graph on
 * its weights and on `weights`; errors: `engine` with the runtime's own words.
 */
export async function openSession(
  ort: Ort,
  path: string,
  options: OpenSessionOptions,
  changed?: ModelProto,
  weights: readonly MemoryFile[] = [],
): Promise<InferenceSession> {
  const session = sessionOptions(options);
  const file = basename(path);
  const model = changed ?? decodeModel(await readFile(path), path);
  const lent = ort.lends && !hasNarrowConstants(model) ? tensorsOf(model, weights, ort) : undefined;
  const unpacked = await unpackedModel(nodeFolder(dirname(path)), file, model, lent ? [] : weights);
  try {
    if (!unpacked && !changed) return await ort.InferenceSession.create(path, session);
    if (!unpacked) {
      const beside = { session: { ...(session.extra?.session as object), [WEIGHTS_FOLDER]: dirname(path) } };
      return await ort.InferenceSession.create(encodeModel(model), {
        ...session,
        extra: beside,
        ...(lent && { lent }),
      });
    }
    const { bytes, externalData } = unpacked;
    return await ort.InferenceSession.create(bytes, { ...session, externalData });
  } catch (cause) {
    const message = cause instanceof Error ? cause.message : String(cause);
    const hint = options.device === "webgpu" ? " Without a GPU that WebGPU can use, --device cpu runs it." : "";
    throw new NibbleError("engine", `${path} could not be opened on ${options.device}: ${message}${hint}`, { cause });
  }
}

/** Constants of `model` that lie in `files`, by name: int8 codes and float32 scales. */
function tensorsOf({ graph }: ModelProto, files: readonly MemoryFile[], { Tensor }: Ort): Lent {
  const bytes = new Map(files.map(({ path, data }) => [path, data]));
  const found = graph.initializer.flatMap((tensor) => {
    const data = bytes.get(locationOf(tensor) ?? "");
    if (!data) return [];
    const isCodes = tensor.dataType === elementCode("int8");
    const values = isCodes ? new Int8Array(data.buffer) : new Float32Array(data.buffer);
    return [[tensor.name, new Tensor(isCodes ? "int8" : "float32", values, tensor.dims!.map(Number))]];
  });
  return Object.fromEntries(found);
}
