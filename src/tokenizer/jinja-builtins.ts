/** Methods of str, dict and list, and Jinja's filters and tests, as Python's Jinja 3.1 has them. */
import {
  compare,
  contains,
  equal,
  isNumber,
  iterate,
  Namespace,
  numberOf,
  PyFloat,
  type PyFunction,
  PyTuple,
  repr,
  str,
  TemplateError,
  toJson,
  truthy,
  typeName,
} from "./jinja-values.ts";

type Kwargs = Map<string, unknown>;

const WHITESPACE = /[\s\u0085]/u;

function strip(text: string, chars: unknown, left: boolean, right: boolean): string {
  const list = Array.from(text);
  const drop = typeof chars === "string" ? (c: string) => chars.includes(c) : (c: string) => WHITESPACE.test(c);
  let start = 0;
  let end = list.length;
  while (left && start < end && drop(list[start])) start++;
  while (right && end > start && drop(list[end - 1])) end--;
  return list.slice(start, end).join("");
}

const title = (text: string) =>
  text.replace(/\p{L}+/gu, (word) => {
    const [first, ...rest] = Array.from(word);
    return first.toUpperCase() + rest.join("").toLowerCase();
  });
const capitalize = (text: string) => {
  const [first = "", ...rest] = Array.from(text);
  return first.toUpperCase() + rest.join("").toLowerCase();
};

function split(text: string, separator: unknown, limit: number, fromRight: boolean): string[] {
  const most = limit < 0 ? Number.POSITIVE_INFINITY : limit;
  if (separator === undefined || separator === null) {
    const words = text.split(/[\s\u0085]+/u).filter((word) => word !== "");
    if (words.length - 1 <= most) return words;
    if (fromRight) {
      const tail = words.slice(words.length - most);
      let head = text.trimEnd();
      for (const word of [...tail].reverse()) head = head.slice(0, head.lastIndexOf(word)).trimEnd();
      return [head, ...tail];
    }
    let rest = text.trimStart();
    const head: string[] = [];
    for (let i = 0; i < most; i++) {
      head.push(words[i]);
      rest = rest.slice(words[i].length).trimStart();
    }
    return [...head, rest];
  }
  if (separator === "") throw new TemplateError("empty separator");
  const parts = text.split(String(separator));
  if (parts.length - 1 <= most) return parts;
  return fromRight
    ? [parts.slice(0, parts.length - most).join(String(separator)), ...parts.slice(parts.length - most)]
    : [...parts.slice(0, most), parts.slice(most).join(String(separator))];
}

function replace(text: string, from: unknown, to: unknown, count: unknown): string {
  const old = str(from);
  const most = typeof count === "number" && count >= 0 ? count : Number.POSITIVE_INFINITY;
  const parts = old === "" ? ["", ...Array.from(text), ""] : text.split(old);
  const joined = parts.slice(0, most + 1).join(str(to));
  return most === Number.POSITIVE_INFINITY || parts.length <= most + 1
    ? joined
    : joined + old + parts.slice(most + 1).join(old);
}

const affix = (text: string, affixes: unknown, test: (affix: string) => boolean): boolean => {
  if (typeof affixes === "string") return test(affixes);
  if (affixes instanceof PyTuple) return affixes.some((one) => test(String(one)));
  throw new TemplateError(
    `startswith first arg must be str or a tuple of str, not ${typeName(affixes)} (on ${repr(text)})`,
  );
};

/** A method of a str. */
export function stringMethod(text: string, name: string): PyFunction | undefined {
  const methods: Record<string, (args: unknown[], kwargs: Kwargs) => unknown> = {
    strip: ([chars]) => strip(text, chars, true, true),
    lstrip: ([chars]) => strip(text, chars, true, false),
    rstrip: ([chars]) => strip(text, chars, false, true),
    upper: () => text.toUpperCase(),
    lower: () => text.toLowerCase(),
    casefold: () => text.toLowerCase(),
    title: () => title(text),
    capitalize: () => capitalize(text),
    split: ([sep, limit], kw) => split(text, sep ?? kw.get("sep"), Number(limit ?? kw.get("maxsplit") ?? -1), false),
    rsplit: ([sep, limit], kw) => split(text, sep ?? kw.get("sep"), Number(limit ?? kw.get("maxsplit") ?? -1), true),
    splitlines: () => {
      const lines = text.split(/\r\n|[\n\r\v\f\u0085\u2028\u2029]/u);
      if (lines.at(-1) === "") lines.pop();
      return lines;
    },
    replace: ([from, to, count], kw) => replace(text, from, to, count ?? kw.get("count")),
    startswith: ([prefix]) => affix(text, prefix, (one) => text.startsWith(one)),
    endswith: ([suffix]) => affix(text, suffix, (one) => text.endsWith(one)),
    removeprefix: ([prefix]) => (text.startsWith(str(prefix)) ? text.slice(str(prefix).length) : text),
    removesuffix: ([suffix]) =>
      str(suffix) !== "" && text.endsWith(str(suffix)) ? text.slice(0, -str(suffix).length) : text,
    find: ([part]) =>
      Array.from(text.slice(0, Math.max(0, text.indexOf(str(part))))).length - (text.includes(str(part)) ? 0 : 1),
    rfind: ([part]) => {
      const at = text.lastIndexOf(str(part));
      return at < 0 ? -1 : Array.from(text.slice(0, at)).length;
    },
    count: ([part]) => text.split(str(part)).length - 1,
    join: ([items]) => iterate(items).map(str).join(text),
    partition: ([sep]) => {
      const at = text.indexOf(str(sep));
      return at < 0
        ? PyTuple.of(text, "", "")
        : PyTuple.of(text.slice(0, at), str(sep), text.slice(at + str(sep).length));
    },
    rpartition: ([sep]) => {
      const at = text.lastIndexOf(str(sep));
      return at < 0
        ? PyTuple.of("", "", text)
        : PyTuple.of(text.slice(0, at), str(sep), text.slice(at + str(sep).length));
    },
    isdigit: () => /^\p{Nd}+$/u.test(text),
    isnumeric: () => /^\p{N}+$/u.test(text),
    isalpha: () => /^\p{L}+$/u.test(text),
    isalnum: () => /^[\p{L}\p{N}]+$/u.test(text),
    isspace: () => text !== "" && Array.from(text).every((c) => WHITESPACE.test(c)),
    isupper: () => /\p{L}/u.test(text) && text === text.toUpperCase(),
    islower: () => /\p{L}/u.test(text) && text === text.toLowerCase(),
    zfill: ([width]) => text.padStart(Number(width), "0"),
    ljust: ([width, fill]) => text.padEnd(Number(width), str(fill ?? " ")),
    rjust: ([width, fill]) => text.padStart(Number(width), str(fill ?? " ")),
    format: (args, kw) => {
      let next = 0;
      return text.replace(/\{\{|\}\}|\{(\w*)\}/g, (all, key: string | undefined) => {
        if (all === "{{") return "{";
        if (all === "}}") return "}";
        if (key === "") return str(args[next++]);
        return str(/^\d+$/.test(key!) ? args[Number(key)] : kw.get(key!));
      });
    },
  };
  return Object.hasOwn(methods, name) ? methods[name] : undefined;
}

export function dictMethod(dict: Map<unknown, unknown>, name: string): PyFunction | undefined {
  const pair = ([key, value]: [unknown, unknown]) => PyTuple.of(key, value);
  switch (name) {
    case "get":
      return ([key, fallback = null]) => (dict.has(key) ? dict.get(key) : fallback);
    case "items":
      return () => [...dict].map(pair);
    case "keys":
      return () => [...dict.keys()];
    case "values":
      return () => [...dict.values()];
    case "copy":
      return () => new Map(dict);
    default:
      return undefined;
  }
}

export function listMethod(list: readonly unknown[], name: string): PyFunction | undefined {
  switch (name) {
    case "index":
      return ([item]) => list.findIndex((other) => equal(other, item));
    case "count":
      return ([item]) => list.filter((other) => equal(other, item)).length;
    case "copy":
      return () => list.slice();
    default:
      return undefined;
  }
}

/** `attribute="a.b"` of map, sort, join and others. */
function attribute(item: unknown, path: unknown): unknown {
  if (typeof path === "number") return Array.isArray(item) ? item.at(path) : undefined;
  return String(path)
    .split(".")
    .reduce<unknown>((at, key) => {
      if (at instanceof Map) return at.get(key);
      if (at instanceof Namespace) return at.fields.get(key);
      return Array.isArray(at) && /^\d+$/.test(key) ? at[Number(key)] : undefined;
    }, item);
}

const folded = (value: unknown, caseSensitive: unknown) =>
  typeof value === "string" && !truthy(caseSensitive) ? value.toLowerCase() : value;

function sorted(items: unknown[], key: (item: unknown) => unknown, reverse: unknown): unknown[] {
  const sign = truthy(reverse) ? -1 : 1;
  return items.slice().sort((a, b) => sign * compare(key(a), key(b)));
}

function toInt(value: unknown, fallback: unknown): unknown {
  if (isNumber(value)) return Math.trunc(numberOf(value));
  if (typeof value === "string" && /^\s*[-+]?\d+\s*$/.test(value)) return Number(value);
  const float = toFloat(value, undefined);
  return float instanceof PyFloat ? Math.trunc(float.value) : fallback;
}

function toFloat(value: unknown, fallback: unknown): unknown {
  if (isNumber(value)) return new PyFloat(numberOf(value));
  if (typeof value === "string" && value.trim() !== "" && Number.isFinite(Number(value)))
    return new PyFloat(Number(value));
  return fallback;
}

/** Python rounds halves to even. */
function round(value: number, precision: number, method: unknown): PyFloat {
  const scale = 10 ** precision;
  const scaled = value * scale;
  if (method === "ceil") return new PyFloat(Math.ceil(scaled) / scale);
  if (method === "floor") return new PyFloat(Math.floor(scaled) / scale);
  const down = Math.floor(scaled);
  const half = scaled - down;
  return new PyFloat((half > 0.5 || (half === 0.5 && down % 2 !== 0) ? down + 1 : down) / scale);
}

const escapeHtml = (text: string) =>
  text.replace(/[&<>"']/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&#34;", "'": "&#39;" })[c]!);

type Filter = (value: unknown, args: unknown[], kwargs: Kwargs) => unknown;

/** select, reject, selectattr, rejectattr. */
const selecting =
  (keep: boolean, byAttribute: boolean): Filter =>
  (value, args) => {
    const [path, ...rest] = byAttribute ? args : [undefined, ...args];
    const [test, ...testArgs] = rest;
    return iterate(value).filter((item) => {
      const subject = byAttribute ? attribute(item, path) : item;
      return (test === undefined ? truthy(subject) : runTest(String(test), subject, testArgs)) === keep;
    });
  };

const extreme =
  (sign: number): Filter =>
  (value, [caseSensitive], kw) => {
    const key = (item: unknown) =>
      folded(
        kw.has("attribute") ? attribute(item, kw.get("attribute")) : item,
        caseSensitive ?? kw.get("case_sensitive"),
      );
    return iterate(value).reduce<unknown>(
      (best, item) => (best === undefined || sign * compare(key(item), key(best)) > 0 ? item : best),
      undefined,
    );
  };

const length: Filter = (value) => (value instanceof Map ? value.size : iterate(value).length);
const fallback: Filter = (value, [other = "", boolean], kw) =>
  value === undefined || (truthy(boolean ?? kw.get("boolean")) && !truthy(value))
    ? (kw.get("default_value") ?? other)
    : value;

const filters: Record<string, Filter> = {
  abs: (value) => (value instanceof PyFloat ? new PyFloat(Math.abs(value.value)) : Math.abs(numberOf(value))),
  attr: (value, [name]) => attribute(value, name),
  batch: (value, [size, fill]) => {
    const items = iterate(value);
    const batches: unknown[][] = [];
    for (let i = 0; i < items.length; i += Number(size)) batches.push(items.slice(i, i + Number(size)));
    while (fill !== undefined && batches.length > 0 && batches.at(-1)!.length < Number(size))
      batches.at(-1)!.push(fill);
    return batches;
  },
  capitalize: (value) => capitalize(str(value)),
  count: length,
  default: fallback,
  d: fallback,
  dictsort: (value, [caseSensitive, by, reverse], kw) => {
    const index = (by ?? kw.get("by")) === "value" ? 1 : 0;
    const pairs = [...(value as Map<unknown, unknown>)].map(([key, item]) => PyTuple.of(key, item));
    const key = (pair: unknown) => folded((pair as unknown[])[index], caseSensitive ?? kw.get("case_sensitive"));
    return sorted(pairs, key, reverse ?? kw.get("reverse"));
  },
  escape: (value) => escapeHtml(str(value)),
  e: (value) => escapeHtml(str(value)),
  first: (value) => iterate(value)[0],
  float: (value, [other], kw) => toFloat(value, other ?? kw.get("default") ?? new PyFloat(0)),
  indent: (value, [width, first, blank], kw) => {
    const by = width ?? kw.get("width") ?? 4;
    const pad = typeof by === "string" ? by : " ".repeat(numberOf(by));
    const all = truthy(blank ?? kw.get("blank"));
    const lines = str(value).split("\n");
    return lines
      .map((line, i) => ((i === 0 ? truthy(first ?? kw.get("first")) : all || line !== "") ? pad + line : line))
      .join("\n");
  },
  int: (value, [other], kw) => toInt(value, other ?? kw.get("default") ?? 0),
  items: (value) => (value === undefined ? [] : dictMethod(value as Map<unknown, unknown>, "items")!([], new Map())),
  join: (value, [separator], kw) => {
    const path = kw.get("attribute");
    const items = iterate(value).map((item) => str(path === undefined ? item : attribute(item, path)));
    return items.join(str(separator ?? kw.get("d") ?? ""));
  },
  last: (value) => iterate(value).at(-1),
  length,
  list: (value) => iterate(value).slice(),
  lower: (value) => str(value).toLowerCase(),
  map: (value, [name, ...rest], kw) => {
    if (kw.has("attribute"))
      return iterate(value).map((item) => attribute(item, kw.get("attribute")) ?? kw.get("default"));
    return iterate(value).map((item) => applyFilter(String(name), item, rest, kw));
  },
  max: extreme(1),
  min: extreme(-1),
  reject: selecting(false, false),
  rejectattr: selecting(false, true),
  replace: (value, [from, to, count], kw) => replace(str(value), from, to, count ?? kw.get("count")),
  reverse: (value) =>
    typeof value === "string" ? Array.from(value).reverse().join("") : iterate(value).slice().reverse(),
  round: (value, [precision, method], kw) =>
    round(numberOf(value), Number(precision ?? kw.get("precision") ?? 0), method ?? kw.get("method")),
  safe: (value) => value,
  select: selecting(true, false),
  selectattr: selecting(true, true),
  sort: (value, [reverse, caseSensitive, path], kw) => {
    const by = path ?? kw.get("attribute");
    const key = (item: unknown) =>
      folded(by == null ? item : attribute(item, by), caseSensitive ?? kw.get("case_sensitive"));
    return sorted(iterate(value), key, reverse ?? kw.get("reverse"));
  },
  string: (value) => str(value),
  sum: (value, [path, start], kw) => {
    const by = path ?? kw.get("attribute");
    const items = iterate(value).map((item) => (by == null ? item : attribute(item, by)));
    const total = items.reduce<number>((sum, item) => sum + numberOf(item), numberOf(start ?? kw.get("start") ?? 0));
    return items.some((item) => item instanceof PyFloat) ? new PyFloat(total) : total;
  },
  title: (value) => title(str(value)),
  tojson: (value, [indent], kw) => {
    const width = indent ?? kw.get("indent");
    const separators = kw.get("separators") as [string, string] | undefined;
    return toJson(value, {
      indent: width == null ? undefined : numberOf(width),
      ensureAscii: truthy(kw.get("ensure_ascii")),
      sortKeys: truthy(kw.get("sort_keys")),
      separators: separators ?? undefined,
    });
  },
  trim: (value, [chars]) => strip(str(value), chars, true, true),
  truncate: (value, [size = 255, kill, end = "...", leeway = 5]) => {
    const text = Array.from(str(value));
    if (text.length <= numberOf(size) + numberOf(leeway)) return text.join("");
    const cut = text.slice(0, numberOf(size) - str(end).length).join("");
    return (truthy(kill) ? cut : cut.slice(0, cut.lastIndexOf(" ") < 0 ? undefined : cut.lastIndexOf(" "))) + str(end);
  },
  unique: (value, [caseSensitive], kw) => {
    const seen: unknown[] = [];
    return iterate(value).filter((item) => {
      const subject = kw.has("attribute") ? attribute(item, kw.get("attribute")) : item;
      const key = folded(subject, caseSensitive ?? kw.get("case_sensitive"));
      if (seen.some((other) => equal(other, key))) return false;
      seen.push(key);
      return true;
    });
  },
  upper: (value) => str(value).toUpperCase(),
  wordcount: (value) => split(str(value), undefined, -1, false).length,
};

export function applyFilter(name: string, value: unknown, args: unknown[], kwargs: Kwargs): unknown {
  if (!Object.hasOwn(filters, name)) throw new TemplateError(`No filter named '${name}'.`);
  return filters[name](value, args, kwargs);
}

const tests: Record<string, (value: unknown, args: unknown[]) => boolean> = {
  boolean: (value) => typeof value === "boolean",
  callable: (value) => typeof value === "function",
  defined: (value) => value !== undefined,
  divisibleby: (value, [by]) => numberOf(value) % numberOf(by) === 0,
  eq: (value, [other]) => equal(value, other),
  equalto: (value, [other]) => equal(value, other),
  even: (value) => numberOf(value) % 2 === 0,
  false: (value) => value === false,
  filter: (value) => Object.hasOwn(filters, str(value)),
  float: (value) => value instanceof PyFloat,
  ge: (value, [other]) => compare(value, other) >= 0,
  greaterthan: (value, [other]) => compare(value, other) > 0,
  gt: (value, [other]) => compare(value, other) > 0,
  in: (value, [container]) => contains(container, value),
  integer: (value) => typeof value === "number",
  iterable: (value) => value === undefined || typeof value === "string" || Array.isArray(value) || value instanceof Map,
  le: (value, [other]) => compare(value, other) <= 0,
  lessthan: (value, [other]) => compare(value, other) < 0,
  lower: (value) => /\p{L}/u.test(str(value)) && str(value) === str(value).toLowerCase(),
  lt: (value, [other]) => compare(value, other) < 0,
  mapping: (value) => value instanceof Map,
  ne: (value, [other]) => !equal(value, other),
  none: (value) => value === null,
  number: isNumber,
  odd: (value) => Math.abs(numberOf(value) % 2) === 1,
  sameas: (value, [other]) => value === other,
  sequence: (value) => typeof value === "string" || Array.isArray(value) || value instanceof Map,
  string: (value) => typeof value === "string",
  test: (value) => Object.hasOwn(tests, str(value)),
  true: (value) => value === true,
  undefined: (value) => value === undefined,
  upper: (value) => /\p{L}/u.test(str(value)) && str(value) === str(value).toUpperCase(),
};

const symbols: Record<string, string> = { "==": "eq", "!=": "ne", "<": "lt", "<=": "le", ">": "gt", ">=": "ge" };

export function runTest(name: string, value: unknown, args: unknown[]): boolean {
  const test = symbols[name] ?? name;
  if (!Object.hasOwn(tests, test)) throw new TemplateError(`No test named '${name}'.`);
  return tests[test](value, args);
}
