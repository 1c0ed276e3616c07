/** How model families spell a call of a tool, by what their chat templates show them. */

export interface ToolFormat {
  /** What opens a call in the middle of a text; "": a call is the whole answer, told by its JSON. */
  readonly open: string;
  readonly close: string;
  /** Calls stand in a JSON array. */
  readonly list: boolean;
  readonly argumentsKey: "arguments" | "parameters";
  /** Between the opening and the JSON, and the JSON and the closing, as the templates write it. */
  readonly padding: string;
  /** Between two calls. */
  readonly separator: string;
}

export const TOOL_FORMATS = {
  /** Hermes, Qwen2.5, Qwen3, SmolLM3: <tool_call>{"name": ..., "arguments": ...}</tool_call> */
  hermes: {
    open: "<tool_call>",
    close: "</tool_call>",
    list: false,
    argumentsKey: "arguments",
    padding: "\n",
    separator: "\n",
  },
  /** Mistral: [TOOL_CALLS][{"name": ..., "arguments": ...}] */
  mistral: { open: "[TOOL_CALLS]", close: "", list: true, argumentsKey: "arguments", padding: "", separator: ", " },
  /** Granite 3, Phi-4-mini: <|tool_call|>[{"name": ..., "arguments": ...}] */
  granite: { open: "<|tool_call|>", close: "", list: true, argumentsKey: "arguments", padding: "", separator: ", " },
  /** Llama 3.x: {"name": ..., "parameters": ...} as the whole answer */
  llama3: { open: "", close: "", list: false, argumentsKey: "parameters", padding: "", separator: "; " },
  /** Everybody else: bare or fenced JSON as the whole answer */
  json: { open: "", close: "", list: false, argumentsKey: "arguments", padding: "", separator: "\n" },
} as const satisfies Record<string, ToolFormat>;

export type ToolFormatName = keyof typeof TOOL_FORMATS;

/** The format that a chat template teaches. */
export function toolFormatOf(template: string | undefined): ToolFormatName {
  if (template === undefined) return "json";
  if (template.includes("<tool_call>")) return "hermes";
  if (template.includes("[TOOL_CALLS]")) return "mistral";
  if (template.includes("<|tool_call|>")) return "granite";
  if (/["']?parameters["']?\s*:/.test(template) && template.includes("<|start_header_id|>")) return "llama3";
  return "json";
}
