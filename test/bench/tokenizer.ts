/**
 * Tokenizers and grammars: load, encode, decode and stream a text; compile a schema, mask time per token. CPU time of
 * this process, so that a busy machine does not count. Prints tables in Markdown.
 *   npx tsx test/bench/tokenizer.ts <text file> <folder with tokenizer.json>...
 */
import { readFileSync } from "node:fs";
import { basename } from "node:path";
import { compileGrammar } from "../../src/grammar/grammar.ts";
import { vocabularyOf } from "../../src/grammar/vocabulary.ts";
import type { GrammarSpec } from "../../src/runtime/engine.ts";
import { loadTokenizer } from "../../src/tokenizer/hf-tokenizer.ts";
import type { Tokenizer } from "../../src/tokenizer/tokenizer.ts";
import { readFolder } from "../tokenizer/goldens.ts";

const [textFile, ...folders] = process.argv.slice(2);
if (!textFile || folders.length === 0) throw new Error("usage: tokenizer.ts <text file> <folder>...");
const text = readFileSync(textFile, "utf8");

function cpuMs(): number {
  const { user, system } = process.cpuUsage();
  return (user + system) / 1000;
}

function timed<Result>(work: () => Result): [Result, number] {
  const start = cpuMs();
  const result = work();
  return [result, cpuMs() - start];
}

const schema = {
  type: "object",
  properties: {
    name: { type: "string" },
    age: { type: "integer", minimum: 0, maximum: 150 },
    bio: { type: "string", maxLength: 200 },
    tags: { type: "array", items: { type: "string" }, maxItems: 5 },
    address: {
      type: "object",
      properties: { street: { type: "string" }, zip: { type: "string", pattern: "^[0-9]{5}$" } },
      required: ["street", "zip"],
      additionalProperties: false,
    },
  },
  required: ["name", "age", "bio", "tags", "address"],
  additionalProperties: false,
};
const answer =
  '{"name": "Ada Lovelace", "age": 36, "bio": "She wrote the first program for a machine that was never built, and ' +
  'saw what it could do beyond numbers. Music, for example.", "tags": ["mathematics", "poetry", "computing"], ' +
  '"address": {"street": "12 St James Square", "zip": "12345"}}';
/** The same with what takes more work: items that differ, a condition, lengths beside patterns. */
const harder = {
  ...schema,
  properties: {
    ...schema.properties,
    name: { type: "string", pattern: "^[A-Z][a-z]+( [A-Z][a-z]+)*$", maxLength: 40 },
    tags: { type: "array", items: { type: "string" }, uniqueItems: true, maxItems: 5 },
  },
  if: { properties: { age: { minimum: 18 } } },
  // biome-ignore lint/suspicious/noThenProperty: a keyword of JSON Schema
  then: { properties: { bio: { minLength: 10 } } },
};
const grammars: [string, GrammarSpec][] = [
  ["schema", { kind: "json_schema", schema }],
  ["harder schema", { kind: "json_schema", schema: harder }],
  ["json_object", { kind: "json_object" }],
];

/** Mask and accept of every token of the answer, ascending. */
function maskTimes(tokenizer: Tokenizer, compiled: ReturnType<typeof compileGrammar>): number[] {
  const constraint = compiled.start();
  const times = tokenizer.encode(answer, { addSpecialTokens: false }).map((id) => {
    const [mask, ms] = timed(() => constraint.allowed());
    if (((mask[id >>> 5] >>> (id & 31)) & 1) === 0) throw new Error(`token ${id} of the answer is not allowed`);
    constraint.accept(id);
    return ms;
  });
  return times.sort((a, b) => a - b);
}

const ms = (value: number, digits = 0) => value.toFixed(digits);
const quantiles = (times: number[]) =>
  `${ms(times[times.length >> 1], 3)} | ${ms(times[Math.floor(times.length * 0.9)], 3)} | ${ms(times.at(-1)!, 3)}`;

console.log(`${basename(textFile)}: ${text.length} characters; milliseconds of CPU time\n`);
console.log(
  "| tokenizer | tokens in vocabulary | load | encode | ids | decode | stream |\n|---|--:|--:|--:|--:|--:|--:|",
);
const loaded = folders.map((folder) => {
  const files = readFolder(folder);
  const [tokenizer, load] = timed(() => loadTokenizer(files));
  const [ids, encode] = timed(() => tokenizer.encode(text, { addSpecialTokens: false }));
  const [, decode] = timed(() => tokenizer.decode(ids));
  const [, stream] = timed(() => {
    const decoder = tokenizer.streamingDecoder();
    for (const id of ids) decoder.push(id);
    return decoder.end();
  });
  console.log(
    `| ${folder} | ${tokenizer.vocabSize} | ${ms(load)} | ${ms(encode)} | ${ids.length} | ${ms(decode)} | ${ms(stream)} |`,
  );
  return { folder, tokenizer };
});

console.log(
  "\n| tokenizer | grammar | tries | compile | mask, first time: median | p90 | maximum | again: median | p90 | maximum |",
);
console.log("|---|---|--:|--:|--:|--:|--:|--:|--:|--:|");
for (const { folder, tokenizer } of loaded) {
  const [, tries] = timed(() => vocabularyOf(tokenizer));
  for (const [name, spec] of grammars) {
    const [compiled, compile] = timed(() => compileGrammar(spec, tokenizer));
    const first = maskTimes(tokenizer, compiled);
    const again = maskTimes(tokenizer, compiled);
    console.log(
      `| ${folder} | ${name} | ${ms(tries)} | ${ms(compile, 1)} | ${quantiles(first)} | ${quantiles(again)} |`,
    );
  }
}
