import { describe, expect, test } from "vitest";
import { compileGrammar } from "../../src/grammar/grammar.ts";
import {
  forceToolCalls,
  type ToolCallEvent,
  type ToolCallParser,
  toolCallParser,
} from "../../src/tokenizer/tool-calls.ts";
import { toolFormatOf } from "../../src/tokenizer/tool-formats.ts";
import { byteTokenizer, random, randomWalk } from "../grammar/walk.ts";
import { readGolden } from "./goldens.ts";

const tools = [
  {
    name: "get_weather",
    parameters: {
      type: "object",
      properties: { city: { type: "string", maxLength: 20 }, days: { type: "integer" } },
      required: ["city"],
    },
  },
  { name: "now", parameters: { type: "object", properties: {} } },
];

const templates = {
  hermes: readGolden<{ chat_template: string }>("qwen3.chat.json").chat_template,
  mistral: "{{ '[TOOL_CALLS]' }}",
  granite: "{{ '<|tool_call|>' }}",
  llama3: '<|start_header_id|> {"name": function name, "parameters": dictionary of argument name and its value}',
  json: "plain",
};

/** Events with neighbours of one kind joined: text, then calls with whole arguments. */
function summary(events: ToolCallEvent[]) {
  const text = events.map((event) => (event.kind === "text" ? event.text : "")).join("");
  const calls: { name: string; arguments: string; ended: boolean }[] = [];
  for (const event of events) {
    if (event.kind === "call") {
      expect(event.index).toBe(calls.length);
      calls.push({ name: event.name, arguments: "", ended: false });
    } else if (event.kind === "arguments") calls[event.index].arguments += event.text;
    else if (event.kind === "end") calls[event.index].ended = true;
  }
  return { text, calls };
}

function feed(parser: ToolCallParser, text: string, size: number): ToolCallEvent[] {
  const events: ToolCallEvent[] = [];
  for (let i = 0; i < text.length; i += size) events.push(...parser.push(text.slice(i, i + size)));
  return [...events, ...parser.end()];
}

const call = (name: string, args: string) => ({ name, arguments: args, ended: true });
const weather = '{"city": "Zürich } ] \\" </x>", "days": 2}';

const cases: [keyof typeof templates, string, string, ReturnType<typeof call>[]][] = [
  [
    "hermes",
    `<tool_call>\n{"name": "get_weather", "arguments": ${weather}}\n</tool_call>`,
    "",
    [call("get_weather", weather)],
  ],
  [
    "hermes",
    `Let me look.\n\n<tool_call>{"name": "now", "arguments": {}}</tool_call>\n<tool_call>\n{"arguments": ${weather}, "name": "get_weather"}\n</tool_call>`,
    "Let me look.",
    [call("now", "{}"), call("get_weather", weather)],
  ],
  ["hermes", '<tool_call>{"name": "now"}</tool_call>', "", [call("now", "{}")]],
  ["hermes", "a <tool b </tool_call> c", "a <tool b </tool_call> c", []],
  ["hermes", "<tool_call>\nnot json", "<tool_call>\nnot json", []],
  ["hermes", '{"name": "now", "arguments": {}}', "", [call("now", "{}")]],
  [
    "hermes",
    `\`\`\`json\n{"name": "get_weather", "arguments": ${weather}}\n\`\`\``,
    "",
    [call("get_weather", weather)],
  ],
  [
    "hermes",
    '{"name": "Ada"} <tool_call>{"name": "now", "arguments": {}}</tool_call>',
    '{"name": "Ada"}',
    [call("now", "{}")],
  ],
  ["mistral", "[1] is a reference", "[1] is a reference", []],
  [
    "mistral",
    `[TOOL_CALLS][{"name": "get_weather", "arguments": ${weather}}, {"name": "now", "arguments": {}}]`,
    "",
    [call("get_weather", weather), call("now", "{}")],
  ],
  ["mistral", `[TOOL_CALLS]get_weather[ARGS]${weather}`, "", [call("get_weather", weather)]],
  ["granite", '<|tool_call|>[{"name": "now", "arguments": {}}]', "", [call("now", "{}")]],
  ["llama3", `{"name": "get_weather", "parameters": ${weather}}`, "", [call("get_weather", weather)]],
  [
    "llama3",
    `<|python_tag|>{"name": "now", "parameters": {}}; {"name": "get_weather", "parameters": ${weather}}`,
    "",
    [call("now", "{}"), call("get_weather", weather)],
  ],
  ["llama3", '{"name": "unknown", "parameters": {}}', '{"name": "unknown", "parameters": {}}', []],
  ["json", `\`\`\`json\n{"name": "get_weather", "arguments": ${weather}}\n\`\`\``, "", [call("get_weather", weather)]],
  ["json", `[{"name": "now", "arguments": {}}]`, "", [call("now", "{}")]],
  ["json", '{"name": "get_weather", "arguments": "{\\"city\\": \\"x\\"}"}', "", [call("get_weather", '{"city": "x"}')]],
  ["json", '{"city": "x"}', '{"city": "x"}', []],
  ["json", "```python\nprint(1)\n```", "```python\nprint(1)\n```", []],
  ["json", "{ not JSON } at all", "{ not JSON } at all", []],
  ["json", "Hello  there \n", "Hello  there \n", []],
];

describe.each(cases)("%s: %j", (format, written, text, calls) => {
  test.each([1, 2, 3, 7, 1000])("in pieces of %i characters", (size) => {
    const events = feed(toolCallParser(templates[format], tools), written, size);
    expect(summary(events)).toEqual({ text, calls });
  });
});

test("arguments stream before the call is whole", () => {
  const parser = toolCallParser(templates.hermes, tools);
  parser.push('<tool_call>{"name": "get_weather", "arguments": {"ci');
  expect(parser.push('ty": "Par')).toEqual([{ kind: "arguments", index: 0, text: 'ty": "Par' }]);
});

test("an answer cut off within a call keeps what was said", () => {
  const events = feed(
    toolCallParser(templates.hermes, tools),
    '<tool_call>{"name": "get_weather", "arguments": {"city": "Pa',
    4,
  );
  expect(summary(events).calls).toEqual([{ name: "get_weather", arguments: '{"city": "Pa', ended: false }]);
});

test.each(Object.entries(templates))("the template decides the format: %s", (format, template) => {
  expect(toolFormatOf(template)).toBe(format);
});

describe.each(Object.keys(templates) as (keyof typeof templates)[])("forced calls as %s writes them", (format) => {
  test.each([false, true])("read back as calls of the tools, arguments valid (many: %s)", (many) => {
    const tokenizer = byteTokenizer(['{"', '": ', "</tool_call>", '"}}']);
    const next = random(9);
    const forced = () => forceToolCalls(templates[format], "prompt", tools, many);
    const compiled = compileGrammar(forced().grammar, tokenizer);
    for (let i = 0; i < 40; i++) {
      const written = randomWalk(compiled.start(), tokenizer, next);
      const { text, calls } = summary(feed(forced().parser, written, 5));
      expect(text, written).toBe("");
      expect(calls.length, written).toBeGreaterThanOrEqual(1);
      if (!many) expect(calls.length, written).toBe(1);
      for (const { name, arguments: json, ended } of calls) {
        expect(ended, written).toBe(true);
        const value = JSON.parse(json) as Record<string, unknown>;
        if (name === "now") expect(value).toEqual({});
        else expect(typeof value.city, written).toBe("string");
      }
    }
  });
});

test("a named function is the only one, and open thoughts are closed first", () => {
  const { promptSuffix, grammar } = forceToolCalls(
    templates.hermes,
    "<|im_start|>assistant\n<think>\n",
    [tools[1]],
    false,
  );
  expect(promptSuffix).toBe("\n</think>\n\n<tool_call>\n");
  expect(randomWalk(compileGrammar(grammar, byteTokenizer()).start(), byteTokenizer(), random(1))).toMatch(
    /^\{"name": "now", "arguments": \{\s*\}\}\n<\/tool_call>$/,
  );
});

test("a tool whose schema cannot be enforced is refused by its name", () => {
  const odd = [{ name: "odd", parameters: { type: "object", frob: {} } }];
  expect(() => compileGrammar(forceToolCalls(undefined, "", odd, false).grammar, byteTokenizer())).toThrow(
    'The tool "odd"',
  );
});
