/** Scaling groups that most families share, and what folding factors into one does to the weights. */
import type { DecoderConfig, ScalingGroup } from "./architecture.ts";
import type { Weights } from "./weights.ts";

/** v -> o: query head h of o's input reads kv head floor(h * kvHeads / heads) of v. */
export function valueToOutput(
  at: string,
  { heads, kvHeads, headDim }: Pick<DecoderConfig, "heads" | "kvHeads" | "headDim">,
  output = "o_proj",
): ScalingGroup {
  const queriesPerKv = heads / kvHeads;
  return {
    from: { linear: `${at}.v_proj` },
    to: [`${at}.${output}`],
    source: (channel) => {
      const head = Math.floor(channel / headDim);
      return Math.floor(head / queriesPerKv) * headDim + (channel % headDim);
    },
  };
}

/** up -> down: the gate's activation multiplies up's output, so down's input is linear in it. */
export function upToDown(at: string): ScalingGroup {
  return { from: { linear: `${at}.up_proj` }, to: [`${at}.down_proj`] };
}

/** norm -> gate, up; up -> down */
export function gatedMlpScaling(norm: string, at: string, gainOffset?: number): readonly ScalingGroup[] {
  return [{ from: { norm, gainOffset }, to: [`${at}.gate_proj`, `${at}.up_proj`] }, upToDown(at)];
}

/** norm -> q, k, v (and whatever else reads that norm, where attention and MLP run side by side). */
export function normToAttention(
  norm: string,
  at: string,
  gainOffset?: number,
  alsoReads: readonly string[] = [],
): ScalingGroup {
  return { from: { norm, gainOffset }, to: [`${at}.q_proj`, `${at}.k_proj`, `${at}.v_proj`, ...alsoReads] };
}

export interface Fold {
  readonly group: ScalingGroup;
  /** One factor above 0 for each channel of `from`; 1 where no column of `to` reads the channel. */
  readonly scales: ArrayLike<number>;
}

/** The same function with factors moved: divided out of each group's `from`, multiplied into its `to`. */
export function foldScales(base: Weights, folds: readonly Fold[]): Weights {
  const changes = new Map<string, ((data: Float32Array) => void)[]>();
  const change = (tensor: string, apply: (data: Float32Array) => void) => {
    if (base.has(tensor)) changes.set(tensor, [...(changes.get(tensor) ?? []), apply]);
  };
  for (const { group, scales } of folds) {
    const { from, to, source = (channel: number) => channel } = group;
    const name = "norm" in from ? from.norm : from.linear;
    const offset = "norm" in from ? (from.gainOffset ?? 0) : 0;
    // a gain has one number a channel, a matrix a row
    change(`${name}.weight`, (data) => {
      const width = data.length / scales.length;
      for (let i = 0; i < data.length; i++) data[i] = (data[i] + offset) / scales[Math.floor(i / width)] - offset;
    });
    change(`${name}.bias`, (data) => {
      for (let i = 0; i < data.length; i++) data[i] /= scales[i];
    });
    for (const reader of to) {
      const [, cols] = base.shape(`${reader}.weight`);
      change(`${reader}.weight`, (data) => {
        for (let i = 0; i < data.length; i++) data[i] *= scales[source(i % cols)];
      });
    }
  }
  return {
    ...base,
    load: async (tensor) => {
      const apply = changes.get(tensor);
      const data = await base.load(tensor);
      if (!apply) return data;
      const copy = data.slice();
      for (const step of apply) step(copy);
      return copy;
    },
  };
}
