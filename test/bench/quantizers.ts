/**
 * What each recipe costs and loses on one checkpoint, as a table in Markdown: mean KL to the float model, perplexity,
 * top-1 agreement, CPU and wall seconds of quantizing, peak memory. Decoder linears only unless --head.
 *   npx tsx test/bench/quantizers.ts <checkpoint folder> --test FILE[,FILE...] [--calibrate FILE] [--recipes default,rtn:symmetric,...]
 *     [--windows 64] [--test-windows 64] [--head] [--json] [--keep FOLDER] [--python INTERPRETER --peers hqq,gptqmodel,autoround]
 * Calibration takes the first windows of its file (a recipe may use fewer); of a .jsonl, or without a file of the set that
 * ships, those that `nibble quantize` would take.
 * A recipe is a method or preset with settings after colons: gptq:bits=3:groupSize=64:symmetric:learned.steps=60. Pruning is
 * wanda or sparsegpt, alone (wanda:sparsity=0.5) or before a recipe (gptq:prune=sparsegpt:sparsity=2of4).
 * Each recipe runs in a process of its own, so that peak memory is its own; what the float model makes of the test text is
 * kept for all of them, in a temporary folder or in --keep. Peers (quantizer_peers.py) are other toolkits in a Python
 * environment, with the same settings, on the same tokens; what they make is scored here.
 */
import { spawnSync } from "node:child_process";
import { cpSync, existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { basename, extname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { tokenWindows } from "../../quant/calibrate.ts";
import { ortProducts } from "../../quant/products.ts";
import { PRUNERS, type Pruning } from "../../quant/prune.ts";
import { quantizeModel } from "../../quant/quantize.ts";
import type { StoredMatrix } from "../../quant/quantized-model.ts";
import {
  METHODS,
  type MethodOptions,
  method,
  PRESETS,
  preset,
  prune,
  type Recipe,
  windowsOf,
} from "../../quant/recipes.ts";
import { parseSparsity } from "../../quant/sparsity.ts";
import { type Model, resolveModel } from "../../src/arch/index.ts";
import { floatWeights, type Weights } from "../../src/arch/weights.ts";
import type { Hidden } from "../../src/eval/block-forward.ts";
import { type Drift, finalStates, measureDrift } from "../../src/eval/drift.ts";
import { sha256Hex } from "../../src/hash.ts";
import { cpuOrt } from "../../src/node/cpu-ort.ts";
import { returnFreedMemory } from "../../src/node/freed-memory.ts";
import { openCheckpoint } from "../../src/node/open-checkpoint.ts";
import { readTextFile, shippedText, textWindows } from "../../src/node/text-windows.ts";
import { loadTokenizer } from "../../src/tokenizer/hf-tokenizer.ts";
import type { Tokenizer } from "../../src/tokenizer/tokenizer.ts";

const { values: flags, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    calibrate: { type: "string" },
    test: { type: "string" },
    recipes: { type: "string", default: "rtn:symmetric,rtn,hqq,awq,gptq,fast,default" },
    windows: { type: "string", default: "64" },
    "test-windows": { type: "string", default: "64" },
    "sequence-length": { type: "string", default: "512" },
    head: { type: "boolean", default: false },
    json: { type: "boolean", default: false },
    keep: { type: "string" },
    python: { type: "string" },
    peers: { type: "string", default: "" },
  },
});

interface Cost {
  readonly bitsPerWeight: number;
  readonly cpuSeconds: number;
  readonly wallSeconds: number;
  readonly peakMB: number;
}

interface Row extends Cost {
  readonly recipe: string;
  /** By test text. */
  readonly scores: readonly (Drift & { readonly text: string })[];
}

/** "gptq:bits=3:symmetric:learned.steps=60" -> the preset or method, and what is changed in it. */
function recipeOf(text: string): Recipe {
  const [name, ...settings] = text.split(":");
  const entries = settings.map((setting): [string, string | number | boolean] => {
    const [key, value] = setting.split("=");
    return [key, value === undefined ? true : Number.isNaN(Number(value)) ? value : Number(value)];
  });
  const { prune: before, sparsity = 0.5, ...others } = Object.fromEntries(entries);
  const isPruner = (PRUNERS as readonly string[]).includes(name);
  const pruning = {
    method: (isPruner ? name : before) as Pruning["method"],
    sparsity: parseSparsity(String(sparsity).replace("of", ":")),
  };
  const options = { ...others, ...(before && { prune: pruning }) } as MethodOptions;
  const known = isPruner
    ? prune(pruning)
    : (PRESETS as readonly string[]).includes(name)
      ? preset(name as never, options)
      : (METHODS as readonly string[]).includes(name)
        ? method(name as never, options)
        : undefined;
  if (!known) {
    const names = [...PRESETS, ...METHODS, ...PRUNERS];
    throw new Error(`${name} is no preset, method or pruner: ${names.join(", ")}`);
  }
  const recipe = structuredClone(known) as unknown as Record<string, unknown>;
  for (const [path, value] of Object.entries(others)) {
    const keys = path.split(".");
    const last = keys.pop()!;
    const at = keys.reduce((object, key) => object[key] as Record<string, unknown>, recipe);
    if (last in at) at[last] = value;
  }
  return recipe as unknown as Recipe;
}

/** Codes, scales (and a factor a row, where they are codes themselves), zero points at the code's width; 16 where all is float. */
function bitsPerWeight(matrices: Iterable<StoredMatrix>): number {
  let sum = 0;
  let weights = 0;
  for (const { rows, cols, bits, groupSize, symmetric, scaleBits } of matrices) {
    const groups = rows * Math.ceil(cols / groupSize);
    sum += rows * cols * bits + groups * (scaleBits + (symmetric ? 0 : bits)) + (scaleBits < 16 ? 16 * rows : 0);
    weights += rows * cols;
  }
  return weights === 0 ? 16 : sum / weights;
}

const ort = cpuOrt();
const [folder] = positionals;
const sequenceLength = Number(flags["sequence-length"]);

/** The first windows of a text, the protocol of the peers' table. */
function firstWindows(model: Model, file: string, count: number): number[][] {
  const texts = [readFileSync(file, "utf8")];
  return tokenWindows(tokenizerOf(model), { texts, sequenceLength, windows: Number.MAX_SAFE_INTEGER }).slice(0, count);
}

function tokenizerOf({ checkpoint: { sideFiles, config } }: Model): Tokenizer {
  return loadTokenizer(sideFiles, { config });
}

/** At most --windows. */
async function calibrationOf(model: Model, count: number): Promise<readonly (readonly number[])[]> {
  const { calibrate } = flags;
  if (calibrate && extname(calibrate) !== ".jsonl") return firstWindows(model, calibrate, count);
  const tokenizer = tokenizerOf(model);
  const text = await (calibrate ? readTextFile(calibrate, tokenizer) : shippedText(tokenizer));
  return textWindows(model.checkpoint, tokenizer, text, count).calibration;
}

/** What the float model makes of the windows, from --keep where it is there. */
async function referenceStates(model: Model, windows: readonly number[][]): Promise<readonly Hidden[] | undefined> {
  if (!flags.keep) return undefined;
  const key = sha256Hex(new TextEncoder().encode(JSON.stringify([resolve(folder), windows])));
  const file = join(flags.keep, `${key.slice(0, 16)}.f32`);
  const size = sequenceLength * model.config.hiddenSize;
  if (existsSync(file)) {
    const { buffer, byteOffset, byteLength } = readFileSync(file);
    const all = new Float32Array(buffer.slice(byteOffset, byteOffset + byteLength));
    return windows.map((_, i) => all.subarray(i * size, (i + 1) * size));
  }
  const states = await finalStates(ort, model, floatWeights(model.checkpoint), windows);
  const all = new Float32Array(windows.length * size);
  for (const [i, state] of states.entries()) all.set(state, i * size);
  mkdirSync(flags.keep, { recursive: true });
  writeFileSync(file, all);
  return states;
}

/** `weights` against the checkpoint's; `model` is another than the checkpoint's where it was turned into other bases. */
async function score(recipe: string, cost: Cost, model: Model, isTurned: boolean, weights: Weights): Promise<Row> {
  const scores: Row["scores"][number][] = [];
  for (const file of flags.test!.split(",")) {
    const test = firstWindows(model, file, Number(flags["test-windows"]));
    const states = isTurned ? undefined : await referenceStates(model, test);
    const reference = floatWeights(model.checkpoint);
    const drift = await measureDrift(ort, model, reference, weights, test, { referenceStates: states });
    scores.push({ text: basename(file), ...drift });
  }
  return { recipe, ...cost, scores };
}

async function measure(name: string): Promise<Row> {
  const model = resolveModel(await openCheckpoint(folder));
  const asked = recipeOf(name);
  const recipe = { ...asked, head: flags.head ? asked.head : undefined };
  const count = Math.min(windowsOf(recipe), Number(flags.windows));
  const text = count > 0 ? await calibrationOf(model, count) : [];
  await returnFreedMemory(); // as `nibble quantize` does
  const products = ortProducts(ort);
  const cpu = process.cpuUsage();
  const started = performance.now();
  const quantized = await quantizeModel(model, recipe, text, { ort, products });
  const wallSeconds = (performance.now() - started) / 1000;
  const { user, system } = process.cpuUsage(cpu);
  const cost = {
    bitsPerWeight: bitsPerWeight(quantized.matrices.values()),
    cpuSeconds: (user + system) / 1e6,
    wallSeconds,
    peakMB: process.resourceUsage().maxRSS / 1024,
  };
  await products.dispose();
  const row = await score(name, cost, quantized.model, quantized.model !== model, quantized.dequantized);
  await model.checkpoint.dispose();
  return row;
}

/** "gptqmodel:symmetric:groupSize=128" by the toolkit of that name. */
async function measurePeer(name: string): Promise<Row> {
  const model = resolveModel(await openCheckpoint(folder));
  const [peer, ...settings] = name.split(":");
  const { bits, groupSize, symmetric } = recipeOf(["rtn", ...settings].join(":"));
  const windows = await calibrationOf(model, Number(flags.windows));
  const out = mkdtempSync(join(tmpdir(), "nibble-peer-"));
  try {
    const script = fileURLToPath(new URL("quantizer_peers.py", import.meta.url));
    const job = { peer, checkpoint: resolve(folder), out, bits, groupSize, symmetric, windows };
    const child = spawnSync(flags.python!, [script], {
      encoding: "utf8",
      input: JSON.stringify(job),
      stdio: ["pipe", "pipe", "inherit"],
    });
    if (child.status !== 0) throw new Error(`${name}: exit ${child.status}`);
    const { version, ...cost } = JSON.parse(child.stdout.trim().split("\n").at(-1)!);
    for (const file of readdirSync(folder)) {
      if (!/^(model|pytorch_model).*\.(safetensors|bin|json)$/.test(file) && file !== "config.json") {
        cpSync(join(folder, file), join(out, file), { recursive: true });
      }
    }
    const made = resolveModel(await openCheckpoint(out));
    const row = await score(`${name} ${version}`, cost, model, false, floatWeights(made.checkpoint));
    await Promise.all([model.checkpoint.dispose(), made.checkpoint.dispose()]);
    return row;
  } finally {
    rmSync(out, { recursive: true });
  }
}

const names = flags.recipes.split(",").filter((name) => name !== "");
const peers = flags.peers.split(",").filter((name) => name !== "");
if (!folder || !flags.test || (peers.length > 0 && !flags.python)) {
  console.error(
    "usage: quantizers.ts <checkpoint folder> --test FILE [--calibrate FILE] [--recipes ...] [--python ... --peers ...]",
  );
  process.exit(2);
}
if (names.length + peers.length === 1 && flags.json) {
  console.log(JSON.stringify(names.length === 1 ? await measure(names[0]) : await measurePeer(peers[0])));
} else {
  console.log("| recipe | bits/w | text | PPL (float) | KL | top-1 | CPU s | wall s | peak MB |");
  console.log("| --- | --- | --- | --- | --- | --- | --- | --- | --- |");
  const keep = flags.keep ?? mkdtempSync(join(tmpdir(), "nibble-states-"));
  const chosen = ["--recipes", "--peers", "--keep"];
  const others = process.argv.slice(2).filter((arg, i, all) => !chosen.includes(arg) && !chosen.includes(all[i - 1]));
  const runs = [
    ...names.map((name) => ["--recipes", name, "--peers", ""]),
    ...peers.map((name) => ["--recipes", "", "--peers", name]),
  ];
  const script = fileURLToPath(import.meta.url);
  for (const run of runs) {
    const args = [...process.execArgv, script, ...others, ...run, "--keep", keep, "--json"];
    const child = spawnSync(process.execPath, args, { encoding: "utf8", stdio: ["ignore", "pipe", "inherit"] });
    if (child.status !== 0) throw new Error(`${run.join(" ")}: exit ${child.status}`);
    const row: Row = JSON.parse(child.stdout.trim().split("\n").at(-1)!);
    for (const { text, perplexity, perplexityReference, kl, top1 } of row.scores) {
      const cells = [
        row.recipe,
        row.bitsPerWeight.toFixed(3),
        text,
        `${perplexity.toFixed(2)} (${perplexityReference.toFixed(2)})`,
        kl.mean.toFixed(4),
        top1.toFixed(3),
        row.cpuSeconds.toFixed(0),
        row.wallSeconds.toFixed(0),
        row.peakMB.toFixed(0),
      ];
      console.log(`| ${cells.join(" | ")} |`);
    }
  }
  if (!flags.keep) rmSync(keep, { recursive: true });
}
