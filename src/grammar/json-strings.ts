/** Texts of strings and of property names: patterns, formats and lengths together. */
import { NibbleError } from "../errors.ts";
import { FORMATS } from "./json-formats.ts";
import * as json from "./json-text.ts";
import type { Node } from "./nodes.ts";
import { isEmptyText, parseRegex, type TextRule, textsNode } from "./regex.ts";
import { unsupported } from "./schema-document.ts";
import type { StringShape } from "./schema-shapes.ts";

/** Texts of a case, or of property names. */
export function textRules({ patterns, avoid, formats, except, at }: StringShape): TextRule[] {
  const texts: TextRule[] = [
    ...patterns.map((pattern): TextRule => ({ pattern, mode: "search" })),
    ...avoid.map((pattern): TextRule => ({ pattern, mode: "search", not: true })),
    ...except.map((text): TextRule => ({ text, not: true })),
  ];
  const written = formats.flatMap((format): TextRule[] => {
    const pattern = Object.hasOwn(FORMATS, format) ? FORMATS[format] : undefined;
    // Beside a pattern, an unknown format is the annotation that draft 2020-12 makes of it.
    if (pattern === undefined && patterns.length === 0)
      throw unsupported(`${at}/format`, `the format ${JSON.stringify(format)}`);
    return pattern === undefined || pattern === "" ? [] : [{ pattern, mode: "whole" }];
  });
  if (texts.length === 0 || written.length === 0) return [...texts, ...written];
  // Beside a pattern of whole texts the format says it once more, as zod writes both; else a text is both where it can
  // be: the format is no more than an annotation.
  if (patterns.some((pattern) => /^\^.*[^\\]\$$/s.test(pattern))) return texts;
  return isEmptyText([...texts, ...written]) ? texts : [...texts, ...written];
}

/** Without its quotes, each character in one spelling. */
export function textNode(texts: readonly TextRule[], min: number, max: number, at: string): Node {
  const key = texts.some(({ pattern, mode }) => pattern !== undefined && mode === "search") ? "pattern" : "format";
  try {
    const [only] = texts;
    if (texts.length === 0) return json.plainText(min, max);
    if (texts.length === 1 && only.pattern !== undefined && !only.not)
      return parseRegex(only.pattern, only.mode ?? "search", {
        character: json.jsonCharacter,
        minLength: min,
        maxLength: max,
      });
    return textsNode(texts, min, max, json.jsonCharacter);
  } catch (error) {
    if (!(error instanceof NibbleError)) throw error;
    throw new NibbleError(error.code, `JSON Schema, ${at}/${key}: ${error.message}`, { param: `${at}/${key}` });
  }
}
