/**
 * Constants that a file holds in fewer bits than the operators that read them: planes of bits (src/tensor/pack.ts) and
 * scales as codes with a factor a row, brought back by plain operators. ONNX Runtime computes nodes whose inputs are all
 * constants when it opens a file, before MatMulNBits lays out its weights, so every consumer runs what a plainly stored
 * file would give it, bit for bit; Nibble's own runtimes do the same before (src/onnx/fold-constants.ts), in less memory.
 */
import type { Graph, Value } from "../onnx/graph.ts";
import * as ops from "../onnx/ops.ts";
import { containerBits, type Plane, packPlane, planeBytes, planesOf } from "../tensor/pack.ts";

/** uint8 (...shape) of containers whose codes take `bits`; `load` gives the containers' bytes. */
export function storedCodes(
  g: Graph,
  name: string,
  bits: number,
  shape: readonly number[],
  load: () => Promise<Uint8Array>,
): Value {
  const planes = planesOf(bits);
  if (planes.length === 0) return g.initializer(name, "uint8", shape, load);
  const bytes = shape.reduce((product, size) => product * size, 1);
  const [rows, ...row] = shape;
  // where every plane's runs are whole rows, joining them gives the final shape
  const byRows = planes.every(({ pieces }) => rows % pieces === 0);
  const parts = planes.map((plane) => {
    const planeShape = byRows ? [rows / plane.pieces, ...row] : [planeBytes(plane, bytes)];
    const stored = g.initializer(`${name}/bit${plane.offset}`, "uint8", planeShape, async () =>
      packPlane(plane, await load()),
    );
    const joined = ops.concat(g, fieldsOf(g, plane, stored), 0);
    const cut = byRows || joined.shape[0] === bytes;
    return cut ? joined : ops.slice(g, joined, g.ints([0]), g.ints([bytes]), 0, bytes);
  });
  const codes = parts.reduce((all, part) => ops.bitwiseOr(g, all, part));
  return byRows ? codes : ops.reshape(g, codes, shape, shape);
}

/** Every piece's fields, at their place in the code. */
function fieldsOf(g: Graph, { width, offset, pieces, mask }: Plane, stored: Value): Value[] {
  return Array.from({ length: pieces }, (_, piece) => {
    const shift = piece * width - offset;
    const moved =
      shift === 0 ? stored : ops.bitShift(g, stored, byte(g, Math.abs(shift)), shift > 0 ? "RIGHT" : "LEFT");
    return ops.bitwiseAnd(g, moved, byte(g, mask << offset));
  });
}

/** Symmetric codes moved to the middle of their container, whose own default zero point then holds. */
export function centredCodes(g: Graph, codes: Value, bits: number): Value {
  const container = containerBits(bits);
  const shift = 2 ** (container - 1) - 2 ** (bits - 1);
  if (shift === 0) return codes;
  let everyCode = 0;
  for (let at = 0; at < 8; at += container) everyCode |= shift << at;
  return ops.add(g, codes, byte(g, everyCode));
}

export function byte(g: Graph, value: number): Value {
  return g.initializer(`const/uint8/${value}`, "uint8", [], Uint8Array.of(value));
}
