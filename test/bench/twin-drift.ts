/**
 * What products of integers add to a 4-bit file's drift from the float model: KL over the first windows of a text.
 *   the twin that pages run on WASM   whole windows, and token by token with the cache, each being another branch of it
 *   prompts in Node                   int8 products of rotated columns (src/export/prompt-products.ts), whole windows
 *   npx tsx test/bench/twin-drift.ts <q4 folder> <checkpoint folder> <text file> [--windows 16] [--tokens 512]
 * The file as stored runs with float activations, as WASM computes it, and with rounded ones, as Node does.
 */
import { readFileSync } from "node:fs";
import { resolve } from "node:path";
import { parseArgs } from "node:util";
import * as ort from "onnxruntime-node";
import { tokenWindows } from "../../quant/calibrate.ts";
import { resolveModel } from "../../src/arch/index.ts";
import { floatWeights } from "../../src/arch/weights.ts";
import { openHfFolder } from "../../src/checkpoint/hf-folder.ts";
import { BlockForward } from "../../src/eval/block-forward.ts";
import { toIntegerGraph } from "../../src/export/integer-graph.ts";
import { openGraph, readGraph, tensorReader } from "../../src/export/open-graph.ts";
import { withIntegerProducts } from "../../src/export/prompt-products.ts";
import { nodeFolder } from "../../src/node/files.ts";
import { openSession } from "../../src/node/ort.ts";
import type { Ort } from "../../src/onnx/ort.ts";
import { encodeModel } from "../../src/onnx/proto.ts";
import { loadTokenizer } from "../../src/tokenizer/hf-tokenizer.ts";
import { logitsOf } from "../log-probabilities.ts";

const { values: flags, positionals } = parseArgs({
  allowPositionals: true,
  options: { windows: { type: "string", default: "16" }, tokens: { type: "string", default: "512" } },
});
const [folderPath, checkpointPath, text] = positionals.map((path) => resolve(path));
if (!text) throw new Error("usage: twin-drift.ts <q4 folder> <checkpoint folder> <text file> [--windows 16]");
const GRAPH = "onnx/model_q4.onnx";
const tokens = Number(flags.tokens);

const checkpoint = await openHfFolder(nodeFolder(checkpointPath));
const model = resolveModel(checkpoint);
const vocab = model.config.vocabSize;
const tokenizer = loadTokenizer(checkpoint.sideFiles, { config: checkpoint.config });
const texts = [readFileSync(text, "utf8")];
const windows = tokenWindows(tokenizer, { texts, sequenceLength: tokens, windows: Number(flags.windows) });

const folder = nodeFolder(folderPath);
const parts: Uint8Array[] = [];
const sink = { write: async (bytes: Uint8Array) => void parts.push(bytes.slice()), close: async () => undefined };
const reader = tensorReader(folder, "onnx/");
const twin = await toIntegerGraph(await readGraph(folder, GRAPH), { read: reader.read, sink, location: "int8" });
const stored = await readGraph(folder, GRAPH);
const prompts = await withIntegerProducts(stored, reader.read);
await reader.close();
const externalData = [{ path: "int8", data: new Uint8Array(Buffer.concat(parts.splice(0))) }];
const asStored = openSession.bind(undefined, ort as unknown as Ort, resolve(folderPath, GRAPH), { device: "cpu" });
const sessions = {
  float: (await openGraph(ort as unknown as Ort, folder, GRAPH, { accuracyLevel: 0 })) as ort.InferenceSession,
  twin: await ort.InferenceSession.create(encodeModel(twin), { externalData }),
  stored: (await asStored()) as ort.InferenceSession,
  prompts: (await asStored(prompts.model, prompts.files)) as ort.InferenceSession,
};

function logSumExp(row: Float32Array): number {
  let max = Number.NEGATIVE_INFINITY;
  for (const value of row) if (value > max) max = value;
  let sum = 0;
  for (const value of row) sum += Math.exp(value - max);
  return max + Math.log(sum);
}

/** KL(p || q) of two rows of logits. */
function kl(p: Float32Array, q: Float32Array): number {
  const [normP, normQ] = [logSumExp(p), logSumExp(q)];
  let sum = 0;
  for (let i = 0; i < p.length; i++) sum += Math.exp(p[i] - normP) * (p[i] - normP - (q[i] - normQ));
  return sum;
}

/** Name, session, tokens a run, and the run that it is compared with. */
const runs = [
  ["4-bit file, float activations", sessions.float, tokens, 0],
  ["twin, whole windows", sessions.twin, tokens, 0],
  ["twin, token by token", sessions.twin, 1, 0],
  ["4-bit file, rounded activations", sessions.stored, tokens, 3],
  ["prompts in Node, whole windows", sessions.prompts, tokens, 3],
] as const;
const sums = runs.map(() => 0);
const forward = new BlockForward(ort as unknown as Ort, model, floatWeights(checkpoint), tokens);
const hidden = await forward.embed(windows);
for (let layer = 0; layer < model.config.layers; layer++) await forward.block(layer, hidden);
let done = 0;
for await (const shared of forward.logits(hidden)) {
  const reference = shared.slice();
  const ids = windows[done++];
  for (const [run, [, session, chunk]] of runs.entries()) {
    let at = 0;
    for await (const { data } of logitsOf(ort, session, ids, chunk)) {
      const logits = data as Float32Array;
      for (let row = 0; row < logits.length; row += vocab, at += vocab) {
        sums[run] += kl(reference.subarray(at, at + vocab), logits.subarray(row, row + vocab)) / ids.length;
      }
    }
  }
  console.error(done, sums.map((sum) => (sum / done).toFixed(4)).join(" "));
}
await forward.dispose();

console.log(`${windows.length} windows of ${tokens} tokens of ${text.split("/").at(-1)}\n`);
console.log("| what runs | KL to the float model | added to the file's |\n| --- | --- | --- |");
for (const [run, [name, , , base]] of runs.entries()) {
  const added = run === base ? "" : ((sums[run] - sums[base]) / windows.length).toFixed(4);
  console.log(`| ${name} | ${(sums[run] / windows.length).toFixed(4)} | ${added} |`);
}
