/**
 * On WASM a 4-bit graph runs as its integer twin, made here once from the stored download and kept beside it in OPFS:
 * nothing is fetched twice, and the next opening finds it.
 */
import { toIntegerGraph } from "../export/integer-graph.ts";
import { readGraph, tensorReader } from "../export/open-graph.ts";
import { encodeModel } from "../onnx/proto.ts";
import type { BuildChoice } from "./device.ts";
import type { ModelFolder } from "./engine.ts";
import { handleFolder, opfsSink, subfolder } from "./opfs.ts";

/** Changes when the twin of a graph would come out differently. */
const TWIN = "int8-3";

export interface TwinPlace {
  readonly folder: ModelFolder;
  readonly graph: string;
}

/**
 * The graph to run on this device: the stored one, or its twin.
 * @param directory the model's own folder in OPFS, where `made/` goes.
 */
export async function graphFor(
  directory: FileSystemDirectoryHandle,
  folder: ModelFolder,
  graph: string,
  { device }: BuildChoice,
  onMatrix: (done: number, total: number) => void,
): Promise<TwinPlace> {
  if (device !== "wasm") return { folder, graph };
  const model = await readGraph(folder, graph);
  if (!model.graph.node.some(({ opType }) => opType === "MatMulNBits")) return { folder, graph };
  const name = graph.slice(graph.lastIndexOf("/") + 1).replace(/\.onnx$/, "");
  const place = `made/${name}.${TWIN}`;
  const twin = `${name}.onnx`;
  const ready = await subfolder(directory, place);
  if (ready) return { folder: handleFolder(ready, folder.name), graph: twin };

  const out = await opfsSink(directory, place);
  try {
    const location = `${twin}_data`;
    const sink = await out.create(location);
    const { read } = tensorReader(folder, graph.slice(0, graph.lastIndexOf("/") + 1));
    const integer = await toIntegerGraph(model, { read, sink, location, onMatrix });
    await sink.close();
    const file = await out.create(twin);
    await file.write(encodeModel(integer));
    await file.close();
    await out.commit();
  } catch (error) {
    await out.abort();
    throw error;
  }
  return { folder: handleFolder((await subfolder(directory, place))!, folder.name), graph: twin };
}
