/** What a request's tools mean for the prompt, the grammar and the reading of the answer. */
import type { GrammarSpec } from "../src/runtime/engine.ts";
import { forceToolCalls, type ToolCallParser, toolCallParser } from "../src/tokenizer/tool-calls.ts";
import { toolFormatOf } from "../src/tokenizer/tool-formats.ts";
import type { ToolUse } from "./answer.ts";
import { makeId } from "./context.ts";

export interface ToolPlan {
  /** Behind the rendered prompt; "" where the model chooses. */
  readonly promptSuffix: string;
  /** Where a call is forced. */
  readonly grammar: GrammarSpec | undefined;
  /** Of one answer: it remembers what it read. */
  readonly parser: ToolCallParser;
  readonly makeId: () => string;
}

export function planTools(template: string | undefined, prompt: string, use: ToolUse): ToolPlan {
  const { definitions, choice, parallel } = use;
  const makeCallId = toolFormatOf(template) === "mistral" ? () => makeId("", 9) : () => makeId("call_");
  if (choice === "auto") {
    return {
      promptSuffix: "",
      grammar: undefined,
      parser: toolCallParser(template, definitions),
      makeId: makeCallId,
    };
  }
  const named = choice === "required" ? definitions : definitions.filter(({ name }) => name === choice.name);
  return { ...forceToolCalls(template, prompt, named, choice === "required" && parallel), makeId: makeCallId };
}
