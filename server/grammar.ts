/** Whether a grammar can be enforced: it is read here, so that what cannot be is refused before a token is made. */
import { NibbleError } from "../src/errors.ts";
import { checkGrammar } from "../src/grammar/grammar.ts";
import type { GrammarSpec } from "../src/runtime/engine.ts";
import { ApiError, badValue } from "./openai/errors.ts";

/** Characters of a schema's or grammar's text; published schemas of whole APIs stay below. */
const MAX_GRAMMAR_LENGTH = 256 * 1024;

/** Grammars that were found good: clients send theirs again and again, and reading one takes milliseconds. */
const good = new Set<string>();
const MAX_GOOD = 64;

/** The spec itself; throws 400 naming the field, and the keyword where one is not supported. */
export function requireGrammar(spec: GrammarSpec, param: string): GrammarSpec {
  const text = JSON.stringify(spec);
  if (text.length > MAX_GRAMMAR_LENGTH) {
    throw badValue(param, `'${param}' is ${text.length} characters long; the most is ${MAX_GRAMMAR_LENGTH}.`);
  }
  if (good.has(text)) return spec;
  try {
    checkGrammar(spec);
    if (good.size >= MAX_GOOD) good.delete(good.values().next().value!);
    good.add(text);
  } catch (error) {
    if (!(error instanceof NibbleError)) throw error;
    const apiCode = error.code === "unsupported" ? "unsupported_value" : "invalid_value";
    throw new ApiError(400, apiCode, `Invalid '${param}': ${error.message}`, { param, code: error.code });
  }
  return spec;
}
