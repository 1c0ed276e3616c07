/**
 * Renders chat templates as transformers does: Jinja 3.1 with trim_blocks, lstrip_blocks, loop controls, a `tojson`
 * without HTML escapes, raise_exception and strftime_now; nothing is compiled to code, so a strict CSP allows it.
 *
 * @huggingface/jinja 0.5.11 reads the template; its interpreter is replaced, because it prints true, false and null
 * where Python prints True, False and None, prints lists and dicts as JSON, drops None, keeps a loop's variables from one
 * round to the next, compares lists and dicts by identity, ignores the argument of strip and lstrip, adds anything to
 * a string, refuses `map('filter')` and `~ none`. Its lexer lacks `{% raw %}` and exponents: see `readTemplate`.
 */
import { parse, tokenize } from "@huggingface/jinja";
import { applyFilter, dictMethod, listMethod, runTest, stringMethod } from "./jinja-builtins.ts";
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
  str,
  TemplateError,
  toPython,
  truthy,
  typeName,
} from "./jinja-values.ts";

/** A node of the library's syntax tree; `type` says which fields it has. */
// biome-ignore lint/suspicious/noExplicitAny: the library exports no types of its nodes
type Node = { readonly type: string } & Record<string, any>;

class Scope {
  readonly #names = new Map<string, unknown>();
  readonly #outer: Scope | undefined;
  constructor(outer?: Scope) {
    this.#outer = outer;
  }
  get(name: string): unknown {
    return this.#names.has(name) ? this.#names.get(name) : this.#outer?.get(name);
  }
  set(name: string, value: unknown): void {
    this.#names.set(name, value);
  }
}

/** Thrown by break and continue; carries what the abandoned round had printed. */
class LoopControl extends Error {
  printed = "";
  constructor(readonly leaves: boolean) {
    super("break or continue outside a loop");
  }
}

const STEP_LIMIT = 500_000; // evaluated nodes; a long chat with tools needs tens of thousands
const RANGE_LIMIT = 100_000; // as Jinja's sandbox

/** A template, parsed once. */
export interface Template {
  render(variables: Readonly<Record<string, unknown>>): string;
}

export function compileTemplate(source: string): Template {
  const program = readTemplate(source);
  return {
    render(variables) {
      const scope = new Scope();
      for (const [name, value] of Object.entries(globals())) scope.set(name, value);
      for (const [name, value] of Object.entries(variables)) scope.set(name, toPython(value));
      return new Renderer().block(program.body, scope);
    },
  };
}

/** The library's lexer and parser, with raw blocks made string literals and "1e20", lexed as 1 and e20, rejoined. */
function readTemplate(source: string): Node {
  const unraw = source.replace(
    /\{%(-?)\s*raw\s*(-?)%\}([\s\S]*?)\{%(-?)\s*endraw\s*(-?)%\}/g,
    (_, before: string, trimStart: string, text: string, trimEnd: string, after: string) => {
      let body = trimStart ? text.trimStart() : text.replace(/^\n/, "");
      if (trimEnd) body = body.trimEnd();
      return `{{${before} ${JSON.stringify(body).replace(/[{}%#]/g, (c) => `\\x${c.charCodeAt(0).toString(16)}`)} ${after}}}`;
    },
  );
  const tokens = tokenize(unraw, { lstrip_blocks: true, trim_blocks: true });
  const joined: typeof tokens = [];
  for (let i = 0; i < tokens.length; i++) {
    const token = tokens[i];
    const exponent = tokens[i + 1];
    if (token.type === "NumericLiteral" && exponent?.type === "Identifier" && /^[eE]\d*$/.test(exponent.value)) {
      let power = exponent.value;
      let taken = 1;
      if (power.length === 1 && tokens[i + 3]?.type === "NumericLiteral") {
        power += tokens[i + 2].value + tokens[i + 3].value;
        taken = 3;
      }
      token.value = `${token.value.includes(".") ? token.value : `${token.value}.0`}${power}`;
      i += taken;
    }
    joined.push(token);
  }
  return parse(joined) as unknown as Node;
}

function globals(): Record<string, PyFunction> {
  return {
    range: (args) => {
      const [start, stop, step] = args.length === 1 ? [0, numberOf(args[0]), 1] : [...args.map(numberOf), 1];
      if (!step || Math.abs((stop - start) / step) > RANGE_LIMIT) throw new TemplateError("range too big");
      const out: number[] = [];
      for (let i = start; step > 0 ? i < stop : i > stop; i += step) out.push(i);
      return out;
    },
    namespace: (args, kwargs) => {
      const made = new Namespace();
      if (args[0] instanceof Map) for (const [key, value] of args[0]) made.fields.set(String(key), value);
      for (const [key, value] of kwargs) made.fields.set(key, value);
      return made;
    },
    dict: (args, kwargs) => new Map([...((args[0] as Map<unknown, unknown>) ?? []), ...kwargs]),
    raise_exception: ([message]) => {
      throw new TemplateError(str(message));
    },
    strftime_now: ([format]) => strftime(str(format), new Date()),
    joiner: ([separator = ", "]) => {
      let used = false;
      return () => {
        const before = used ? separator : "";
        used = true;
        return before;
      };
    },
  };
}

class Renderer {
  #steps = 0;

  block(nodes: readonly Node[], scope: Scope): string {
    let out = "";
    try {
      for (const node of nodes) out += this.statement(node, scope);
    } catch (error) {
      if (error instanceof LoopControl) error.printed = out + error.printed;
      throw error;
    }
    return out;
  }

  private statement(node: Node, scope: Scope): string {
    switch (node.type) {
      case "Set":
        this.assign(node.assignee, node.value ? this.value(node.value, scope) : this.block(node.body, scope), scope);
        return "";
      case "If":
        return this.block(truthy(this.value(node.test, scope)) ? node.body : node.alternate, scope);
      case "For":
        return this.loop(node, scope);
      case "Macro":
        scope.set(node.name.value, this.macro(node.args, node.body, scope));
        return "";
      case "CallStatement": {
        const inner = new Scope(scope);
        const caller = this.macro(node.callerArgs ?? [], node.body, scope);
        const callee = this.value(node.call.callee, inner);
        const [args, kwargs] = this.arguments(node.call.args, scope);
        return str(call(callee, args, new Map([...kwargs, ["caller", caller]])));
      }
      case "FilterStatement":
        return str(this.filter(this.block(node.body, new Scope(scope)), node.filter, scope));
      case "Break":
        throw new LoopControl(true);
      case "Continue":
        throw new LoopControl(false);
      case "Comment":
        return "";
      default:
        return str(this.value(node, scope));
    }
  }

  private loop(node: Node, scope: Scope): string {
    const filtered = node.iterable.type === "SelectExpression";
    const source = iterate(this.value(filtered ? node.iterable.lhs : node.iterable, scope));
    const items = filtered
      ? source.filter((item) => {
          const inner = new Scope(scope);
          this.assign(node.loopvar, item, inner);
          return truthy(this.value(node.iterable.test, inner));
        })
      : source;
    if (items.length === 0) return this.block(node.defaultBlock, scope);
    let out = "";
    let changed: unknown[] | undefined;
    for (let i = 0; i < items.length; i++) {
      const inner = new Scope(scope); // each round starts afresh
      const info = new Map<string, unknown>(
        Object.entries({
          index: i + 1,
          index0: i,
          revindex: items.length - i,
          revindex0: items.length - i - 1,
          first: i === 0,
          last: i === items.length - 1,
          length: items.length,
          previtem: i > 0 ? items[i - 1] : undefined,
          nextitem: items[i + 1],
          cycle: (args: unknown[]) => args[i % args.length],
          changed: (args: unknown[]) => {
            const same = changed !== undefined && equal(changed, args);
            changed = args;
            return !same;
          },
        }),
      );
      inner.set("loop", info);
      this.assign(node.loopvar, items[i], inner);
      try {
        out += this.block(node.body, inner);
      } catch (error) {
        if (!(error instanceof LoopControl)) throw error;
        out += error.printed;
        if (error.leaves) break;
      }
    }
    return out;
  }

  private assign(target: Node, value: unknown, scope: Scope): void {
    if (target.type === "Identifier") scope.set(target.value, value);
    else if (target.type === "TupleLiteral") {
      const values = iterate(value);
      if (values.length !== target.value.length)
        throw new TemplateError(`cannot unpack ${values.length} values into ${target.value.length} names`);
      target.value.forEach((one: Node, i: number) => {
        this.assign(one, values[i], scope);
      });
    } else {
      const object = this.value(target.object, scope);
      if (!(object instanceof Namespace)) throw new TemplateError("cannot assign attribute on non-namespace object");
      object.fields.set(target.property.value, value);
    }
  }

  private macro(parameters: readonly Node[], body: readonly Node[], scope: Scope): PyFunction {
    return (args, kwargs) => {
      const inner = new Scope(scope);
      parameters.forEach((parameter, i) => {
        const name: string = parameter.type === "Identifier" ? parameter.value : parameter.key.value;
        const fallback = parameter.type === "Identifier" ? undefined : this.value(parameter.value, inner);
        inner.set(name, i < args.length ? args[i] : kwargs.has(name) ? kwargs.get(name) : fallback);
      });
      inner.set("varargs", PyTuple.from(args.slice(parameters.length)));
      inner.set("kwargs", kwargs);
      if (kwargs.has("caller")) inner.set("caller", kwargs.get("caller"));
      return this.block(body, inner);
    };
  }

  private arguments(nodes: readonly Node[], scope: Scope): [unknown[], Map<string, unknown>] {
    const args: unknown[] = [];
    const kwargs = new Map<string, unknown>();
    for (const node of nodes) {
      if (node.type === "SpreadExpression") args.push(...iterate(this.value(node.argument, scope)));
      else if (node.type === "KeywordArgumentExpression") kwargs.set(node.key.value, this.value(node.value, scope));
      else if (node.type === "KeywordSpreadExpression")
        for (const [key, value] of this.value(node.argument, scope) as Map<string, unknown>) kwargs.set(key, value);
      else args.push(this.value(node, scope));
    }
    return [args, kwargs];
  }

  private filter(value: unknown, node: Node, scope: Scope): unknown {
    if (node.type === "Identifier") return applyFilter(node.value, value, [], new Map());
    const [args, kwargs] = this.arguments(node.args, scope);
    return applyFilter(node.callee.value, value, args, kwargs);
  }

  private value(node: Node, scope: Scope): unknown {
    if (++this.#steps > STEP_LIMIT) throw new TemplateError("the template runs too long");
    switch (node.type) {
      case "IntegerLiteral":
      case "StringLiteral":
        return node.value;
      case "FloatLiteral":
        return new PyFloat(node.value);
      case "ArrayLiteral":
        return node.value.map((item: Node) => this.value(item, scope));
      case "TupleLiteral":
        return PyTuple.from(node.value.map((item: Node) => this.value(item, scope)));
      case "ObjectLiteral":
        return new Map([...node.value].map(([k, v]: [Node, Node]) => [this.value(k, scope), this.value(v, scope)]));
      case "Identifier":
        return this.name(node.value, scope);
      case "MemberExpression":
        return this.member(node, scope);
      case "CallExpression": {
        const [args, kwargs] = this.arguments(node.args, scope);
        return call(this.value(node.callee, scope), args, kwargs);
      }
      case "FilterExpression":
        return this.filter(this.value(node.operand, scope), node.filter, scope);
      case "TestExpression":
        return runTest(node.test.value, this.value(node.operand, scope), []) !== node.negate;
      case "SelectExpression":
        return truthy(this.value(node.test, scope)) ? this.value(node.lhs, scope) : undefined;
      case "Ternary":
        return this.value(truthy(this.value(node.condition, scope)) ? node.trueExpr : node.falseExpr, scope);
      case "UnaryExpression": {
        const value = this.value(node.argument, scope);
        if (node.operator.value === "not") return !truthy(value);
        const signed = node.operator.value === "-" ? -numberOf(value) : numberOf(value);
        return value instanceof PyFloat ? new PyFloat(signed) : signed;
      }
      case "BinaryExpression":
        return this.binary(node, scope);
      default:
        throw new TemplateError(`${node.type} cannot be evaluated`);
    }
  }

  private name(name: string, scope: Scope): unknown {
    if (name === "true" || name === "True") return true;
    if (name === "false" || name === "False") return false;
    if (name === "none" || name === "None") return null;
    return scope.get(name);
  }

  private member(node: Node, scope: Scope): unknown {
    const object = this.value(node.object, scope);
    if (node.computed && node.property.type === "SliceExpression") return this.slice(object, node.property, scope);
    const key = node.computed ? this.value(node.property, scope) : node.property.value;
    if (object === undefined) throw new TemplateError(`'${describe(node.object)}' is undefined`);
    if (object instanceof Namespace) return object.fields.get(String(key));
    if (object instanceof Map) {
      const method = dictMethod(object, String(key));
      if (node.computed) return object.has(key) ? object.get(key) : method;
      return method ?? object.get(key);
    }
    if (typeof key === "number" && (Array.isArray(object) || typeof object === "string"))
      return Array.isArray(object) ? object.at(key) : Array.from(object).at(key);
    if (typeof object === "string") return stringMethod(object, String(key));
    if (Array.isArray(object)) return listMethod(object, String(key));
    return undefined;
  }

  private slice(object: unknown, node: Node, scope: Scope): unknown {
    if (typeof object !== "string" && !Array.isArray(object))
      throw new TemplateError(`'${typeName(object)}' object is not subscriptable`);
    const at = (part: Node | undefined) => {
      const value = part && this.value(part, scope);
      return value == null ? undefined : numberOf(value);
    };
    const items = Array.from(object as Iterable<unknown>);
    const step = at(node.step) ?? 1;
    if (step === 0) throw new TemplateError("slice step cannot be zero");
    const n = items.length;
    const clamp = (value: number | undefined, fallback: number) =>
      value === undefined
        ? fallback
        : Math.min(Math.max(value < 0 ? value + n : value, step > 0 ? 0 : -1), step > 0 ? n : n - 1);
    const out: unknown[] = [];
    const stop = clamp(at(node.stop), step > 0 ? n : -1);
    for (let i = clamp(at(node.start), step > 0 ? 0 : n - 1); step > 0 ? i < stop : i > stop; i += step)
      out.push(items[i]);
    return typeof object === "string" ? out.join("") : out;
  }

  private binary(node: Node, scope: Scope): unknown {
    const operator: string = node.operator.value;
    const left = this.value(node.left, scope);
    if (operator === "and") return truthy(left) ? this.value(node.right, scope) : left;
    if (operator === "or") return truthy(left) ? left : this.value(node.right, scope);
    const right = this.value(node.right, scope);
    switch (operator) {
      case "==":
        return equal(left, right);
      case "!=":
        return !equal(left, right);
      case "<":
        return compare(left, right) < 0;
      case "<=":
        return compare(left, right) <= 0;
      case ">":
        return compare(left, right) > 0;
      case ">=":
        return compare(left, right) >= 0;
      case "in":
        return contains(right, left);
      case "not in":
        return !contains(right, left);
      case "~":
        return str(left) + str(right);
      case "+":
        if (typeof left === "string") {
          if (typeof right === "string") return left + right;
          throw new TemplateError(`can only concatenate str (not "${typeName(right)}") to str`);
        }
        if (Array.isArray(left) && Array.isArray(right)) return [...left, ...right];
        return arithmetic(operator, left, right);
      case "*":
        if (typeof left === "string") return left.repeat(Math.max(0, numberOf(right)));
        if (Array.isArray(left)) return Array.from({ length: Math.max(0, numberOf(right)) }, () => left).flat();
        return arithmetic(operator, left, right);
      default:
        return arithmetic(operator, left, right);
    }
  }
}

function arithmetic(operator: string, left: unknown, right: unknown): unknown {
  if (!isNumber(left) || !isNumber(right))
    throw new TemplateError(
      `unsupported operand type(s) for ${operator}: '${typeName(left)}' and '${typeName(right)}'`,
    );
  const a = numberOf(left);
  const b = numberOf(right);
  const float = left instanceof PyFloat || right instanceof PyFloat;
  const typed = (value: number) => (float ? new PyFloat(value) : value);
  if (b === 0 && ["/", "//", "%"].includes(operator)) throw new TemplateError("division by zero");
  switch (operator) {
    case "+":
      return typed(a + b);
    case "-":
      return typed(a - b);
    case "*":
      return typed(a * b);
    case "/":
      return new PyFloat(a / b);
    case "//":
      return typed(Math.floor(a / b));
    case "%":
      return typed(((a % b) + b) % b); // the sign of the divisor, as in Python
    case "**":
      return float || b < 0 ? new PyFloat(a ** b) : a ** b;
    default:
      throw new TemplateError(`unknown operator ${operator}`);
  }
}

function call(callee: unknown, args: unknown[], kwargs: Map<string, unknown>): unknown {
  if (typeof callee !== "function")
    throw new TemplateError(
      callee === undefined ? "an undefined name is called" : `'${typeName(callee)}' object is not callable`,
    );
  return (callee as PyFunction)(args, kwargs);
}

function describe(node: Node): string {
  if (node.type === "Identifier") return node.value;
  if (node.type === "MemberExpression" && !node.computed) return `${describe(node.object)}.${node.property.value}`;
  return node.type;
}

/** The directives that templates use for "today's date", in local time and English. */
function strftime(format: string, now: Date): string {
  const two = (value: number) => String(value).padStart(2, "0");
  const name = (options: Intl.DateTimeFormatOptions) => new Intl.DateTimeFormat("en-US", options).format(now);
  const directives: Record<string, () => string> = {
    Y: () => String(now.getFullYear()),
    y: () => two(now.getFullYear() % 100),
    m: () => two(now.getMonth() + 1),
    d: () => two(now.getDate()),
    H: () => two(now.getHours()),
    I: () => two(now.getHours() % 12 || 12),
    M: () => two(now.getMinutes()),
    S: () => two(now.getSeconds()),
    p: () => (now.getHours() < 12 ? "AM" : "PM"),
    b: () => name({ month: "short" }),
    B: () => name({ month: "long" }),
    a: () => name({ weekday: "short" }),
    A: () => name({ weekday: "long" }),
    "%": () => "%",
  };
  return format.replace(/%(-?)([A-Za-z%])/g, (all, bare: string, letter: string) => {
    const text = directives[letter]?.();
    return text === undefined ? all : bare ? text.replace(/^0(?=.)/, "") : text;
  });
}
