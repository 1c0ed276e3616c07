/** Whether a grammar can be enforced; what cannot is refused here, before a token is made. */
import type { GrammarSpec } from "../src/runtime/engine.ts";
import { refuse } from "./openai/errors.ts";

export function requireGrammar(spec: GrammarSpec, param: string): GrammarSpec {
  throw refuse(
    param,
    `'${param}' asks for constrained decoding (${spec.kind}), which this version does not do.`,
    "unsupported_value",
  );
}
