/** What a graph's rotary tables say: by how much each pair of channels turns a position, and turning back. */
import { tensorReader } from "../export/open-graph.ts";
import type { FolderSource } from "../files.ts";
import { type AttentionNode, INPUT } from "../kv/attention-nodes.ts";
import type { ModelProto } from "../onnx/proto.ts";
import { f16ToF32 } from "../tensor/dtypes.ts";

export interface RotaryTable {
  /** Radians a position of each pair, (rotaryDim / 2). */
  readonly frequencies: Float64Array;
  /** Length of a turned pair over that of the pair (yarn's factor). */
  readonly factor: number;
  /** Positions that the graph has rows for. */
  readonly positions: number;
  readonly cos: Float32Array;
  readonly sin: Float32Array;
}

const FLOAT16 = 10;

/** The table of each layer; undefined where it is not rotated or takes its angles from elsewhere. */
export async function rotaryTables(
  folder: FolderSource,
  path: string,
  { graph }: ModelProto,
  layers: readonly AttentionNode[],
): Promise<(RotaryTable | undefined)[]> {
  const reader = tensorReader(folder, path.slice(0, path.lastIndexOf("/") + 1));
  const known = new Map<string, RotaryTable | undefined>();
  const floats = async (name: string) => {
    const tensor = graph.initializer.find((initializer) => initializer.name === name);
    if (!tensor || !name) return undefined;
    const { buffer } = Uint8Array.from(await reader.read(tensor));
    return tensor.dataType === FLOAT16 ? f16ToF32(new Uint16Array(buffer)) : new Float32Array(buffer);
  };
  try {
    const tables: (RotaryTable | undefined)[] = [];
    for (const { node, rotary, rotaryDim } of layers) {
      const name = rotary ? (node.input[INPUT.cos] ?? "") : "";
      if (!known.has(name)) {
        const [cos, sin] = [await floats(name), await floats(node.input[INPUT.sin] ?? "")];
        known.set(name, cos && sin && tableOf(cos, sin, rotaryDim / 2));
      }
      tables.push(known.get(name));
    }
    return tables;
  } finally {
    await reader.close();
  }
}

function tableOf(cos: Float32Array, sin: Float32Array, half: number): RotaryTable {
  const frequencies = Float64Array.from({ length: half }, (_, pair) => Math.atan2(sin[half + pair], cos[half + pair]));
  return { frequencies, factor: Math.hypot(cos[0], sin[0]), positions: cos.length / half, cos, sin };
}

/** The channels of each pair that turns with the position. */
export function rotatedPairs({ rotary, rotaryDim, interleaved }: AttentionNode): [number, number][] {
  const half = rotary ? rotaryDim / 2 : 0;
  return Array.from({ length: half }, (_, i) => (interleaved ? [2 * i, 2 * i + 1] : [i, i + half]));
}

/** Largest |cos| of the angles from `start` on, over `span` radians. */
export function largestCosine(start: number, span: number): number {
  if (Math.floor(start / Math.PI) !== Math.floor((start + span) / Math.PI)) return 1;
  return Math.max(Math.abs(Math.cos(start)), Math.abs(Math.cos(start + span)));
}
