/** Whether the tools of a request can be served; what cannot be promised is refused before a token is made. */
import type { ToolUse } from "./answer.ts";
import { refuse } from "./openai/errors.ts";

export function requireToolUse(use: ToolUse | undefined): void {
  if (!use || use.choice === "auto") return;
  const what = use.choice === "required" ? "required" : `the function ${use.choice.name}`;
  const message = `'tool_choice' ${what} needs constrained decoding, which this version does not do.`;
  throw refuse("tool_choice", message, "unsupported_value");
}
