/** Opens a graph of a model folder as a session, from wherever the folder's bytes are. */
import type { InferenceSession } from "onnxruntime-common";
import { NibbleError } from "../errors.ts";
import { type ByteSource, type FolderSource, readAll } from "../files.ts";
import { ConstantFolder, type MemoryFile, type ReadTensor } from "../onnx/fold-constants.ts";
import { withFloatActivations } from "../onnx/integer-product.ts";
import type { Ort } from "../onnx/ort.ts";
import { decodeModel, encodeModel, type ModelProto, type TensorProto } from "../onnx/proto.ts";

export interface OpenGraphOptions {
  readonly session?: InferenceSession.SessionOptions;
  /** Overrides MatMulNBits' accuracy_level; 0 computes in float, integer products too. */
  readonly accuracyLevel?: 0 | 4;
  /** Makes another graph on the same weights. */
  readonly change?: (model: ModelProto) => ModelProto;
}

/** Reads graph and data files into memory and creates a session on them. */
export async function openGraph(
  ort: Ort,
  folder: FolderSource,
  path: string,
  { session = {}, accuracyLevel, change }: OpenGraphOptions = {},
): Promise<InferenceSession> {
  let bytes = await readFile(folder, path);
  const stored = decodeModel(bytes, `${folder.name}/${path}`);
  let model = change ? change(stored) : stored;
  if (accuracyLevel !== undefined) setAccuracyLevel(model, accuracyLevel);
  if (accuracyLevel === 0) model = withFloatActivations(model);
  if (change || accuracyLevel !== undefined) bytes = encodeModel(model);
  const directory = path.slice(0, path.lastIndexOf("/") + 1);
  const externalData = [];
  for (const location of dataFiles(model)) {
    externalData.push({ path: location, data: await readFile(folder, directory + location) });
  }
  return ort.InferenceSession.create(bytes, { ...session, externalData });
}

/** Reads initializers from the graph or the files beside it. @param directory of the graph inside the folder, "onnx/". */
export function tensorReader(
  folder: FolderSource,
  directory: string,
): { readonly read: ReadTensor; close(): Promise<void> } {
  const opened = new Map<string, Promise<ByteSource>>();
  return {
    async read(tensor) {
      if (tensor.dataLocation !== 1) return tensor.rawData ?? new Uint8Array();
      const field = (key: string) => tensor.externalData?.find((entry) => entry.key === key)?.value;
      const path = directory + field("location");
      const opening = opened.get(path) ?? folder.open(path);
      opened.set(path, opening);
      const source = await opening;
      const offset = Number(field("offset") ?? 0);
      return source.read(offset, Number(field("length") ?? source.sizeBytes - offset));
    },
    async close() {
      for (const source of opened.values()) await (await source).close?.();
    },
  };
}

/**
 * Graph and tensors for a session in memory, where the file stores codes or scales at their own width: unpacked here,
 * one tensor at a time, they cost a fraction of what the runtime takes. Undefined where it can open the file as it is.
 * @param beside weights that only memory holds: the runtime takes those of a folder or of memory, not of both
 */
export async function unpackedModel(
  folder: FolderSource,
  path: string,
  model: ModelProto,
  beside: readonly MemoryFile[] = [],
): Promise<{ readonly bytes: Uint8Array; readonly externalData: readonly MemoryFile[] } | undefined> {
  const reader = tensorReader(folder, path.slice(0, path.lastIndexOf("/") + 1));
  const inMemory = new Map(beside.map(({ path, data }) => [path, data]));
  const read: ReadTensor = async (tensor) => inMemory.get(locationOf(tensor) ?? "") ?? reader.read(tensor);
  const constants = new ConstantFolder(model, read);
  if (constants.unpacked.size === 0 && beside.length === 0) return undefined;
  try {
    const folded = await constants.fold();
    return { bytes: encodeModel(folded.model), externalData: folded.files };
  } finally {
    await reader.close();
  }
}

/** Whether a file stores constants narrower than they are used. */
export function hasNarrowConstants(model: ModelProto): boolean {
  return new ConstantFolder(model, async () => new Uint8Array()).unpacked.size > 0;
}

/** The graph of a file as it is stored, its large tensors left where they are. */
export async function readGraph(folder: FolderSource, path: string): Promise<ModelProto> {
  const source = await folder.open(path);
  try {
    return decodeModel(await readAll(source), `${folder.name}/${path}`);
  } finally {
    await source.close?.();
  }
}

/** The file beside the graph that holds a tensor, if one does. */
export function locationOf({ dataLocation, externalData }: TensorProto): string | undefined {
  return dataLocation === 1 ? externalData?.find(({ key }) => key === "location")?.value : undefined;
}

/** Names of the files beside the graph that hold its large tensors. */
export function dataFiles(model: ModelProto): readonly string[] {
  const locations = model.graph.initializer.flatMap((tensor) => locationOf(tensor) ?? []);
  return [...new Set(locations)].sort();
}

function setAccuracyLevel(model: ModelProto, level: 0 | 4): void {
  for (const node of model.graph.node) {
    if (node.opType !== "MatMulNBits") continue;
    node.attribute = node.attribute.filter(({ name }) => name !== "accuracy_level");
    if (level) node.attribute.push({ name: "accuracy_level", type: 2, i: BigInt(level) });
  }
}

async function readFile(folder: FolderSource, path: string): Promise<Uint8Array> {
  if (!(await folder.has(path))) {
    throw new NibbleError(
      "not_found",
      `${folder.name}: ${path} is not there; this folder holds ${(await folder.list()).join(", ")}.`,
    );
  }
  const source = await folder.open(path);
  try {
    return await readAll(source);
  } finally {
    await source.close?.();
  }
}
