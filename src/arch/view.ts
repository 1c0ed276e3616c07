/** A checkpoint under other names and cuts: fused matrices cut by rows, Conv1D transposed, old spellings renamed. */
import type { Checkpoint, TensorInfo } from "../checkpoint/checkpoint.ts";
import { NibbleError } from "../errors.ts";
import type { FloatTensor } from "../tensor/dtypes.ts";
import { transpose } from "./model-builder.ts";

/** What a stored tensor gives to the view. */
export interface Part {
  readonly name: string;
  /** Swaps rows and columns first. */
  readonly transposed?: boolean;
  /** Ranges of rows [start, end), in this order; left out = all. Of a vector: its elements. */
  readonly rows?: readonly (readonly [number, number])[];
}

/** `rule` names the parts of a stored tensor; an empty list leaves it out. */
export function viewCheckpoint(
  checkpoint: Checkpoint,
  rule: (name: string, shape: readonly number[]) => readonly Part[],
): Checkpoint {
  const parts = new Map<string, { readonly stored: TensorInfo; readonly part: Part }>();
  const tensors = new Map<string, TensorInfo>();
  for (const stored of checkpoint.tensors.values()) {
    for (const part of rule(stored.name, stored.shape)) {
      if (parts.has(part.name)) {
        throw new NibbleError(
          "bad_weights",
          `${checkpoint.name}: two tensors are "${part.name}", one is "${stored.name}".`,
        );
      }
      const turned = part.transposed && stored.shape.length === 2 ? stored.shape.toReversed() : stored.shape;
      const count = part.rows?.reduce((sum, [start, end]) => sum + (end - start), 0);
      if (part.rows?.some(([, end]) => end > turned[0])) {
        throw new NibbleError(
          "bad_weights",
          `${checkpoint.name}: ${stored.name} has shape [${stored.shape.join(", ")}]; config.json asks for more rows.`,
        );
      }
      parts.set(part.name, { stored, part });
      tensors.set(part.name, {
        ...stored,
        name: part.name,
        shape: count === undefined ? turned : turned.with(0, count),
      });
    }
  }
  const find = (name: string) => {
    const found = parts.get(name);
    if (found) return found;
    throw new NibbleError("not_found", `${checkpoint.name} has no tensor "${name}".`, { param: name });
  };
  const readTensor = async (name: string): Promise<FloatTensor> => {
    const { stored, part } = find(name);
    if (part.rows && !part.transposed && checkpoint.readRows) {
      const pieces = await Promise.all(part.rows.map(([start, end]) => checkpoint.readRows!(stored.name, start, end)));
      return pieces.length === 1 ? pieces[0] : joinRows(pieces);
    }
    const whole = await checkpoint.readTensor(stored.name);
    const turned =
      part.transposed && whole.shape.length === 2
        ? { shape: whole.shape.toReversed(), data: transpose(whole.data, whole.shape[0], whole.shape[1]) }
        : whole;
    return part.rows ? joinRows(part.rows.map(([start, end]) => sliceRows(turned, start, end))) : turned;
  };
  return {
    ...checkpoint,
    tensors,
    readTensor,
    readRows: async (name, start, end) => {
      const { stored, part } = find(name);
      const range = part.rows?.length === 1 ? part.rows[0] : part.rows ? undefined : [0, 0];
      if (range && !part.transposed && checkpoint.readRows) {
        return checkpoint.readRows(stored.name, range[0] + start, range[0] + end);
      }
      return sliceRows(await readTensor(name), start, end);
    },
  };
}

function sliceRows({ shape, data }: FloatTensor, start: number, end: number): FloatTensor {
  const rowLength = shape.slice(1).reduce((product, dim) => product * dim, 1);
  return { shape: shape.with(0, end - start), data: data.subarray(start * rowLength, end * rowLength) };
}

function joinRows(pieces: readonly FloatTensor[]): FloatTensor {
  const data = new Float32Array(pieces.reduce((sum, piece) => sum + piece.data.length, 0));
  let at = 0;
  for (const piece of pieces) {
    data.set(piece.data, at);
    at += piece.data.length;
  }
  return {
    shape: pieces[0].shape.with(
      0,
      pieces.reduce((sum, { shape }) => sum + shape[0], 0),
    ),
    data,
  };
}
