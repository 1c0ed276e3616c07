/**
 * 4-bit KV cache in two tiers: the first tokens (attention sinks) and the last few dozen stay in float16, what lies
 * between them (the body) has 4-bit codes. Recent tokens matter most: without that tail the same codes cost eight
 * times as much (KL 0.035 against 0.0044 on SmolLM2).
 *
 * Before anything is cached, a head's values lose their mean over tokens, its keys theirs before the rotation by position
 * (Qwen 2's biases are hundreds of times what differs between tokens). Keys are multiplied by gains that queries are
 * divided by (key-gains.ts), and both keys and values are turned by a Hadamard rotation; each token's row then has one
 * scale. What the mean key m at position p adds to the score of a query q, q . R_p m, is known without a cache: in the
 * pairs (a, b) of channels that R_p turns by an angle w,
 *   q . R_p m = sum (q_a m_a + q_b m_b) cos w + (q_b m_a - q_a m_b) sin w
 * Where angles are unknown keys lose the mean of what is cached, which shifts all scores of a query alike.
 * The kernel knows static scales only, so codes are read with scale 1, twice:
 *   l = s_k * scores(query, K codes)                          (heads, seq, body)
 *   out = softmax(l + ln s_v) V codes                         scores alone, the query is 0
 *   body = out * exp(LSE(l + ln s_v) - LSE(l))
 * Tail and body are one softmax over both: out = w_tail * tail + w_body * body, weights from their log-sum-exps.
 *
 *   past_key_values.N.key/value   (1, kvHeads, tail, headDim) float16, turned and centred
 *   past_body.N.key/value         (1, kvHeads, body, headDim / 2) uint8, low nibble first, code + 8
 *   past_body_scales              (body, layers * 2 * kvHeads) uint8, 2^(byte / 16 - 10): of each layer's keys, then of
 *                                 its values
 *   past_body_length              (1) int64. Body tensors hold at least `seq` rows (the kernel wants that); from this
 *                                 length on nobody sees them, and `past_body_scales` has max(length, seq) rows
 *
 * "int4-static" has scales per channel instead, made at calibration: one reading, no rotation, and far worse (SmolLM2: KL
 * 0.085 against 0.0033).
 */
import { NibbleError } from "../errors.ts";
import { elementCode, type Graph, type Value } from "../onnx/graph.ts";
import * as ops from "../onnx/ops.ts";
import type { ModelProto } from "../onnx/proto.ts";
import {
  type AttentionNode,
  attend,
  attentionNodes,
  INPUT,
  outer,
  replaceAttention,
  rotatedInputs,
} from "./attention-nodes.ts";
import { SCALE_OCTAVES, SCALES_PER_OCTAVE, SINKS } from "./int4-tiers.ts";
import { type KeyEnergies, keyGains } from "./key-gains.ts";
import { headRotation, timesMatrix, transposed } from "./rotation.ts";

/** Of one layer, (kvHeads * headDim) each, in the layout of the cache; over tokens after the sinks. */
export interface TokenStatistics {
  readonly mean: Float32Array;
  readonly variance: Float32Array;
  /** Mean of keys before the rotation by position; undefined where that is not known. */
  readonly unturnedMean?: Float32Array;
}

export interface LayerTokens {
  readonly key: TokenStatistics & KeyEnergies;
  readonly value: TokenStatistics;
}

export type BodyScales = "token" | "static";

/** Far below any score, and its exp is 0. */
const MASKED = -1e30;
/** The step of 16 even levels that fits a normal distribution best, in standard deviations (Max 1960, table II). */
const NORMAL_STEP = 0.3352;
const INT32 = "int32" as const;

/** The graph with such a cache; errors: `unsupported` with what of the model rules it out. */
export function withInt4Cache(model: ModelProto, statistics: readonly LayerTokens[], scales: BodyScales): ModelProto {
  const what = scales === "token" ? "--kv int4" : "--kv int4-static";
  const nodes = attentionNodes(model, what);
  const refuse = (why: string): never => {
    throw new NibbleError("unsupported", `${what}: ${why}.`, { param: "kv" });
  };
  if (nodes.length !== statistics.length)
    refuse(`${statistics.length} layers of statistics for ${nodes.length} layers`);
  for (const { cacheType, window, softcap } of nodes) {
    if (cacheType !== "float32") refuse(`the graph has to compute in float32, and its cache is ${cacheType}`);
    if (window !== undefined)
      refuse(`a layer looks back ${window} tokens only, which the body of this cache does not know`);
    if (softcap > 0) refuse("the model caps its scores, and two attentions with a cap are not one");
  }
  const shared = new SharedValues(nodes);
  return replaceAttention(model, nodes, (g, attention) => {
    twoTiers(g, attention, statistics[attention.layer], scales, shared.of(g, attention, scales));
  });
}

interface Shared {
  /** (1, seq) int64 */
  readonly positions: Value;
  /** Tail: tokens minus 1, and tokens, the new ones included; int32 (1). */
  readonly tailSeqlens: Value;
  readonly tailTotal: Value;
  /** (1, 1, seq, tail): 0 where the query at that row sees the key, else MASKED. */
  readonly tailMask: Value;
  /** Positions of the tail's tokens, and of the body's rows; int64. */
  readonly tailPositions: Value;
  readonly bodyPositions: Value;
  /** By a cos table's name, (rotaryDim, tail) and (rotaryDim, body): cos, then sin of the tokens' angles. */
  readonly turns: Map<string, { readonly tail: Value; readonly body: Value }>;
  readonly bodySeqlens: Value;
  readonly bodyTotal: Value;
  /** (1, 1, seq, body): MASKED for rows that hold no token. */
  readonly bodyMask: Value;
  /** No keys and values: (1, 0, kvHeads * headDim). */
  readonly nothing: Value;
  /** (1, seq, heads * headDim) of zeros. */
  readonly zeroQuery: Value;
  /** Logarithms, (layers * 2 * kvHeads, body) float32 */
  readonly logScales: Value | undefined;
}

/** What all layers use, made before the first. */
class SharedValues {
  private made: Shared | undefined;

  constructor(private readonly nodes: readonly AttentionNode[]) {}

  of(g: Graph, attention: AttentionNode, scales: BodyScales): Shared {
    if (this.made) return this.made;
    const scope = g.scope;
    g.scope = "kv/shared";
    this.made = sharedValues(g, attention, scales, this.nodes);
    g.scope = scope;
    return this.made;
  }
}

function sharedValues(
  g: Graph,
  { node, heads, kvHeads, headDim }: AttentionNode,
  scales: BodyScales,
  nodes: readonly AttentionNode[],
): Shared {
  const one = [1];
  const query = outer(node.input[INPUT.query], "float32", [1, "seq", "width"]);
  const seq = ops.shapeOf(g, query, 1);
  const seqlensK = outer(node.input[INPUT.seqlensK], INT32, one);
  const bodyLength = g.input("past_body_length", "int64", one);
  const range = (count: Value, dim: string) =>
    g.node("Range", [g.ints([0], []), ops.squeeze(g, count, 0), g.ints([1], [])], [{ type: "int64", shape: [dim] }])[0];
  const total = ops.add(g, ops.cast(g, ops.reshape(g, seqlensK, one, one), "int64"), g.ints([1]));
  const past = ops.sub(g, total, seq);
  const rows = range(seq, "seq");
  const tailTotal = ops.sub(g, total, bodyLength);
  const tailRange = range(tailTotal, "tail");
  const lastSeen = ops.unsqueeze(g, ops.add(g, ops.sub(g, past, bodyLength), rows), 1); // (seq, 1)
  const seen = g.node("LessOrEqual", [tailRange, lastSeen], [{ type: "bool", shape: ["seq", "tail"] }])[0];
  const afterSinks = g.node("Less", [tailRange, g.ints([SINKS])], [{ type: "bool", shape: ["tail"] }])[0];
  const tailPositions = ops.add(g, tailRange, ops.where(g, afterSinks, g.ints([0]), bodyLength));
  const mask = ops.where(g, seen, g.scalar(0), g.scalar(MASKED));
  const bodyTotal = g.node("Max", [bodyLength, seq], [{ type: "int64", shape: one }])[0];
  const held = g.node("Less", [range(bodyTotal, "body"), bodyLength], [{ type: "bool", shape: ["body"] }])[0];
  const bodyRow = ops.where(g, held, g.scalar(0), g.scalar(MASKED));
  const bodyShape = ops.concat(g, [g.ints([1, 1]), seq, bodyTotal], 0);
  const [bodyMask] = g.node("Expand", [bodyRow, bodyShape], [{ type: "float32", shape: [1, 1, "seq", "body"] }]);
  const int32 = (value: Value) => ops.cast(g, value, INT32);
  const shape = ops.concat(g, [g.ints([1]), seq, g.ints([heads * headDim])], 0);
  const [zeroQuery] = g.node("Expand", [g.scalar(0), shape], [{ type: "float32", shape: [1, "seq", heads * headDim] }]);
  const width = nodes.length * 2 * kvHeads;
  return {
    positions: ops.unsqueeze(g, ops.add(g, past, rows), 0),
    tailTotal: int32(tailTotal),
    tailSeqlens: int32(ops.sub(g, tailTotal, g.ints([1]))),
    tailPositions,
    bodyPositions: ops.add(g, range(bodyTotal, "body"), g.ints([SINKS])),
    turns: new Map(),
    tailMask: ops.unsqueeze(g, ops.unsqueeze(g, mask, 0), 0),
    bodyTotal: int32(bodyTotal),
    bodySeqlens: int32(ops.sub(g, bodyTotal, g.ints([1]))),
    bodyMask,
    nothing: g.initializer("kv/nothing", "float32", [1, 0, kvHeads * headDim], new Uint8Array(0)),
    zeroQuery,
    logScales: scales === "token" ? logScales(g, g.input("past_body_scales", "uint8", ["body", width])) : undefined,
  };
}

function logScales(g: Graph, bytes: Value): Value {
  const turned = ops.transpose(g, ops.cast(g, bytes, "float32"), [1, 0]);
  const steps = ops.mul(g, turned, g.scalar(Math.LN2 / SCALES_PER_OCTAVE));
  return ops.sub(g, steps, g.scalar(SCALE_OCTAVES * Math.LN2));
}

function twoTiers(g: Graph, attention: AttentionNode, tokens: LayerTokens, scales: BodyScales, shared: Shared): void {
  const { node, layer, heads, kvHeads, headDim } = attention;
  const seq = shared.zeroQuery.shape[1];
  const rotation = scales === "token" ? headRotation(headDim) : undefined;
  const { packed, query, beforeTurn } = turned(g, attention, tokens, rotation, shared);
  const apart = apartMean(attention, tokens, rotation);
  const ofMean = apart && meanScores(g, attention, beforeTurn, apart, shared);
  const body = (part: "key" | "value") =>
    g.input(`past_body.${layer}.${part}`, "uint8", [1, kvHeads, "past_body", headDim / 2]);
  // the kernel reads float32: of this tier that is a few dozen rows
  const [keyTail, valueTail] = ["key", "value"].map((part) =>
    ops.cast(g, g.input(`past_key_values.${layer}.${part}`, "float16", [1, kvHeads, "past_tail", headDim]), "float32"),
  );
  const [tail, tailScores, ...present] = attend(
    g,
    attention,
    {
      query: packed,
      pastKey: keyTail,
      pastValue: valueTail,
      seqlensK: shared.tailSeqlens,
      total: shared.tailTotal,
      bias: ofMean ? ops.add(g, shared.tailMask, ofMean.tail) : shared.tailMask,
    },
    { everything: true }, // the mask is causal
  );
  for (const [i, part] of ["key", "value"].entries()) {
    const given = { type: "float16" as const, shape: present[i].shape, name: `present.${layer}.${part}` };
    g.output(g.node("Cast", [present[i]], [given], { attributes: { to: elementCode("float16") } })[0]);
  }
  const tailLse = logSumExp(g, tailScores);
  const coded = {
    key: shared.nothing,
    value: shared.nothing,
    pastKey: body("key"),
    pastValue: body("value"),
    seqlensK: shared.bodySeqlens,
    total: shared.bodyTotal,
  };
  const [mixed, bodyLse, readLse] = shared.logScales
    ? readTokenScaled(g, attention, query, coded, shared, shared.logScales, ofMean?.body)
    : readStatic(g, attention, query, { ...coded, bias: shared.bodyMask }, tokens);
  // log-sum-exp over both tiers
  const whole = ops.add(g, tailLse, ops.softplus(g, ops.sub(g, bodyLse, tailLse)));
  const byToken = (weight: Value) => ops.transpose(g, weight, [0, 2, 1, 3]); // (1, seq, heads, 1)
  const weighted = (part: Value, lse: Value) => {
    const split = ops.reshape(g, part, [0, 0, heads, headDim], [1, seq, heads, headDim]);
    return ops.mul(g, split, byToken(ops.exp(g, ops.sub(g, lse, whole))));
  };
  let out = ops.add(g, weighted(tail, tailLse), weighted(mixed, readLse));
  if (rotation) {
    const back = g.initializer(`kv/back/${headDim}`, "float32", [headDim, headDim], transposed(rotation, headDim));
    out = ops.matMul(g, out, back);
  }
  const mean = perQueryHead(tokens.value.mean, attention);
  const centre = g.initializer(`kv/${layer}/value-mean`, "float32", [heads, headDim], mean);
  const [result] = g.node(
    "Reshape",
    [ops.add(g, out, centre), g.ints([0, 0, heads * headDim])],
    [{ type: "float32", shape: [1, seq, heads * headDim], name: node.output[0] }],
  );
  void result;
}

/** Query, keys and values after rotary, turned, keys and values without their mean: side by side, and the query alone. */
function turned(
  g: Graph,
  attention: AttentionNode,
  tokens: LayerTokens,
  rotation: Float32Array | undefined,
  { positions }: Shared,
): { packed: Value; query: Value; beforeTurn: Value } {
  const { heads, kvHeads, headDim } = attention;
  const all = heads + 2 * kvHeads;
  const apart = apartMean(attention, tokens, rotation);
  const { keyed, value } = rotatedInputs(g, attention, positions, apart);
  const beforeTurn = keyed;
  const joined = ops.concat(g, [keyed, value], 2);
  let rows = ops.reshape(g, joined, [0, 0, all, headDim], [1, "seq", all, headDim]);
  const turn = (mean: Float32Array) => (rotation ? timesMatrix(mean, rotation, headDim) : mean);
  // one scale for each channel of keys needs no gains
  const gains = rotation ? keyGains(tokens.key, headDim) : undefined;
  if (rotation && gains) {
    const factors = new Float32Array(all * headDim).fill(1);
    factors.set(perQueryHead(gains, attention).map((gain) => 1 / gain));
    factors.set(gains, heads * headDim);
    rows = ops.mul(g, rows, g.initializer(`${g.scope}/gains`, "float32", [all, headDim], factors));
    rows = ops.matMul(g, rows, g.initializer(`kv/turn/${headDim}`, "float32", [headDim, headDim], rotation));
  }
  const means = new Float32Array(all * headDim);
  if (!apart) means.set(turn(tokens.key.mean.map((x, i) => x * (gains?.[i] ?? 1))), heads * headDim);
  means.set(turn(tokens.value.mean), (heads + kvHeads) * headDim);
  rows = ops.sub(g, rows, g.initializer(`${g.scope}/means`, "float32", [all, headDim], means));
  const packed = ops.reshape(g, rows, [0, 0, all * headDim], [1, "seq", all * headDim]);
  return { packed, query: ops.splitLast(g, packed, [heads * headDim, 2 * kvHeads * headDim])[0], beforeTurn };
}

/** The mean key that is taken off before the rotation by position; undefined where that cannot be. */
function apartMean(
  { rotary, interleaved }: AttentionNode,
  { key }: LayerTokens,
  rotation: Float32Array | undefined,
): Float32Array | undefined {
  return rotary && !interleaved && rotation ? key.unturnedMean : undefined;
}

/**
 * What the mean key adds to the scores, (1, heads, seq, tail) and (1, heads, seq, body).
 * @param keyed (1, seq, (heads + kvHeads) * headDim) after the rotation by position
 */
function meanScores(
  g: Graph,
  attention: AttentionNode,
  keyed: Value,
  mean: Float32Array,
  shared: Shared,
): { tail: Value; body: Value } {
  const { heads, kvHeads, headDim, rotaryDim, scale } = attention;
  const half = rotaryDim / 2;
  const seq = keyed.shape[1];
  const [flat] = ops.splitLast(g, keyed, [heads * headDim, kvHeads * headDim]);
  const query = ops.transpose(g, ops.reshape(g, flat, [0, 0, heads, headDim], [1, seq, heads, headDim]), [0, 2, 1, 3]);
  const rest = headDim - rotaryDim;
  const [low, high] = ops.splitLast(g, query, rest ? [half, half, rest] : [half, half]);
  const wide = perQueryHead(mean, attention);
  const constant = (name: string, from: number) => {
    const part = new Float32Array(heads * half);
    for (let head = 0; head < heads; head++) {
      for (let i = 0; i < half; i++) part[head * half + i] = scale * wide[head * headDim + from + i];
    }
    return g.initializer(`${g.scope}/mean-${name}`, "float32", [heads, 1, half], part);
  };
  const [meanLow, meanHigh] = [constant("low", 0), constant("high", half)];
  const withCos = ops.add(g, ops.mul(g, low, meanLow), ops.mul(g, high, meanHigh));
  const withSin = ops.sub(g, ops.mul(g, high, meanLow), ops.mul(g, low, meanHigh));
  const both = ops.concat(g, [withCos, withSin], 3);
  const { tail, body } = turnsOf(g, attention, shared);
  return { tail: ops.matMul(g, both, tail), body: ops.matMul(g, both, body) };
}

function turnsOf(g: Graph, { node, rotaryDim }: AttentionNode, shared: Shared): { tail: Value; body: Value } {
  const name = node.input[INPUT.cos];
  const made = shared.turns.get(name);
  if (made) return made;
  const table = (place: number) => outer(node.input[place], "float32", ["positions", rotaryDim / 2]);
  const last = ops.sub(g, ops.shapeOf(g, table(INPUT.cos), 0), g.ints([1]));
  const turns = (positions: Value) => {
    // rows of the body that hold no token may lie beyond the table
    const [within] = g.node("Min", [positions, last], [{ type: "int64", shape: positions.shape }]);
    const parts = [INPUT.cos, INPUT.sin].map((place) => ops.gather(g, table(place), within));
    return ops.transpose(g, ops.concat(g, parts, 1), [1, 0]);
  };
  const both = { tail: turns(shared.tailPositions), body: turns(shared.bodyPositions) };
  shared.turns.set(name, both);
  return both;
}

type BodyInputs = Omit<Parameters<typeof attend>[2], "query">;
/** What the body mixes to before its weight, its log-sum-exp (1, heads, seq, 1), and the one that its output is over. */
type BodyReading = readonly [Value, Value, Value];

function readTokenScaled(
  g: Graph,
  attention: AttentionNode,
  query: Value,
  body: BodyInputs,
  shared: Shared,
  logScales: Value,
  ofMean: Value | undefined,
): BodyReading {
  const { layer, heads, kvHeads } = attention;
  const unit = g.initializer("kv/unit", "float32", [1], Float32Array.of(1));
  const codes = { ...body, keyScale: unit, valueScale: unit };
  // (heads, 1, body) of this layer's keys (part 0) or values (part 1)
  const logScaleOf = (part: 0 | 1) => {
    const rows = Array.from(
      { length: heads },
      (_, h) => (2 * layer + part) * kvHeads + Math.floor((h * kvHeads) / heads),
    );
    return ops.unsqueeze(g, ops.gather(g, logScales, g.ints(rows)), 1);
  };
  const [, raw] = attend(g, attention, { ...codes, query, bias: shared.bodyMask }, { everything: true, codeBits: 4 });
  const coded = ops.mul(g, raw, ops.exp(g, logScaleOf(0)));
  const scores = ofMean ? ops.add(g, coded, ofMean) : coded;
  const withValues = ops.add(g, scores, logScaleOf(1));
  const [mixed] = attend(
    g,
    attention,
    { ...codes, query: shared.zeroQuery, bias: withValues },
    { everything: true, codeBits: 4 },
  );
  return [mixed, logSumExp(g, scores), logSumExp(g, withValues)];
}

function readStatic(
  g: Graph,
  attention: AttentionNode,
  query: Value,
  body: BodyInputs,
  tokens: LayerTokens,
): BodyReading {
  const { kvHeads, headDim } = attention;
  const scale = (part: "key" | "value") =>
    g.initializer(`${g.scope}/${part}${STATIC}`, "float32", [kvHeads * headDim], staticScales(tokens[part]));
  const scaled = { ...body, query, keyScale: scale("key"), valueScale: scale("value") };
  const [mixed, scores] = attend(g, attention, scaled, { everything: true, codeBits: 4 });
  const lse = logSumExp(g, scores);
  return [mixed, lse, lse];
}

/** The names of these constants end so. */
const STATIC = "/static-scale";

/** The scales in a graph of "int4-static", keys before values of each layer; undefined in any other. */
export function staticScalesOf({ graph }: ModelProto): Float32Array[] | undefined {
  const stored = graph.initializer.filter(({ name }) => name?.endsWith(STATIC));
  if (stored.length === 0) return undefined;
  return stored.map(({ rawData }) => new Float32Array(Uint8Array.from(rawData ?? []).buffer));
}

/** Per channel; a channel that never changes takes 1. */
function staticScales({ variance }: TokenStatistics): Float32Array {
  return variance.map((x) => (x > 0 ? NORMAL_STEP * Math.sqrt(x) : 1));
}

/** (..., n) -> (..., 1) */
function logSumExp(g: Graph, x: Value): Value {
  return g.node("ReduceLogSumExp", [x, g.ints([-1])], [{ type: x.type, shape: x.shape.with(-1, 1) }], {
    attributes: { keepdims: 1 },
  })[0];
}

/** (kvHeads * headDim) as every query head of its group sees it: (heads * headDim). */
function perQueryHead(mean: Float32Array, { heads, kvHeads, headDim }: AttentionNode): Float32Array {
  const out = new Float32Array(heads * headDim);
  for (let head = 0; head < heads; head++) {
    const from = Math.floor((head * kvHeads) / heads) * headDim;
    out.set(mean.subarray(from, from + headDim), head * headDim);
  }
  return out;
}
