/**
 * Graph halves that work on a graph that is there: the GroupQueryAttention nodes of a decoder (Nibble's own or anyone's),
 * what they say about themselves, and putting other nodes in their place.
 */
import { NibbleError } from "../errors.ts";
import { type Dim, type ElementType, Graph, inlineGraphProto, type Value } from "../onnx/graph.ts";
import * as ops from "../onnx/ops.ts";
import type { AttributeProto, GraphProto, ModelProto, NodeProto, ValueInfoProto } from "../onnx/proto.ts";

export const ATTENTION = "GroupQueryAttention";
/** Places among its inputs. */
export const INPUT = {
  query: 0,
  key: 1,
  value: 2,
  pastKey: 3,
  pastValue: 4,
  seqlensK: 5,
  total: 6,
  cos: 7,
  sin: 8,
  positions: 9,
  bias: 10,
  headSink: 11,
  keyScale: 12,
  valueScale: 13,
};

export interface AttentionNode {
  readonly node: NodeProto;
  readonly layer: number;
  readonly heads: number;
  readonly kvHeads: number;
  /** As cached, padding included. */
  readonly headDim: number;
  readonly scale: number;
  readonly rotary: boolean;
  readonly interleaved: boolean;
  /** Channels that are rotated. */
  readonly rotaryDim: number;
  readonly window: number | undefined;
  readonly softcap: number;
  /** "float32", "float16", "int8" of the cache. */
  readonly cacheType: ElementType;
}

const ELEMENT: Readonly<Record<number, ElementType>> = { 1: "float32", 2: "uint8", 3: "int8", 10: "float16" };

/** All attention of a decoder; error `unsupported` where some of its cache belongs to other operators. @param what names the asker. */
export function attentionNodes({ graph }: ModelProto, what: string): AttentionNode[] {
  const nodes = graph.node.filter(({ opType }) => opType === ATTENTION);
  const refuse = (why: string): never => {
    throw new NibbleError("unsupported", `${what}: ${why}.`, { param: "kv" });
  };
  const past = graph.input.filter(({ name }) => name.startsWith("past_")).length;
  if (nodes.length === 0 || past !== 2 * nodes.length) {
    refuse("not all layers of this family keep their keys and values in GroupQueryAttention");
  }
  const caches = new Set(nodes.flatMap(({ output }) => output.slice(1, 3)));
  if (graph.node.some(({ input }) => input.some((name) => caches.has(name)))) {
    refuse("this model's scores are capped outside the attention operator (Gemma 2), which reads a float cache");
  }
  const inputs = new Map(graph.input.map((info) => [info.name, info]));
  const tables = new Map(graph.initializer.map(({ name, dims }) => [name, dims?.map(Number)]));
  return nodes.map((node, layer) => {
    const int = (name: string) => Number(node.attribute.find((a) => a.name === name)?.i ?? 0);
    const float = (name: string) => node.attribute.find((a) => a.name === name)?.f ?? 0;
    const info = inputs.get(node.input[INPUT.pastKey]);
    const headDim = sizes(info)[3];
    const cacheType = ELEMENT[info?.type?.tensorType?.elemType ?? 0];
    if (typeof headDim !== "number" || !cacheType)
      return refuse(`the cache of layer ${layer} has no numeric head size`);
    return {
      node,
      layer,
      heads: int("num_heads"),
      kvHeads: int("kv_num_heads"),
      headDim,
      scale: float("scale") || 1 / Math.sqrt(headDim),
      rotary: int("do_rotary") === 1,
      interleaved: int("rotary_interleaved") === 1,
      rotaryDim: 2 * (tables.get(node.input[INPUT.cos] ?? "")?.[1] ?? headDim / 2),
      window: int("local_window_size") > 0 ? int("local_window_size") : undefined,
      softcap: float("softcap"),
      cacheType,
    };
  });
}

export function sizes(info: ValueInfoProto | undefined): Dim[] {
  return (info?.type?.tensorType?.shape?.dim ?? []).map(({ dimValue, dimParam }) => dimParam || Number(dimValue ?? 0));
}

/** A value of the graph around the new nodes. */
export function outer(name: string, type: ElementType, shape: readonly Dim[]): Value {
  return { name, type, shape };
}

/**
 * The same model with every attention node replaced: `replace` adds nodes to `g` and has to make the node's outputs
 * under their names. Inputs and outputs of `g` are added to the model's, in place of those that nothing reads any more.
 */
export function replaceAttention(
  model: ModelProto,
  nodes: readonly AttentionNode[],
  replace: (g: Graph, attention: AttentionNode) => void,
): ModelProto {
  const g = new Graph("kv");
  const made = nodes.map((attention) => {
    const start = g.nodes.length;
    g.scope = `kv/${attention.layer}`;
    replace(g, attention);
    return { node: attention.node, start };
  });
  const added = inlineGraphProto(g);
  const starts = new Map(made.map(({ node, start }, i) => [node, [start, made[i + 1]?.start ?? g.nodes.length]]));
  const node = model.graph.node.flatMap((original) => {
    const range = starts.get(original);
    return range ? added.node.slice(...range) : [original];
  });
  return joined(model, node, added);
}

/** The same model with the nodes of `g` after its own, and g's inputs and outputs among its own. */
export function addToModel(model: ModelProto, g: Graph): ModelProto {
  const added = inlineGraphProto(g);
  return joined(model, [...model.graph.node, ...added.node], added);
}

function joined(model: ModelProto, node: NodeProto[], added: GraphProto): ModelProto {
  const there = new Set(model.graph.initializer.map(({ name }) => name)); // constants are named after their values
  const given = new Set([...added.input, ...added.output].map(({ name }) => name));
  const kept = (info: ValueInfoProto) => !given.has(info.name);
  return {
    ...model,
    graph: {
      ...model.graph,
      node,
      initializer: [...model.graph.initializer, ...added.initializer.filter(({ name }) => !there.has(name))],
      input: [...model.graph.input.filter(kept), ...added.input],
      output: [...model.graph.output.filter(kept), ...added.output],
    },
  };
}

export function textAttribute(name: string, value: string): AttributeProto {
  return { name, type: 3, s: new TextEncoder().encode(value) };
}

/** Whether keys and values lie beside the queries in one input. */
function isPacked({ node }: AttentionNode): boolean {
  return (node.input[INPUT.key] ?? "") === "";
}

/** The queries as the node takes them, before any rotation by position: (batch, seq, heads * headDim). */
export function queriesOf(g: Graph, attention: AttentionNode, type: ElementType = "float32"): Value {
  const { node, heads, kvHeads, headDim } = attention;
  const [width, keyed] = [heads * headDim, 2 * kvHeads * headDim];
  const given = (size: number) => outer(node.input[INPUT.query], type, ["batch", "seq", size]);
  return isPacked(attention) ? ops.splitLast(g, given(width + keyed), [width, keyed])[0] : given(width);
}

/**
 * What the node attends with, rotated by position where it rotates: queries and keys side by side,
 * (1, seq, (heads + kvHeads) * headDim), and values, (1, seq, kvHeads * headDim).
 * @param positions (1, seq) @param keyMean (kvHeads * headDim), taken off keys before that
 */
export function rotatedInputs(
  g: Graph,
  attention: AttentionNode,
  positions: Value,
  keyMean?: Float32Array,
): { keyed: Value; value: Value } {
  const { node, heads, kvHeads, headDim, rotary, interleaved, rotaryDim } = attention;
  const input = (place: number, width: number) => outer(node.input[place], "float32", [1, "seq", width]);
  const keyedHeads = heads + kvHeads;
  let keyed: Value;
  let value: Value;
  if (isPacked(attention)) {
    const sizes = [keyedHeads * headDim, kvHeads * headDim];
    [keyed, value] = ops.splitLast(g, input(INPUT.query, (keyedHeads + kvHeads) * headDim), sizes);
  } else {
    const parts = [input(INPUT.query, heads * headDim), input(INPUT.key, kvHeads * headDim)];
    keyed = ops.concat(g, parts, 2);
    value = input(INPUT.value, kvHeads * headDim);
  }
  if (keyMean) {
    const means = new Float32Array(keyedHeads * headDim);
    means.set(keyMean, heads * headDim);
    keyed = ops.sub(g, keyed, g.initializer(`${g.scope}/key-mean`, "float32", [means.length], means));
  }
  if (rotary) {
    const table = (place: number) => outer(node.input[place], "float32", ["positions", rotaryDim / 2]);
    keyed = ops.rotaryEmbedding(g, keyed, positions, table(INPUT.cos), table(INPUT.sin), {
      heads: keyedHeads,
      rotaryDim: rotaryDim === headDim ? 0 : rotaryDim,
      interleaved,
    });
  }
  return { keyed, value };
}

/** GroupQueryAttention with what only KV policies use of it. */
export interface AttendInputs {
  /** (batch, seq, heads * headDim), or with keys and values of all heads side by side where `key` is left out. */
  readonly query: Value;
  readonly key?: Value;
  readonly value?: Value;
  readonly pastKey: Value;
  readonly pastValue: Value;
  readonly seqlensK: Value;
  readonly total: Value;
  /** (1 or batch, 1 or heads, seq, total) added to the scores. */
  readonly bias?: Value;
  readonly keyScale?: Value;
  readonly valueScale?: Value;
}

export interface AttendOptions {
  /** A query sees every key, not only those before it. */
  readonly everything?: boolean;
  readonly codeBits?: 4 | 8;
}

/** [output (batch, seq, heads * headDim), scores before the softmax (batch, heads, seq, total), present keys, values] */
export function attend(
  g: Graph,
  { heads, kvHeads, headDim, scale }: AttentionNode,
  { query, key, value, pastKey, pastValue, seqlensK, total, bias, keyScale, valueScale }: AttendInputs,
  { everything, codeBits }: AttendOptions = {},
): [Value, Value, Value, Value] {
  const [batch, seq] = query.shape;
  const cache = { type: pastKey.type, shape: [batch, kvHeads, "present", pastKey.shape[3]] };
  const granularity = keyScale && (keyScale.shape[0] === 1 ? "PER_TENSOR" : "PER_CHANNEL");
  const [output, presentKey, presentValue, scores] = g.node(
    ATTENTION,
    [
      ...[query, key, value, pastKey, pastValue, seqlensK, total],
      ...[undefined, undefined, undefined, bias, undefined, keyScale, valueScale],
    ],
    [
      { type: query.type, shape: [batch, seq, heads * headDim] },
      cache,
      cache,
      { type: query.type, shape: [batch, heads, seq, "total"] },
    ],
    {
      domain: "com.microsoft",
      attributes: {
        num_heads: heads,
        kv_num_heads: kvHeads,
        scale: { float: scale },
        do_rotary: 0,
        qk_output: 1, // before the softmax
        causal: everything ? 0 : undefined,
        k_quant_type: granularity,
        v_quant_type: granularity,
        kv_cache_bit_width: codeBits,
      },
    },
  );
  return [output, scores, presentKey, presentValue];
}
