/** Whether a value is one of a case's: what filters `enum` and `const` beside other keywords. */
import { holdsMatch } from "./regex.ts";
import type { Cases } from "./schema-cases.ts";
import {
  type ArrayShape,
  canonical,
  type NumberShape,
  type ObjectShape,
  type Shape,
  type StringShape,
} from "./schema-shapes.ts";

export function admits(cases: Cases, shape: Shape, value: unknown): boolean {
  switch (shape.type) {
    case "null":
      return value === null;
    case "boolean":
      return typeof value === "boolean";
    case "number":
      return typeof value === "number" && admitsNumber(shape, value);
    case "string":
      return typeof value === "string" && admitsString(shape, value);
    case "array":
      return Array.isArray(value) && admitsArray(cases, shape, value);
    case "object":
      return typeof value === "object" && value !== null && !Array.isArray(value) && admitsObject(cases, shape, value);
    case "values":
      return shape.values.some((item) => canonical(item) === canonical(value));
  }
}

function admitsNumber({ integer, lo, hi, openLo, openHi, multiples, others }: NumberShape, value: number): boolean {
  if (integer && !Number.isInteger(value)) return false;
  if (value < lo || value > hi || (openLo && value === lo) || (openHi && value === hi)) return false;
  return multiples.every((step) => isMultiple(value, step)) && !others.some((step) => isMultiple(value, step));
}

/** In decimals, as they are written: 1.13 is a multiple of 0.01, whatever their doubles say. */
export function isMultiple(value: number, step: number): boolean {
  const [a, b] = [decimal(value), decimal(step)];
  const places = Math.max(a.places, b.places);
  return (a.digits * 10n ** BigInt(places - a.places)) % (b.digits * 10n ** BigInt(places - b.places)) === 0n;
}

/** value = digits / 10^places. */
export function decimal(value: number): { digits: bigint; places: number } {
  const [mantissa, exponent = "0"] = String(value).split("e");
  const [whole, fraction = ""] = mantissa.split(".");
  const places = fraction.length - Number(exponent);
  const digits = BigInt(whole + fraction);
  return places >= 0 ? { digits, places } : { digits: digits * 10n ** BigInt(-places), places: 0 };
}

/** Formats are annotations here: a value that the schema itself names is what it wants. */
function admitsString({ min, max, patterns, avoid, except }: StringShape, value: string): boolean {
  const length = Array.from(value).length;
  const matches = (pattern: string): boolean => holdsMatch(pattern, value);
  if (length < min || length > max || except.includes(value)) return false;
  return patterns.every(matches) && !avoid.some(matches);
}

function admitsArray(cases: Cases, shape: ArrayShape, value: readonly unknown[]): boolean {
  if (value.length < shape.min || value.length > shape.max) return false;
  if (shape.unique && new Set(value.map(canonical)).size < value.length) return false;
  for (const { term, min, max } of shape.contains) {
    const found = value.filter((item) => cases.allows([term], item)).length;
    const certain = max === Number.POSITIVE_INFINITY; // cases may say no where the schema says yes
    const failing = value.filter((item) => cases.allows([cases.document.negated(term)], item)).length;
    if (found < min || (!certain && value.length - failing > max)) return false;
  }
  return value.every((item, i) => cases.allows(cases.itemTerms(shape.layers, i), item));
}

function admitsObject(cases: Cases, shape: ObjectShape, value: object): boolean {
  const keys = Object.keys(value);
  if (keys.length < shape.min || keys.length > shape.max) return false;
  if (shape.required.some((name) => !Object.hasOwn(value, name))) return false;
  return Object.entries(value).every(
    ([name, item]) => cases.allows(shape.names, name) && cases.allows(cases.propertyTerms(shape.layers, name), item),
  );
}
