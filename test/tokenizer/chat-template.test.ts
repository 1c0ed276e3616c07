import { describe, expect, test } from "vitest";
import { readChatTemplates, renderChat } from "../../src/tokenizer/chat-template.ts";
import { compileTemplate } from "../../src/tokenizer/jinja.ts";
import type { ChatMessage } from "../../src/tokenizer/tokenizer.ts";
import { readGolden } from "./goldens.ts";

interface ChatGolden {
  chat_template: string;
  special_tokens: Record<string, string>;
  cases: {
    id: string;
    messages: ChatMessage[];
    tools?: unknown[];
    add_generation_prompt?: boolean;
    kwargs?: Record<string, unknown>;
    rendered?: string;
    error?: string;
  }[];
}

describe.each(["smollm2", "llama3", "qwen3", "gemma3"])("the chat template of %s", (name) => {
  const golden = readGolden<ChatGolden>(`${name}.chat.json`);
  const templates = readChatTemplates(new Map(), {}, golden.chat_template);

  test.each(golden.cases)("$id", ({ messages, tools, add_generation_prompt, kwargs, rendered, error }) => {
    const render = () =>
      renderChat(templates, golden.special_tokens, messages, {
        tools,
        addGenerationPrompt: add_generation_prompt,
        kwargs,
      });
    if (rendered !== undefined) expect(render()).toBe(rendered);
    else expect(render).toThrow(golden.chat_template.includes(error!) ? error : undefined);
  });
});

interface JinjaGolden {
  context: Record<string, unknown>;
  cases: { id: string; template: string; rendered?: string; error?: string }[];
}

describe("Jinja as transformers renders it", () => {
  const golden = readGolden<JinjaGolden>("jinja.json");
  test.each(golden.cases)("$id", ({ template, rendered, error }) => {
    const render = () => compileTemplate(template).render(golden.context);
    if (rendered !== undefined) expect(render()).toBe(rendered);
    else expect(render).toThrow(error!.replace(/^TemplateError: /, ""));
  });

  test.each([
    ["{% for i in [1, 2] %}a{% if i == 1 %}b{% continue %}{% endif %}c{% endfor %}", "abac"],
    ["{% for i in [1, 2] %}{% if loop.first %}{% set x = 1 %}{% endif %}{{ x is defined }}{% endfor %}", "TrueFalse"],
    ["{{ [1] == [1] }} {{ {'a': 1} == {'a': 1} }} {{ 'a' == none }}", "True True False"],
    ["{{ ['a', \"it's\", 'q\"', 1.5, none, true] }}", "['a', \"it's\", 'q\"', 1.5, None, True]"],
    ["{{ 'a b c'.rsplit(' ', 1) }} {{ '--x-'.lstrip('-') }} {{ 'x' in nowhere }}", "['a b', 'c'] x- False"],
    ["{% generation %}a{% endgeneration %}", "a"],
    ["{{ 2.5 | round }} {{ 1e-5 }} {{ -7 // 2 }} {{ -7 % 3 }} {{ 10 / 4 }}", "2.0 1e-05 -4 2 2.5"],
    ["{{ {'b': 1, 'a': [1, {}]} | tojson(indent=1, sort_keys=true) }}", '{\n "a": [\n  1,\n  {}\n ],\n "b": 1\n}'],
    ["{% macro m(x, y=2) %}{{ x }}{{ y }}{{ caller() }}{% endmacro %}{% call m(1) %}c{% endcall %}", "12c"],
  ])("%s", (template, rendered) => {
    expect(compileTemplate(template).render({})).toBe(rendered);
  });

  test("an endless loop ends with an error", () => {
    const nested = "{% for a in range(9999) %}{% for b in range(9999) %}{{ a }}{% endfor %}{% endfor %}";
    expect(() => compileTemplate(nested).render({})).toThrow("too long");
  });
});

test("strftime_now knows the directives of Llama 3's template", () => {
  expect(compileTemplate("{{ strftime_now('%d %b %Y') }}").render({})).toMatch(/^\d{2} [A-Z][a-z]{2} \d{4}$/);
});

const bytes = (text: string) => new TextEncoder().encode(text);
test("chat_template.jinja goes before chat_template.json, which goes before tokenizer_config.json", () => {
  const config = {
    chat_template: [
      { name: "default", template: "config" },
      { name: "tool_use", template: "tools" },
    ],
  };
  const files = new Map<string, Uint8Array>();
  const shown = () => renderChat(readChatTemplates(files, config, undefined), {}, [], {});
  expect(shown()).toBe("config");
  expect(renderChat(readChatTemplates(files, config, undefined), {}, [], { tools: [{}] })).toBe("tools");
  files.set("chat_template.json", bytes('{"chat_template": "json"}'));
  expect(shown()).toBe("json");
  files.set("chat_template.jinja", bytes("jinja"));
  expect(shown()).toBe("jinja");
});

test("without a template the error says what to do", () => {
  expect(() => renderChat(readChatTemplates(new Map(), {}, undefined), {}, [], {})).toThrow("--chat-template");
});
