/**
 * A case of objects as nodes. Properties come in the order of the schema, further ones last, where additionalProperties
 * and the like ask for them: by default only an object that says nothing of its properties has any.
 */
import type { SchemaCompiler } from "./json-schema.ts";
import { textNode, textRules } from "./json-strings.ts";
import * as json from "./json-text.ts";
import { alt, literal, type Node, type Rule, ref, repeat, seq } from "./nodes.ts";
import type { TextRule } from "./regex.ts";
import { type Term, unsupported } from "./schema-document.ts";
import type { ObjectShape } from "./schema-shapes.ts";

/** Patterns of one object: each subset of them is a class of names. */
const MAX_PATTERNS = 5;

interface Member {
  readonly node: Node;
  readonly required: boolean;
}

export function objectNode(compiler: SchemaCompiler, shape: ObjectShape): Node {
  const { cases } = compiler;
  const { layers, required, at } = shape;
  if (
    layers.length === 0 &&
    required.length === 0 &&
    shape.names.length === 0 &&
    shape.min === 0 &&
    shape.max === Infinity
  )
    return json.object;
  const allowedNames = enumerated(compiler, shape.names);
  const names = new Set([...layers.flatMap((layer) => [...layer.names.keys()]), ...required, ...(allowedNames ?? [])]);
  const members: Member[] = [];
  for (const name of names) {
    const must = required.includes(name);
    const terms = cases.propertyTerms(layers, name);
    const isNamed = layers.some((layer) => layer.names.has(name) || layer.patterns.length > 0);
    if (!must && !isNamed && !isOpen(shape, layers)) continue; // an enumerated name that nothing else speaks of
    const possible =
      !terms.includes(cases.document.never) &&
      cases.allows(shape.names, name) &&
      (must || cases.ofAll(terms).length > 0);
    if (!possible && must) return alt();
    if (!possible) continue;
    members.push({ node: seq(literal(JSON.stringify(name)), json.colon, compiler.node(terms)), required: must });
  }
  const further = allowedNames === undefined ? furtherMembers(compiler, shape, [...names], members.length) : undefined;
  return json.list("{", membersNode(members, further, shape.min, shape.max, at), "}");
}

/** Property names as propertyNames lists them, where it does. */
function enumerated({ cases }: SchemaCompiler, terms: readonly Term[]): string[] | undefined {
  if (terms.length === 0) return undefined;
  const shapes = cases.ofAll(terms).filter(({ type }) => type === "string" || type === "values");
  const lists = shapes.map((shape) => (shape.type === "values" ? shape.values : undefined));
  if (lists.includes(undefined)) return undefined;
  return [...new Set(lists.flatMap((values) => (values ?? []).filter((value) => typeof value === "string")))];
}

function isOpen({ min, required }: ObjectShape, layers: ObjectShape["layers"]): boolean {
  const closedByDefault = layers.some(({ lists }) => lists);
  return !closedByDefault || layers.some(({ rest }) => rest !== undefined) || min > required.length;
}

/** A member whose name is none of these, or undefined where there is none. */
function furtherMembers(
  compiler: SchemaCompiler,
  shape: ObjectShape,
  names: readonly string[],
  named: number,
): Node | undefined {
  const { layers, at } = shape;
  const open = isOpen({ ...shape, min: shape.min > named ? shape.min : 0 }, layers);
  const patterns = [...new Set(layers.flatMap((layer) => layer.patterns.map(([pattern]) => pattern)))];
  if (patterns.length > MAX_PATTERNS)
    throw unsupported(`${at}/patternProperties`, `more than ${MAX_PATTERNS} patterns`);
  const { document } = compiler.cases;
  const members: Node[] = [];
  const without = names.map((text): TextRule => ({ text, not: true }));
  for (let subset = 0; subset < 2 ** patterns.length; subset++) {
    const matched = patterns.filter((_, i) => (subset >> i) & 1);
    if (matched.length === 0 && !open) continue;
    const terms = layers.flatMap((layer) => {
      const own = layer.patterns.filter(([pattern]) => matched.includes(pattern)).map(([, term]) => term);
      return own.length > 0 ? own : (layer.rest ?? []);
    });
    if (terms.includes(document.never) || compiler.cases.ofAll(terms).length === 0) continue;
    const classes = patterns.map((pattern): TextRule => ({ pattern, mode: "search", not: !matched.includes(pattern) }));
    for (const key of keys(compiler, shape, names, [...classes, ...without]))
      members.push(seq(key, json.colon, compiler.node(terms)));
  }
  return members.length === 0 ? undefined : alt(...members);
}

function keys(
  { cases }: SchemaCompiler,
  shape: ObjectShape,
  names: readonly string[],
  texts: readonly TextRule[],
): Node[] {
  if (shape.names.length === 0) {
    if (texts.length === names.length) return [json.keyOtherThan(names)];
    return [json.quoted(textNode(texts, 0, Number.POSITIVE_INFINITY, shape.at))];
  }
  return cases.ofAll(shape.names).flatMap((allowed) => {
    if (allowed.type !== "string") return []; // listed names are members of their own
    return [json.quoted(textNode([...textRules(allowed), ...texts], allowed.min, allowed.max, shape.names[0].at))];
  });
}

/** Members in order, the further ones behind them, with commas between, min to max of them. */
function membersNode(
  members: readonly Member[],
  further: Node | undefined,
  min: number,
  max: number,
  at: string,
): Node {
  // two keys that are free might be the same one
  if (further !== undefined && min > members.length + 1)
    throw unsupported(`${at}/minProperties`, `minProperties ${min}, where ${members.length} are named,`);
  const most = Number.isFinite(max) ? max : Math.max(1, min); // counting ends where it makes no difference
  const rules = new Map<number, Rule>();
  const from = (i: number, written: number): Node => {
    if (i === members.length) {
      const needed = Math.max(0, min - written);
      if (needed > (further === undefined ? 0 : 1)) return alt();
      if (further === undefined || written >= max) return needed > 0 ? alt() : seq();
      const room = Number.isFinite(max) ? max - written : Number.POSITIVE_INFINITY;
      const next = seq(json.comma, further);
      if (written > 0) return repeat(next, needed, room);
      const some = seq(further, repeat(next, 0, room - 1));
      return needed > 0 ? some : alt(some, seq());
    }
    const key = i * (most + 1) + written;
    let rule = rules.get(key);
    if (rule === undefined) {
      rule = { name: `${at}, member ${i}`, body: undefined };
      rules.set(key, rule);
      const { node, required } = members[i];
      const branches: Node[] = [];
      if (written < max) {
        const member = written > 0 ? seq(json.comma, node) : node;
        branches.push(seq(member, from(i + 1, Math.min(written + 1, most))));
      }
      if (!required) branches.push(from(i + 1, written));
      rule.body = alt(...branches);
    }
    return ref(rule);
  };
  return from(0, 0);
}
