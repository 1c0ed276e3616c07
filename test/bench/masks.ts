/**
 * What constrained decoding costs: time to compile a schema and time of the mask before each token, on documents that
 * the schema allows, beside a decode step of the same model in the same run. Every document is written twice: the first
 * time its masks are new, the second time they are there already. The process is warm, each grammar is not.
 *
 *   npx tsx test/bench/masks.ts FOLDER...
 */
import { compileGrammar } from "../../src/grammar/grammar.ts";
import { vocabularyOf } from "../../src/grammar/vocabulary.ts";
import { loadEngine } from "../../src/node/engine.ts";
import type { Engine } from "../../src/runtime/engine.ts";
import type { Tokenizer } from "../../src/tokenizer/tokenizer.ts";

const DECODED = 64;
const ROUNDS = 5;

const object = (properties: Record<string, object>, more: object = {}) => ({
  type: "object",
  properties,
  required: Object.keys(properties),
  additionalProperties: false,
  ...more,
});
const string = { type: "string" };
const short = { type: "string", maxLength: 24 };
const address = object({ street: string, zip: { type: "string", pattern: "^[0-9]{5}$" }, city: short });

/** A schema and a document of it, from a function's arguments to nested records. */
const cases: Readonly<Record<string, { readonly schema: object; readonly value: unknown }>> = {
  "a call's arguments": {
    schema: object({ city: short, unit: { enum: ["celsius", "fahrenheit"] } }),
    value: { city: "San Francisco", unit: "celsius" },
  },
  "numbers and dates": {
    schema: object({
      at: { type: "string", format: "date-time" },
      minutes: { type: "integer", minimum: 5, maximum: 600 },
      x: { type: "number", minimum: -1, maximum: 1 },
      id: { type: "string", format: "uuid" },
    }),
    value: { at: "2026-05-17T08:30:00Z", minutes: 90, x: -0.25, id: "6f9619ff-8b86-4d01-b42d-00cf4fc964ff" },
  },
  "long text": {
    schema: object({ title: string, summary: { type: "string", minLength: 20, maxLength: 400 } }),
    value: {
      title: "The Lighthouse",
      summary:
        "A keeper who has not left the island for nineteen years finds a letter in a bottle, written in his own hand, " +
        'and dated "tomorrow". He reads it twice – then he lights the lamp.',
    },
  },
  choices: {
    schema: {
      oneOf: [
        object({ kind: { const: "circle" }, radius: { type: "integer", minimum: 1, maximum: 99 } }),
        object({ kind: { const: "polygon" }, points: { type: "array", items: { type: "integer" }, minItems: 3 } }),
      ],
    },
    value: { kind: "polygon", points: [10, 20, 35, 40, 7] },
  },
  "distinct items": {
    schema: object({
      tags: { type: "array", items: { enum: ["red", "green", "blue", "white", "black"] }, uniqueItems: true },
    }),
    value: { tags: ["green", "white", "red"] },
  },
  "if and then": {
    schema: object(
      { country: { enum: ["DE", "US"] }, zip: short },
      {
        if: { properties: { country: { const: "DE" } } },
        // biome-ignore lint/suspicious/noThenProperty: a keyword of JSON Schema
        then: { properties: { zip: { pattern: "^[0-9]{5}$" } } },
        else: { properties: { zip: { pattern: "^[0-9]{5}-[0-9]{4}$" } } },
      },
    ),
    value: { country: "US", zip: "90210-1234" },
  },
  "records within records": {
    schema: object(
      {
        name: short,
        born: { type: "integer" },
        home: { $ref: "#/$defs/address" },
        friends: { $ref: "#/$defs/people" },
      },
      {
        $defs: {
          address,
          people: { type: "array", items: object({ name: short, home: { $ref: "#/$defs/address" } }), maxItems: 4 },
        },
      },
    ),
    value: {
      name: "Ada Lovelace",
      born: 1815,
      home: { street: "12 St. James's Square", zip: "10115", city: "London" },
      friends: [
        { name: "Charles Babbage", home: { street: "1 Dorset Street", zip: "20095", city: "London" } },
        { name: "Mary Somerville", home: { street: "Kleine Straße 8", zip: "80331", city: "Jedburgh" } },
      ],
    },
  },
  "any JSON": {
    schema: {},
    value: { order: 17, items: [{ sku: "A-1", price: 3.5, tags: ["new", "sale"] }], note: null, paid: true },
  },
};

interface Times {
  readonly compileMs: number[];
  readonly firstMs: number[];
  readonly againMs: number[];
}

function measure(tokenizer: Tokenizer, { schema, value }: (typeof cases)[string]): Times {
  const ids = tokenizer.encode(JSON.stringify(value), { addSpecialTokens: false });
  const times: Times = { compileMs: [], firstMs: [], againMs: [] };
  const timed = <T>(list: number[], work: () => T): T => {
    const start = performance.now();
    const result = work();
    list.push(performance.now() - start);
    return result;
  };
  for (let round = 0; round < ROUNDS; round++) {
    const compiled = timed(times.compileMs, () => compileGrammar({ kind: "json_schema", schema }, tokenizer));
    for (const list of [times.firstMs, times.againMs]) {
      const constraint = compiled.start();
      for (const id of ids) {
        const mask = timed(list, () => constraint.allowed());
        if (!(mask[id >>> 5] & (1 << (id & 31)))) throw new Error(`${JSON.stringify(schema)} refuses its document`);
        constraint.accept(id);
      }
    }
  }
  return times;
}

async function decodeStepMs(engine: Engine): Promise<number> {
  const prompt = engine.tokenizer.encode("Once upon a time there was a programmer who wrote");
  let decodeMs = 0;
  const options = { temperature: 1, seed: 1, maxTokens: DECODED, ignoreEos: true }; // sampled text does not repeat: no guesses
  for await (const { timings } of engine.generate(prompt, options)) decodeMs = timings?.decodeMs ?? decodeMs;
  return decodeMs / (DECODED - 1);
}

const at = (values: readonly number[], share: number): number =>
  [...values].sort((a, b) => a - b)[Math.min(values.length - 1, Math.floor(share * values.length))];
const mean = (values: readonly number[]): number => values.reduce((sum, value) => sum + value, 0) / values.length;
const row = (values: readonly number[]): string =>
  [mean(values), at(values, 0.5), at(values, 0.99), Math.max(...values)].map((ms) => ms.toFixed(3)).join(" | ");

for (const folder of process.argv.slice(2)) {
  const engine = await loadEngine(folder);
  const { tokenizer, info } = engine;
  await decodeStepMs(engine);
  const stepMs = await decodeStepMs(engine);
  await engine.dispose();
  const start = performance.now();
  vocabularyOf(tokenizer);
  const vocabularyMs = performance.now() - start;
  console.log(
    `\n${info.id}: ${info.vocabSize} tokens, a decode step ${stepMs.toFixed(2)} ms, 5 % of it ${(stepMs / 20).toFixed(3)}; ` +
      `the vocabulary's tries, once, ${vocabularyMs.toFixed(0)} ms\n\n` +
      "| schema | compile, median | max | new mask, mean | median | 99 % | max | mask again, mean | median | 99 % | max |\n" +
      "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
  );
  const all: Times = { compileMs: [], firstMs: [], againMs: [] };
  const line = (name: string, { compileMs, firstMs, againMs }: Times): void =>
    console.log(
      `| ${name} | ${at(compileMs, 0.5).toFixed(2)} | ${Math.max(...compileMs).toFixed(2)} | ${row(firstMs)} | ${row(againMs)} |`,
    );
  for (const example of Object.values(cases)) measure(tokenizer, example); // a server's code has run before
  for (const [name, example] of Object.entries(cases)) {
    const times = measure(tokenizer, example);
    line(name, times);
    for (const key of ["compileMs", "firstMs", "againMs"] as const) all[key].push(...times[key]);
  }
  line("all", all);
}
