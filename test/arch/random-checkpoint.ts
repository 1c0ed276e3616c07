/** Checkpoints made in a test: tensors by name, and the seeded numbers to fill them. */
import type { Checkpoint } from "../../src/checkpoint/checkpoint.ts";
import type { FloatTensor } from "../../src/tensor/dtypes.ts";

/** Normal numbers (Box-Muller) from a seeded generator (mulberry32). */
export function normals(seed: number): (count: number, deviation?: number) => Float32Array {
  let state = seed;
  const uniform = () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
  return (count, deviation = 1) =>
    Float32Array.from(
      { length: count },
      () => deviation * Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform()),
    );
}

/** `base` with another config, and tensors added or replaced. */
export function changed(
  base: Checkpoint,
  config: Record<string, unknown>,
  tensors: ReadonlyMap<string, FloatTensor> = new Map(),
): Checkpoint {
  const infos = new Map(base.tensors);
  for (const [name, { shape }] of tensors) infos.set(name, { name, storedAs: "f32", shape });
  return {
    ...base,
    config: { ...base.config, ...config },
    tensors: infos,
    readTensor: async (name) => tensors.get(name) ?? base.readTensor(name),
    readRows: undefined,
  };
}
