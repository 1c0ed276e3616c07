/**
 * Python values as chat templates see them, and the text Python makes of them: None is null, an undefined name is
 * undefined, dict is Map, list is Array, int is number; a float keeps its own class so that 1.0 prints as "1.0".
 */
export class PyFloat {
  constructor(readonly value: number) {}
}
export class PyTuple extends Array<unknown> {}
export class Namespace {
  readonly fields = new Map<string, unknown>();
}
export type PyFunction = (args: unknown[], kwargs: Map<string, unknown>) => unknown;

/** A template that Python's Jinja would refuse. */
export class TemplateError extends Error {}

/** JSON-like input to template values. */
export function toPython(value: unknown): unknown {
  if (typeof value === "number") return Number.isInteger(value) ? value : new PyFloat(value);
  if (Array.isArray(value)) return value.map(toPython);
  if (value instanceof Map || typeof value === "function") return value;
  if (typeof value === "object" && value !== null)
    return new Map(
      Object.entries(value)
        .filter(([, inner]) => inner !== undefined)
        .map(([key, inner]) => [key, toPython(inner)]),
    );
  return value;
}

export function isNumber(value: unknown): value is number | PyFloat | boolean {
  return typeof value === "number" || typeof value === "boolean" || value instanceof PyFloat;
}

export function numberOf(value: unknown): number {
  if (value instanceof PyFloat) return value.value;
  if (typeof value === "number" || typeof value === "boolean") return Number(value);
  throw new TemplateError(`expected a number, got ${typeName(value)}`);
}

export function truthy(value: unknown): boolean {
  if (value === undefined || value === null || value === false || value === "") return false;
  if (isNumber(value)) return numberOf(value) !== 0;
  if (Array.isArray(value)) return value.length > 0;
  if (value instanceof Map) return value.size > 0;
  return true;
}

export function typeName(value: unknown): string {
  if (value === undefined) return "Undefined";
  if (value === null) return "NoneType";
  if (typeof value === "string") return "str";
  if (typeof value === "boolean") return "bool";
  if (typeof value === "number") return "int";
  if (value instanceof PyFloat) return "float";
  if (value instanceof PyTuple) return "tuple";
  if (Array.isArray(value)) return "list";
  if (value instanceof Map) return "dict";
  if (value instanceof Namespace) return "Namespace";
  return "function";
}

/** Python's str(). */
export function str(value: unknown): string {
  if (typeof value === "string") return value;
  return value === undefined ? "" : repr(value);
}

export function repr(value: unknown): string {
  if (value === undefined) return "Undefined";
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value === "number") return BigInt(value).toString();
  if (value instanceof PyFloat) return floatText(value.value);
  if (typeof value === "string") return reprString(value);
  if (value instanceof PyTuple)
    return value.length === 1 ? `(${repr(value[0])},)` : `(${Array.from(value, repr).join(", ")})`;
  if (Array.isArray(value)) return `[${value.map(repr).join(", ")}]`;
  if (value instanceof Map) return `{${Array.from(value, ([k, v]) => `${repr(k)}: ${repr(v)}`).join(", ")}}`;
  if (value instanceof Namespace) return `<Namespace ${repr(value.fields)}>`;
  return "<function>";
}

function reprString(text: string): string {
  const quote = text.includes("'") && !text.includes('"') ? '"' : "'";
  let out = quote;
  for (const char of text) {
    const code = char.codePointAt(0)!;
    if (char === quote || char === "\\") out += `\\${char}`;
    else if (char === "\n") out += "\\n";
    else if (char === "\r") out += "\\r";
    else if (char === "\t") out += "\\t";
    else if (code < 32 || code === 127) out += `\\x${code.toString(16).padStart(2, "0")}`;
    else if (code > 127 && /[\p{C}\p{Zl}\p{Zp}]|(?! )\p{Zs}/u.test(char)) {
      const hex = code.toString(16);
      out +=
        code < 256
          ? `\\x${hex.padStart(2, "0")}`
          : code < 65536
            ? `\\u${hex.padStart(4, "0")}`
            : `\\U${hex.padStart(8, "0")}`;
    } else out += char;
  }
  return out + quote;
}

/** Python prints an exponent from 1e16 on and below 1e-4, with two digits at least. */
function floatText(value: number): string {
  if (Number.isNaN(value)) return "nan";
  if (!Number.isFinite(value)) return value > 0 ? "inf" : "-inf";
  const size = Math.abs(value);
  if (size !== 0 && (size >= 1e16 || size < 1e-4)) {
    const [mantissa, exponent] = value.toExponential().split("e");
    const digits = exponent.slice(1).padStart(2, "0");
    return `${mantissa}e${exponent[0]}${digits}`;
  }
  const text = Object.is(value, -0) ? "-0" : String(value);
  return text.includes(".") ? text : `${text}.0`;
}

export function equal(a: unknown, b: unknown): boolean {
  if (isNumber(a) && isNumber(b)) return numberOf(a) === numberOf(b);
  if (Array.isArray(a) && Array.isArray(b))
    return (
      a instanceof PyTuple === b instanceof PyTuple && a.length === b.length && a.every((item, i) => equal(item, b[i]))
    );
  if (a instanceof Map && b instanceof Map)
    return a.size === b.size && [...a].every(([key, value]) => b.has(key) && equal(value, b.get(key)));
  return a === b;
}

export function compare(a: unknown, b: unknown): number {
  if (isNumber(a) && isNumber(b)) return numberOf(a) - numberOf(b);
  if (typeof a === "string" && typeof b === "string") {
    const x = Array.from(a, (c) => c.codePointAt(0)!);
    const y = Array.from(b, (c) => c.codePointAt(0)!);
    for (let i = 0; i < Math.min(x.length, y.length); i++) if (x[i] !== y[i]) return x[i] - y[i];
    return x.length - y.length;
  }
  if (Array.isArray(a) && Array.isArray(b)) {
    for (let i = 0; i < Math.min(a.length, b.length); i++) if (!equal(a[i], b[i])) return compare(a[i], b[i]);
    return a.length - b.length;
  }
  throw new TemplateError(`'<' not supported between instances of '${typeName(a)}' and '${typeName(b)}'`);
}

export function contains(container: unknown, item: unknown): boolean {
  if (typeof container === "string") {
    if (typeof item !== "string") throw new TemplateError(`'in <string>' requires string, not ${typeName(item)}`);
    return container.includes(item);
  }
  if (Array.isArray(container)) return container.some((other) => equal(other, item));
  if (container instanceof Map) return container.has(item);
  if (container === undefined) return false;
  throw new TemplateError(`argument of type '${typeName(container)}' is not iterable`);
}

/** What a for loop goes over: characters, items, keys. */
export function iterate(value: unknown): unknown[] {
  if (typeof value === "string") return Array.from(value);
  if (Array.isArray(value)) return value;
  if (value instanceof Map) return [...value.keys()];
  if (value === undefined) return [];
  throw new TemplateError(`'${typeName(value)}' object is not iterable`);
}

export interface JsonStyle {
  readonly indent?: number | undefined;
  readonly ensureAscii: boolean;
  readonly sortKeys: boolean;
  readonly separators?: readonly [string, string] | undefined;
}

/** json.dumps as transformers calls it: non-ASCII stays, nothing is escaped for HTML. */
export function toJson(value: unknown, style: JsonStyle, depth = 0): string {
  const [comma, colon] = style.separators ?? [style.indent === undefined ? ", " : ",", ": "];
  const line = (level: number) => (style.indent === undefined ? "" : `\n${" ".repeat(style.indent * level)}`);
  const text = (raw: string) => {
    const quoted = JSON.stringify(raw);
    return style.ensureAscii
      ? quoted.replace(/[\u007f-\uffff]/g, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`)
      : quoted;
  };
  const wrap = (open: string, items: string[], close: string) =>
    items.length === 0
      ? open + close
      : open + line(depth + 1) + items.join(comma + line(depth + 1)) + line(depth) + close;
  if (value === null) return "null";
  if (typeof value === "boolean") return String(value);
  if (isNumber(value)) return repr(value);
  if (typeof value === "string") return text(value);
  if (Array.isArray(value))
    return wrap(
      "[",
      Array.from(value, (v) => toJson(v, style, depth + 1)),
      "]",
    );
  if (value instanceof Map) {
    const keys = style.sortKeys ? [...value.keys()].sort(compare) : [...value.keys()];
    const item = (key: unknown) =>
      text(typeof key === "string" ? key : toJson(key, style)) + colon + toJson(value.get(key), style, depth + 1);
    return wrap("{", keys.map(item), "}");
  }
  throw new TemplateError(`Object of type ${typeName(value)} is not JSON serializable`);
}
