/** Scaling groups that most families share. */
import type { DecoderConfig, ScalingGroup } from "./architecture.ts";

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
