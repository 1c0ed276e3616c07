/** What a request's tools mean for the prompt, the grammar and the reading of the answer. */
import type { GrammarSpec } from "../src/runtime/engine.ts";
import type { Tokenizer } from "../src/tokenizer/tokenizer.ts";
import { forceToolCalls, type ToolCallParser, toolCallParser } from "../src/tokenizer/tool-calls.ts";
import { TOOL_FORMATS, toolFormatOf } from "../src/tokenizer/tool-formats.ts";
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
  /** The mark that opens a call is a special token ([TOOL_CALLS]), which text leaves out otherwise. */
  readonly keepSpecialTokens: boolean;
}

export function planTools(tokenizer: Tokenizer, prompt: string, use: ToolUse): ToolPlan {
  const template = tokenizer.chatTemplate;
  const { definitions, choice, parallel } = use;
  const format = toolFormatOf(template);
  const makeCallId = format === "mistral" ? () => makeId("", 9) : () => makeId("call_");
  if (choice === "auto") {
    const mark = tokenizer.tokenId(TOOL_FORMATS[format].open);
    return {
      promptSuffix: "",
      grammar: undefined,
      parser: toolCallParser(template, definitions),
      makeId: makeCallId,
      keepSpecialTokens: mark !== undefined && tokenizer.isSpecial(mark),
    };
  }
  const named = choice === "required" ? definitions : definitions.filter(({ name }) => name === choice.name);
  const forced = forceToolCalls(template, prompt, named, choice === "required" && parallel);
  return { ...forced, makeId: makeCallId, keepSpecialTokens: false };
}
