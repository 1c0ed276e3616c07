/** Forced tool calls as a grammar: a family's spelling around arguments that follow each tool's schema. */
import { NibbleError } from "../errors.ts";
import { TOOL_FORMATS, type ToolFormat, type ToolFormatName } from "../tokenizer/tool-formats.ts";
import { schemaToGrammar } from "./json-schema.ts";
import { alt, literal, type Node, repeat, seq } from "./nodes.ts";

/** What follows the opening mark, which the prompt already ends with (see `forceToolCalls`). */
export function toolCalls(
  name: ToolFormatName,
  tools: readonly { readonly name: string; readonly parameters: unknown }[],
  many: boolean,
): Node {
  const format: ToolFormat = TOOL_FORMATS[name];
  const call = alt(
    ...tools.map((tool) =>
      seq(literal(`{"name": ${JSON.stringify(tool.name)}, "${format.argumentsKey}": `), parameters(tool), literal("}")),
    ),
  );
  if (format.list) {
    const more = many ? repeat(seq(literal(format.separator), call), 0) : seq();
    return seq(literal("["), call, more, literal("]"));
  }
  const end = literal(format.padding + format.close);
  if (!many) return seq(call, end);
  return seq(call, end, repeat(seq(literal(format.separator + format.open + format.padding), call, end), 0));
}

function parameters(tool: { readonly name: string; readonly parameters: unknown }): Node {
  try {
    return schemaToGrammar(tool.parameters ?? { type: "object", properties: {} });
  } catch (error) {
    if (error instanceof NibbleError)
      throw new NibbleError(error.code, `The tool "${tool.name}": ${error.message}`, { cause: error, param: "tools" });
    throw error;
  }
}
