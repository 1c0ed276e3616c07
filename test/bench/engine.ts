/**
 * Speed of a model folder beside other engines, in one run: prefill and decode by context, and many streams at once.
 * Each round runs every engine once, in turning order; the table has medians over the rounds, the best round, and the
 * median of the rounds' ratios, in which what the machine did meanwhile cancels out.
 *
 *   npx tsx test/bench/engine.ts FOLDER [--context 512,4096] [--rounds 5] [--tokens 48] [--streams 8] [--threads 2]
 *     [--text FILE] [--gguf Q4_0.gguf (test/bench/q4-0-gguf.ts makes one)]
 *     [--modules FOLDER with node_modules/node-llama-cpp] [--transformers] [--genai PYTHON with onnxruntime-genai]
 *
 * "floor" is the time that reading all weights (as stored) and the cache takes at the bandwidth that this machine reads
 * with so many threads from huge pages, measured first; what a token takes beyond it is arithmetic and overhead.
 */
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { cpus, totalmem } from "node:os";
import { dirname, join, resolve } from "node:path";
import { parseArgs } from "node:util";
import { describeGraph } from "../../src/export/describe-graph.ts";
import { dataFiles } from "../../src/export/open-graph.ts";
import { type Binding, chooseBinding } from "../../src/node/binding.ts";
import { nodeFolder } from "../../src/node/files.ts";
import { decodeModel } from "../../src/onnx/proto.ts";
import { readOffer } from "../../src/runtime/folder.ts";
import { loadTokenizer } from "../../src/tokenizer/hf-tokenizer.ts";
import { repoPath } from "../helpers.ts";
import { atRest } from "./at-rest.ts";
import { readBandwidth } from "./bandwidth.ts";
import { genai } from "./genai.ts";
import { findLlama, llamaCpp, type Measured, nibble, type Runner, transformersJs } from "./runners.ts";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    context: { type: "string", default: "512" },
    rounds: { type: "string", default: "5" },
    tokens: { type: "string", default: "48" },
    streams: { type: "string", default: "8" },
    threads: { type: "string", default: "2" },
    text: { type: "string", default: repoPath("models", "stories260k", "stories-sample.txt") },
    gguf: { type: "string" },
    modules: { type: "string" },
    transformers: { type: "boolean", default: false },
    genai: { type: "string" },
  },
});
const folder = resolve(positionals[0] ?? ".");
const [rounds, tokens, streams, threads] = [values.rounds, values.tokens, values.streams, values.threads].map(Number);
/** From here on a float cache is left out: what is compared there are the caches that are made for length. */
const LONG_CONTEXT = 2048;

const offer = await readOffer(nodeFolder(folder));
const hasInt8 = "kv-int8" in offer.variants;
const tokenizer = loadTokenizer(offer.files, { config: offer.config });
const text = readFileSync(values.text, "utf8");
const prompt = (length: number) => {
  const ids = tokenizer.encode(text.slice(0, length * 8));
  while (ids.length < length) ids.push(...ids.slice(0, length - ids.length));
  return ids.slice(0, length);
};

const median = (numbers: readonly number[]) => {
  const sorted = numbers.filter((x) => !Number.isNaN(x)).sort((a, b) => a - b);
  const middle = (sorted.length - 1) / 2;
  return (sorted[Math.floor(middle)] + sorted[Math.ceil(middle)]) / 2;
};

const version = (name: string) =>
  JSON.parse(readFileSync(join(dirname(createRequire(import.meta.url).resolve(name)), "..", "package.json"), "utf8"))
    .version as string;

/** The files that run, by hash: the weights' is the one that a table of quality can name too. */
function printFiles(): void {
  for (const path of [offer.graph, ...(hasInt8 ? [offer.variants["kv-int8"]] : [])]) {
    const bytes = readFileSync(join(folder, path));
    const data = dataFiles(decodeModel(bytes)).map((name) => join(dirname(path), name));
    for (const file of [path, ...data]) {
      const sha256 = createHash("sha256")
        .update(readFileSync(join(folder, file)))
        .digest("hex");
      console.log(`${file} sha256 ${sha256}`);
    }
  }
}

async function runnersFor(context: number, bindings: readonly Binding[]): Promise<Runner[]> {
  const runners: Runner[] = [];
  const isLong = context >= LONG_CONTEXT;
  for (const binding of bindings) {
    for (const kv of isLong && hasInt8 ? ["int8"] : hasInt8 ? ["int8", "fp32"] : ["fp32"])
      runners.push(await nibble(folder, { binding, kv, threads, context: context + 4 * tokens + 16 * streams }));
  }
  if (values.gguf && values.modules) {
    const llama = { gguf: values.gguf, modules: values.modules, threads };
    for (const cache of isLong ? (["F16", "Q8_0"] as const) : (["F16"] as const))
      runners.push(await llamaCpp({ ...llama, cache }));
  }
  if (values.transformers && !isLong) runners.push(await transformersJs(folder, threads));
  if (values.genai) {
    const { weightBytes, kvBytesPerToken } = await describeGraph(nodeFolder(folder), offer.graph);
    runners.push(await genai(folder, offer.graph, { python: values.genai, threads, weightBytes, kvBytesPerToken }));
  }
  return runners;
}

/** `work` for every runner in each round, the first one moving on. */
async function interleaved<T>(
  runners: readonly Runner[],
  rounds: number,
  work: (runner: Runner) => Promise<T>,
): Promise<T[][]> {
  const results: T[][] = runners.map(() => []);
  for (let round = 0; round < rounds; round++) {
    for (let turn = 0; turn < runners.length; turn++) {
      const at = (turn + round) % runners.length;
      results[at].push(await work(runners[at]));
    }
  }
  return results;
}

const quotients = (over: readonly number[], under: readonly number[]) => median(over.map((x, i) => x / under[i]));

function printSpeeds(context: number, runners: readonly Runner[], results: readonly Measured[][], bandwidth: number) {
  console.log(`\n### ${context} tokens of context, ${tokens} made, ${rounds} rounds\n`);
  console.log(
    "| engine | ms a token, median (best) | tokens/s | against the first | floor | prefill tokens/s, median (best) | against the first |",
  );
  console.log("| --- | --- | --- | --- | --- | --- | --- |");
  const decode = results.map((all) => all.map(({ tokenMs }) => tokenMs));
  const prefill = results.map((all) => all.map(({ prefillMs }) => (context * 1000) / prefillMs));
  for (const [i, { name, bytesPerToken }] of runners.entries()) {
    const bytes = bytesPerToken(context);
    const cells = [
      name,
      `${median(decode[i]).toFixed(2)} (${Math.min(...decode[i]).toFixed(2)})`,
      (1000 / median(decode[i])).toFixed(0),
      `${quotients(decode[0], decode[i]).toFixed(2)}`,
      `${((bytes * 1000) / bandwidth).toFixed(1)} ms, ${(bytes / 1e6).toFixed(0)} MB`,
      `${median(prefill[i]).toFixed(0)} (${Math.max(...prefill[i]).toFixed(0)})`,
      `${quotients(prefill[i], prefill[0]).toFixed(2)}`,
    ];
    console.log(`| ${cells.join(" | ")} |`);
  }
}

const bindings: Binding[] = (await chooseBinding(undefined, "cpu")) === "capi" ? ["capi", "portable"] : ["portable"];
console.log(
  `${cpus()[0].model}, ${cpus().length} cores, ${Math.round(totalmem() / 2 ** 30)} GB; Node ${process.version}`,
);
const peers = [
  ...(values.modules ? [`node-llama-cpp ${findLlama(values.modules).version}`] : []),
  ...(values.transformers ? [`@huggingface/transformers ${version("@huggingface/transformers")}`] : []),
];
console.log(
  `onnxruntime-node ${version("onnxruntime-node")}${peers.map((peer) => `, ${peer}`).join("")}; ${threads} threads`,
);
printFiles();
const bandwidth = await readBandwidth(threads);
const gigabytes = (bytes: number) => `${(bytes / 1e9).toFixed(1)} GB/s`;
console.log(`${threads} threads read ${gigabytes(bandwidth.usual)}, on huge pages ${gigabytes(bandwidth.best)}`);

for (const context of values.context.split(",").map(Number)) {
  const runners = await runnersFor(context, context >= LONG_CONTEXT ? bindings.slice(0, 1) : bindings);
  const ids = prompt(context);
  for (const runner of runners) await runner.run(ids.slice(0, 64), 4); // libraries and buffers are there now
  await atRest();
  printSpeeds(
    context,
    runners,
    await interleaved(runners, rounds, (runner) => runner.run(ids, tokens)),
    bandwidth.best,
  );
  if (context < LONG_CONTEXT && streams > 1) {
    const able = runners.filter(({ name, together }) => together && !(hasInt8 && name.includes("fp32")));
    const half = Math.ceil(rounds / 2); // each takes as long as many of the others
    const rates = await interleaved(
      able,
      half,
      (runner) => runner.together?.(streams, ids, tokens) ?? Promise.resolve(0),
    );
    console.log(`\n### ${streams} streams of ${context} tokens each\n`);
    console.log("| engine | tokens/s in all, median (best) | against the first |");
    console.log("| --- | --- | --- |");
    for (const [i, { name }] of able.entries()) {
      const shares = quotients(rates[i], rates[0]).toFixed(2);
      console.log(`| ${name} | ${median(rates[i]).toFixed(0)} (${Math.max(...rates[i]).toFixed(0)}) | ${shares} |`);
    }
  }
  for (const runner of runners) await runner.dispose();
}
process.exit(0); // llama.cpp's threads would keep it open
