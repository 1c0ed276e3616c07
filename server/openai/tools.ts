/** `tools` and `tool_choice` of chat completions. */
import { z } from "zod";
import type { ToolDefinition, ToolUse } from "../answer.ts";
import { badValue, refuse } from "./errors.ts";
import { jsonSchema } from "./response-format.ts";

/** OpenAI's limit. */
export const MAX_TOOLS = 128;
const functionName = z.string().regex(/^[a-zA-Z0-9_.-]{1,64}$/);

/** Of another type than function: kept, so that it is refused by its type. */
export const tool = z.looseObject({ type: z.string() });
const functionTool = z.object({
  type: z.literal("function"),
  function: z.object({
    name: functionName,
    description: z.string().nullish(),
    parameters: jsonSchema.nullish(),
    strict: z.boolean().nullish(),
  }),
});

export const toolChoice = z.union([
  z.enum(["none", "auto", "required"]),
  z.object({ type: z.literal("function"), function: z.object({ name: z.string() }) }),
  z.object({
    type: z.literal("allowed_tools"),
    allowed_tools: z.object({
      mode: z.enum(["auto", "required"]),
      tools: z.array(z.looseObject({ function: z.object({ name: z.string() }).optional() })),
    }),
  }),
]);
type ToolChoice = z.infer<typeof toolChoice>;

export function parseTool(value: unknown, index: number): ToolDefinition {
  const param = `tools[${index}]`;
  const { type } = value as { type?: string };
  if (type !== "function") {
    throw refuse(`${param}.type`, `Invalid value: '${type}'. Supported values are: 'function'.`, "unsupported_value");
  }
  const parsed = functionTool.safeParse(value);
  if (!parsed.success) {
    const { path, message } = parsed.error.issues[0];
    throw badValue(`${param}.${path.join(".")}`, `Invalid value for '${param}.${path.join(".")}': ${message}.`);
  }
  const { name, description, parameters, strict } = parsed.data.function;
  return {
    name,
    ...(description ? { description } : {}),
    parameters: parameters ?? { type: "object", properties: {} },
    ...(strict ? { strict } : {}),
  };
}

/** What the request asks for, or undefined where no tool may be called. */
export function toolUse(
  tools: readonly ToolDefinition[] | undefined,
  choice: ToolChoice | undefined,
  parallel: boolean,
): ToolUse | undefined {
  if (!tools || tools.length === 0) {
    if (choice === undefined || choice === "none" || choice === "auto") return undefined;
    throw badValue(
      "tool_choice",
      "Invalid value for 'tool_choice': 'tool_choice' is only allowed when 'tools' are specified.",
    );
  }
  const names = new Set(tools.map(({ name }) => name));
  if (names.size < tools.length)
    throw badValue("tools", "Invalid value for 'tools': two functions have the same name.");
  const known = (name: string): string => {
    if (names.has(name)) return name;
    throw badValue(
      "tool_choice",
      `Invalid value for 'tool_choice': there is no function '${name.slice(0, 64)}' in 'tools'.`,
    );
  };
  if (choice === undefined || choice === "auto") return { definitions: tools, choice: "auto", parallel };
  if (choice === "none") return undefined;
  if (choice === "required") return { definitions: tools, choice, parallel };
  if (choice.type === "function")
    return { definitions: tools, choice: { name: known(choice.function.name) }, parallel };
  const allowed = new Set(choice.allowed_tools.tools.map((item) => known(item.function?.name ?? "")));
  const definitions = tools.filter(({ name }) => allowed.has(name));
  return { definitions, choice: choice.allowed_tools.mode, parallel };
}

/** As chat templates read them: OpenAI's own shape. */
export function templateTools(use: ToolUse): unknown[] {
  return use.definitions.map((definition) => ({ type: "function", function: { description: "", ...definition } }));
}
