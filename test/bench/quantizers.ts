/**
 * What each recipe costs and loses on one checkpoint, as a table in Markdown: mean KL to the float model, perplexity,
 * top-1 agreement, CPU and wall seconds of quantizing, peak memory. Decoder linears only unless --head.
 *   npx tsx test/bench/quantizers.ts <checkpoint folder> --calibrate FILE --test FILE [--recipes default,rtn:symmetric,...]
 *     [--windows 64] [--test-windows 64] [--head] [--json]
 * A recipe is a method or preset with settings after colons: gptq:bits=3:groupSize=64:symmetric:asymmetry=0.5.
 * Each recipe runs in a process of its own, so that peak memory is its own.
 */
import { spawnSync } from "node:child_process";
import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { tokenWindows } from "../../quant/calibrate.ts";
import { ortProducts } from "../../quant/products.ts";
import { quantizeModel } from "../../quant/quantize.ts";
import { METHODS, type MethodOptions, method, PRESETS, preset, type Recipe } from "../../quant/recipes.ts";
import { resolveModel } from "../../src/arch/index.ts";
import { floatWeights } from "../../src/arch/weights.ts";
import { measureDrift } from "../../src/eval/drift.ts";
import { cpuOrt } from "../../src/node/cpu-ort.ts";
import { openCheckpoint } from "../../src/node/open-checkpoint.ts";
import { loadTokenizer } from "../../src/tokenizer/hf-tokenizer.ts";

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
  },
});

interface Row {
  readonly recipe: string;
  readonly bitsPerWeight: number;
  readonly perplexity: number;
  readonly perplexityFloat: number;
  readonly kl: number;
  readonly top1: number;
  readonly cpuSeconds: number;
  readonly wallSeconds: number;
  readonly peakMB: number;
}

/** "gptq:bits=3:symmetric" -> a recipe. */
function recipeOf(text: string): Recipe {
  const [name, ...settings] = text.split(":");
  const options = Object.fromEntries(
    settings.map((setting) => {
      const [key, value] = setting.split("=");
      return [key, value === undefined ? true : Number.isNaN(Number(value)) ? value : Number(value)];
    }),
  );
  const known = options as MethodOptions;
  if ((PRESETS as readonly string[]).includes(name)) return { ...preset(name as never, known), ...options };
  if ((METHODS as readonly string[]).includes(name)) return { ...method(name as never, known), ...options };
  throw new Error(`${name} is neither a preset (${PRESETS.join(", ")}) nor a method (${METHODS.join(", ")})`);
}

/** Codes, a float16 scale a group, and a zero point at the code's width where there is one. */
function bitsPerWeight(recipe: Recipe): number {
  const perGroup = 16 + (recipe.symmetric ? 0 : recipe.bits);
  return recipe.bits + (recipe.groupSize === "row" ? 0 : perGroup / recipe.groupSize);
}

async function measure(folder: string, name: string): Promise<Row> {
  const checkpoint = await openCheckpoint(folder);
  const model = resolveModel(checkpoint);
  const tokenizer = loadTokenizer(checkpoint.sideFiles, { config: checkpoint.config });
  const sequenceLength = Number(flags["sequence-length"]);
  /** The first windows of a text, the protocol of the peers' table. */
  const firstWindows = (file: string, count: number) =>
    tokenWindows(tokenizer, {
      texts: [readFileSync(file, "utf8")],
      sequenceLength,
      windows: Number.MAX_SAFE_INTEGER,
    }).slice(0, count);
  const ort = cpuOrt();
  const products = ortProducts(ort);
  const asked = recipeOf(name);
  const recipe = { ...asked, head: flags.head ? asked.head : undefined };
  const calibration = recipe.windows > 0 ? firstWindows(flags.calibrate!, Number(flags.windows)) : [];
  const test = firstWindows(flags.test!, Number(flags["test-windows"]));

  const cpu = process.cpuUsage();
  const started = performance.now();
  const quantized = await quantizeModel(model, recipe, calibration, { ort, products });
  const wallSeconds = (performance.now() - started) / 1000;
  const { user, system } = process.cpuUsage(cpu);
  const peakMB = process.resourceUsage().maxRSS / 1024;
  const drift = await measureDrift(ort, model, floatWeights(model.checkpoint), quantized.dequantized, test);
  return {
    recipe: name,
    bitsPerWeight: bitsPerWeight(recipe),
    perplexity: drift.perplexity,
    perplexityFloat: drift.perplexityReference,
    kl: drift.kl.mean,
    top1: drift.top1,
    cpuSeconds: (user + system) / 1e6,
    wallSeconds,
    peakMB,
  };
}

const [folder] = positionals;
const names = flags.recipes.split(",");
if (!folder || !flags.test) {
  console.error("usage: quantizers.ts <checkpoint folder> --calibrate FILE --test FILE [--recipes ...]");
  process.exit(2);
}
if (names.length === 1 && flags.json) {
  console.log(JSON.stringify(await measure(folder, names[0])));
} else {
  console.log("| recipe | bits/w | PPL (float) | KL | top-1 | CPU s | wall s | peak MB |");
  console.log("| --- | --- | --- | --- | --- | --- | --- | --- |");
  for (const name of names) {
    const others = process.argv.slice(2).filter((arg, i, all) => arg !== "--recipes" && all[i - 1] !== "--recipes");
    const script = fileURLToPath(import.meta.url);
    const child = spawnSync(process.execPath, [...process.execArgv, script, ...others, "--recipes", name, "--json"], {
      encoding: "utf8",
      stdio: ["ignore", "pipe", "inherit"],
    });
    if (child.status !== 0) throw new Error(`${name}: exit ${child.status}`);
    const row: Row = JSON.parse(child.stdout.trim().split("\n").at(-1)!);
    const cells = [
      row.recipe,
      row.bitsPerWeight.toFixed(3),
      `${row.perplexity.toFixed(2)} (${row.perplexityFloat.toFixed(2)})`,
      row.kl.toFixed(4),
      row.top1.toFixed(3),
      row.cpuSeconds.toFixed(0),
      row.wallSeconds.toFixed(0),
      row.peakMB.toFixed(0),
    ];
    console.log(`| ${cells.join(" | ")} |`);
  }
}
