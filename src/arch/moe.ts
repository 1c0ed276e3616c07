/**
 * Mixture of experts (Shazeer et al. 2017, arXiv 1701.06538): a router picks `perToken` of the experts for every token and
 * weighs what they give.
 *
 * Emitted by plain operators that every provider has: each expert gathers the tokens routed to it, so it computes those
 * alone, and calibration, which taps the inputs of linears, sees for each expert just the tokens that it will meet.
 *   T tokens (batch * seq), E experts, k of them per token, n of the T * k choices fall on one expert
 */
import type { Value } from "../onnx/graph.ts";
import * as ops from "../onnx/ops.ts";
import type { ScalingGroup } from "./architecture.ts";
import type { ConfigReader } from "./config.ts";
import type { Activation, ModelBuilder } from "./model-builder.ts";
import { upToDown } from "./scaling.ts";

export interface MixtureConfig {
  readonly experts: number;
  readonly perToken: number;
  /** The chosen experts' weights are divided by their sum. */
  readonly normalised: boolean;
}

/** @param expertsKey "num_experts", or Mixtral's "num_local_experts" */
export function readMixture(config: ConfigReader, expertsKey: string, normalised: boolean): MixtureConfig {
  const experts = config.int(expertsKey);
  const perToken = config.int("num_experts_per_tok");
  if (perToken > experts) throw config.error("num_experts_per_tok", `is ${perToken}, of ${experts} experts`);
  return { experts, perToken, normalised };
}

export const expertNames = (at: string, { experts }: MixtureConfig): string[] =>
  Array.from({ length: experts }, (_, expert) => `${at}.experts.${expert}`);

/** x (batch, seq, hidden) -> the same shape; router at `at`.gate, experts at `at`.experts.N.{gate,up,down}_proj. */
export function mixtureOfExperts(
  m: ModelBuilder,
  x: Value,
  at: string,
  spec: MixtureConfig & { readonly activation: Activation },
): Value {
  const { g } = m;
  const { perToken } = spec;
  const hidden = x.shape[2] as number;
  const tokens = ops.reshape(g, x, [-1, hidden], ["tokens", hidden]); // (T, hidden)
  const { weights, chosen } = route(m, tokens, at, spec); // (T, k) each

  const outputs: Value[] = [];
  const places: Value[] = [];
  for (const [expert, name] of expertNames(at, spec).entries()) {
    const count = `${name}.tokens`;
    const where = ops.nonZero(g, ops.equal(g, chosen, g.ints([expert], [])), count); // (2, n): token, choice
    const coordinate = (axis: number) => ops.gather(g, where, g.ints([axis], [])); // (n)
    const rows = ops.gather(g, tokens, coordinate(0)); // (n, hidden)
    outputs.push(m.gatedMlp(rows, name, spec.activation));
    places.push(ops.add(g, ops.mul(g, coordinate(0), g.ints([perToken], [])), coordinate(1)));
  }
  // together the experts fill every one of the T * k places once, so what was there before does not matter
  const given = ops.concat(g, outputs, 0);
  const ordered = ops.scatterRows(g, given, ops.unsqueeze(g, ops.concat(g, places, 0), 1), given);
  const perChoice = ops.reshape(g, ordered, [-1, perToken, hidden], ["tokens", perToken, hidden]);
  const mixed = ops.reduceSum(g, ops.mul(g, perChoice, ops.unsqueeze(g, weights, 2)), 1); // (T, hidden)
  return ops.reshapeLike(g, mixed, x);
}

/** Which experts each token goes to, and with what weight; in float32, whatever the activations are. */
function route(
  m: ModelBuilder,
  tokens: Value,
  at: string,
  { perToken, normalised }: MixtureConfig,
): { weights: Value; chosen: Value } {
  const { g } = m;
  const logits = ops.cast(g, m.router(tokens, `${at}.gate`), "float32"); // (T, E)
  // a softmax over the chosen ones alone is the whole softmax divided by their sum
  const [values, chosen] = ops.topK(g, normalised ? logits : ops.softmax(g, logits), perToken);
  return { weights: ops.cast(g, normalised ? ops.softmax(g, values) : values, m.activations), chosen };
}

/** norm -> router and every expert's gate and up; each expert's up -> its down. */
export function mixtureScaling(
  norm: string,
  at: string,
  spec: MixtureConfig,
  alsoReads: readonly string[] = [],
): readonly ScalingGroup[] {
  const experts = expertNames(at, spec);
  const readers = experts.flatMap((name) => [`${name}.gate_proj`, `${name}.up_proj`]);
  return [{ from: { norm }, to: [`${at}.gate`, ...alsoReads, ...readers] }, ...experts.map(upToDown)];
}
