/** Scaling groups that most families share. */
import type { DecoderConfig, ScalingGroup } from "./architecture.ts";

/** v -> o: query head h of o's input reads kv head floor(h * kvHeads / heads) of v. */
export function valueToOutput(
  at: string,
  { heads, kvHeads, headDim }: Pick<DecoderConfig, "heads" | "kvHeads" | "headDim">,
): ScalingGroup {
  const queriesPerKv = heads / kvHeads;
  return {
    from: { linear: `${at}.v_proj` },
    to: [`${at}.o_proj`],
    source: (channel) => {
      const head = Math.floor(channel / headDim);
      return Math.floor(head / queriesPerKv) * headDim + (channel % headDim);
    },
  };
}

/** norm -> gate, up; up -> down */
export function gatedMlpScaling(norm: string, at: string): readonly ScalingGroup[] {
  return [
    { from: { norm }, to: [`${at}.gate_proj`, `${at}.up_proj`] },
    { from: { linear: `${at}.up_proj` }, to: [`${at}.down_proj`] },
  ];
}
