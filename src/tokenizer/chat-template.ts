/** Which chat template a model folder has, and messages rendered with it. */
import { NibbleError } from "../errors.ts";
import { compileTemplate, type Template } from "./jinja.ts";
import type { ChatMessage, ChatTemplateOptions } from "./tokenizer.ts";

export interface ChatTemplates {
  readonly default: string | undefined;
  /** Named ones: "tool_use", "rag", ... */
  readonly named: ReadonlyMap<string, string>;
  /** Parsed on first use. */
  readonly parsed: Map<string, Template>;
}

/**
 * The override, else chat_template.jinja, else chat_template.json, else tokenizer_config.json (a string, or a list of
 * { name, template }); further names from additional_chat_templates/NAME.jinja.
 */
export function readChatTemplates(
  files: ReadonlyMap<string, Uint8Array>,
  tokenizerConfig: Readonly<Record<string, unknown>>,
  override: string | undefined,
): ChatTemplates {
  if (override !== undefined) return { default: override, named: new Map(), parsed: new Map() };
  const named = new Map<string, string>();
  const take = (value: unknown): void => {
    if (typeof value === "string") named.set("default", value);
    if (!Array.isArray(value)) return;
    for (const item of value as { name?: unknown; template?: unknown }[])
      if (typeof item?.name === "string" && typeof item.template === "string") named.set(item.name, item.template);
  };
  take(tokenizerConfig.chat_template);
  const json = files.get("chat_template.json");
  if (json !== undefined) {
    try {
      take((JSON.parse(new TextDecoder().decode(json)) as { chat_template?: unknown }).chat_template);
    } catch (cause) {
      throw new NibbleError("bad_file", `chat_template.json is not JSON: ${(cause as Error).message}`, { cause });
    }
  }
  for (const [name, bytes] of files) {
    const extra = /(?:^|\/)additional_chat_templates\/([^/]+)\.jinja$/.exec(name);
    if (extra) named.set(extra[1], new TextDecoder().decode(bytes));
    if (name === "chat_template.jinja") named.set("default", new TextDecoder().decode(bytes));
  }
  return { default: named.get("default"), named, parsed: new Map() };
}

/** The prompt that a model's template makes of messages. */
export function renderChat(
  templates: ChatTemplates,
  specialTokens: Readonly<Record<string, string>>,
  messages: readonly ChatMessage[],
  options: ChatTemplateOptions,
): string {
  const tools = options.tools !== undefined && options.tools.length > 0 ? options.tools : null;
  const source = (tools && templates.named.get("tool_use")) ?? templates.default;
  if (source === undefined)
    throw new NibbleError(
      "bad_option",
      "This model has no chat template; give one with --chat-template, or complete plain text instead.",
      { param: "messages" },
    );
  try {
    let template = templates.parsed.get(source);
    if (template === undefined) templates.parsed.set(source, (template = compileTemplate(source)));
    return template.render({
      ...specialTokens,
      messages,
      tools,
      documents: null,
      add_generation_prompt: options.addGenerationPrompt ?? true,
      ...options.kwargs,
    });
  } catch (cause) {
    throw new NibbleError("bad_option", `The chat template refused these messages: ${(cause as Error).message}`, {
      cause,
      param: "messages",
    });
  }
}
