/** A case of arrays as nodes: positions, `contains` by counting, `uniqueItems` by a list of values or by distinct.ts. */
import type { SchemaCompiler } from "./json-schema.ts";
import * as json from "./json-text.ts";
import { alt, literal, type Node, optional, type Rule, ref, repeat, seq } from "./nodes.ts";
import { unsupported } from "./schema-document.ts";
import { type ArrayShape, canonical, type Shape } from "./schema-shapes.ts";

/** Positions times counts, before an array is given up. */
const MAX_PLACES = 5_000;
/** Of so many values every order is written, of more the schema's own order: each subset of them is a rule. */
const MAX_PERMUTED = 8;

export function arrayNode(compiler: SchemaCompiler, shape: ArrayShape): Node {
  const { layers, min, max } = shape;
  if (
    layers.length === 0 &&
    shape.contains.length === 0 &&
    !shape.unique &&
    min === 0 &&
    max === Number.POSITIVE_INFINITY
  )
    return json.array;
  if (max === 0) return shape.contains.some((part) => part.min > 0) ? alt() : json.list("[", seq(), "]");
  const unique = shape.unique && max > 1;
  if (unique && shape.contains.length === 0 && layers.every(({ prefix }) => prefix.length === 0)) {
    const values = listedValues(compiler, shape);
    if (values !== undefined) return json.list("[", subsets(values, shape), "]");
  }
  const items = shape.contains.length > 0 ? counted(compiler, shape, unique) : positioned(compiler, shape, unique);
  return unique ? json.distinctList(items) : json.list("[", items, "]");
}

/** Without counting: what may follow after i items, from the last position that differs backwards. */
function positioned(compiler: SchemaCompiler, { layers, min, max }: ArrayShape, unique: boolean): Node {
  const reach = Math.max(0, ...layers.map(({ prefix }) => prefix.length));
  const { cases } = compiler;
  const item = (i: number): Node => compiler.node(cases.itemTerms(layers, i), unique);
  const restTerms = cases.itemTerms(layers, reach);
  const closed = restTerms.includes(cases.document.never) || cases.ofAll(restTerms).length === 0;
  const rest = closed ? undefined : item(reach);
  const tail = (i: number): Node => {
    if (i >= max) return seq();
    if (i < reach) {
      const next = seq(...(i === 0 ? [] : [json.comma]), item(i), tail(i + 1));
      return i >= min ? optional(next) : next;
    }
    if (rest === undefined) return i >= min ? seq() : alt();
    if (i > 0) return repeat(seq(json.comma, rest), Math.max(0, min - i), max - i);
    const items = seq(rest, repeat(seq(json.comma, rest), Math.max(0, min - 1), max - 1));
    return min === 0 ? optional(items) : items;
  };
  return tail(0);
}

/** With `contains`: a rule per position and count of what was found so far. */
function counted(compiler: SchemaCompiler, { layers, min, max, contains, at }: ArrayShape, unique: boolean): Node {
  const { cases } = compiler;
  const reach = Math.max(1, min, ...layers.map(({ prefix }) => prefix.length)); // beyond it positions are alike
  const last = Number.isFinite(max) ? max : reach;
  const rules = new Map<string, Rule>();
  const from = (i: number, found: readonly number[]): Node => {
    const key = `${i}:${found.join()}`;
    const known = rules.get(key);
    if (known !== undefined) return ref(known);
    if (rules.size >= MAX_PLACES) throw unsupported(`${at}/contains`, `contains with more than ${MAX_PLACES} counts`);
    const rule: Rule = { name: `${at}, item ${i}`, body: undefined };
    rules.set(key, rule);
    const branches: Node[] = [];
    if (i >= min && contains.every((part, k) => found[k] >= part.min)) branches.push(seq());
    if (i < max)
      for (let subset = 0; subset < 2 ** contains.length; subset++) {
        const counts = contains.map((_, k) => ((subset >> k) & 1) === 1);
        // one more is of no use where enough were found and any number may be
        if (contains.some((part, k) => counts[k] && found[k] >= (Number.isFinite(part.max) ? part.max : part.min)))
          continue;
        const terms = [
          ...cases.itemTerms(layers, i),
          ...contains.flatMap(({ term, max: most }, k) =>
            counts[k] ? term : Number.isFinite(most) ? cases.document.negated(term) : [],
          ),
        ];
        if (terms.includes(cases.document.never) || cases.ofAll(terms).length === 0) continue;
        const next = from(
          Math.min(i + 1, last),
          found.map((n, k) => (counts[k] ? n + 1 : n)),
        );
        branches.push(seq(...(i === 0 ? [] : [json.comma]), compiler.node(terms, unique), next));
      }
    rule.body = alt(...branches);
    return ref(rule);
  };
  return from(
    0,
    contains.map(() => 0),
  );
}

/** The values that items can have, where they are a list. */
function listedValues({ cases }: SchemaCompiler, { layers }: ArrayShape): string[] | undefined {
  const shapes = cases.ofAll(cases.itemTerms(layers, 0));
  const lists = shapes.map(valuesOf);
  if (lists.includes(undefined)) return undefined;
  const byText = new Map(lists.flatMap((list) => list ?? []).map((value) => [canonical(value), value]));
  return [...byText.values()].map((value) => JSON.stringify(value));
}

function valuesOf(shape: Shape): readonly unknown[] | undefined {
  if (shape.type === "values") return shape.values;
  if (shape.type === "boolean") return [false, true];
  return shape.type === "null" ? [null] : undefined;
}

function subsets(values: readonly string[], { min, max }: ArrayShape): Node {
  if (values.length > MAX_PERMUTED) return ordered(values, min, max);
  const rules = new Map<number, Rule>();
  const after = (used: number, written: number): Node => {
    let rule = rules.get(used);
    if (rule === undefined) {
      rule = { name: `values beside ${used}`, body: undefined };
      rules.set(used, rule);
      const next = values.flatMap((text, i) => {
        if ((used >> i) & 1 || written >= max) return [];
        return [seq(...(written === 0 ? [] : [json.comma]), literal(text), after(used | (1 << i), written + 1))];
      });
      rule.body = alt(...(written >= min ? [seq()] : []), ...next);
    }
    return ref(rule);
  };
  return after(0, 0);
}

function ordered(values: readonly string[], min: number, max: number): Node {
  const rules = new Map<string, Rule>();
  const most = Number.isFinite(max) ? max : Math.max(1, min);
  const from = (i: number, written: number): Node => {
    const key = `${i},${written}`;
    let rule = rules.get(key);
    if (rule === undefined) {
      rule = { name: `values from ${i}`, body: undefined };
      rules.set(key, rule);
      const branches: Node[] = written >= min ? [seq()] : [];
      if (i < values.length && written < max) {
        const text = seq(...(written === 0 ? [] : [json.comma]), literal(values[i]));
        branches.push(seq(text, from(i + 1, Math.min(written + 1, most))));
      }
      if (i < values.length) branches.push(from(i + 1, written));
      rule.body = alt(...branches);
    }
    return ref(rule);
  };
  return from(0, 0);
}
