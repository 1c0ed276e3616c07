/**
 * The most memory that `nibble quantize` takes, the whole command in a process of its own: on a checkpoint, or on one of
 * random weights that is made for it, by default of the shape of Llama 3.2 1B.
 *   npx tsx test/bench/memory.ts [CHECKPOINT] [--layers 16] [--hidden 2048] [--intermediate 8192] [--heads 32]
 *     [--kv-heads 8] [--vocabulary 128256] [--shards 3] [--windows 24] [--keep DIR] [-- flags of nibble quantize]
 * Random weights are no language model, so a run on them ends with the verdict of the last check, after everything that
 * takes memory. Their tokenizer is the embedded model's: ids above 512 occur in no text.
 */
import { spawn } from "node:child_process";
import { readdirSync, readFileSync } from "node:fs";
import { copyFile, mkdir, mkdtemp, open, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { type TensorToWrite, writeSafetensors } from "../../src/checkpoint/safetensors.ts";
import { Random } from "../../src/runtime/random.ts";

const separator = process.argv.indexOf("--");
const [own, passed] =
  separator < 0 ? [process.argv.slice(2), []] : [process.argv.slice(2, separator), process.argv.slice(separator + 1)];
const { values: flags, positionals } = parseArgs({
  args: own,
  allowPositionals: true,
  options: {
    layers: { type: "string", default: "16" },
    hidden: { type: "string", default: "2048" },
    intermediate: { type: "string", default: "8192" },
    heads: { type: "string", default: "32" },
    "kv-heads": { type: "string", default: "8" },
    vocabulary: { type: "string", default: "128256" },
    shards: { type: "string", default: "3" },
    windows: { type: "string" },
    keep: { type: "string" },
  },
});
const root = fileURLToPath(new URL("../..", import.meta.url));
const stories = join(root, "models/stories260k");

/** bfloat16 of either sign, 2^-8 to 2^-5: about what a trained layer's weights are. */
const POOL = ((): Uint16Array => {
  const random = new Random(1);
  return Uint16Array.from({ length: 2 ** 22 }, () => {
    const bits = Math.floor(random.uniform() * 2 ** 16);
    return (bits & 0x8000) | ((119 + ((bits >> 8) % 3)) << 7) | (bits & 0x7f);
  });
})();

/** The pool again and again, from another place for each tensor; gains are 1. */
function bytesOf(name: string, shape: readonly number[], index: number): Uint8Array {
  const values = new Uint16Array(shape.reduce((product, dim) => product * dim, 1));
  if (name.includes("norm")) return new Uint8Array(values.fill(0x3f80).buffer);
  for (let at = 0, from = (index * 7919) % POOL.length; at < values.length; from = 0) {
    const piece = POOL.subarray(from, from + values.length - at);
    values.set(piece, at);
    at += piece.length;
  }
  return new Uint8Array(values.buffer);
}

/** Writes it tensor by tensor; returns how many parameters it has. */
async function makeCheckpoint(folder: string): Promise<number> {
  const [layers, hidden, intermediate, heads, kvHeads, vocabulary, shards] = [
    flags.layers,
    flags.hidden,
    flags.intermediate,
    flags.heads,
    flags["kv-heads"],
    flags.vocabulary,
    flags.shards,
  ].map(Number);
  const kvRows = (kvHeads * hidden) / heads;
  const shapes: [string, number[]][] = [["model.embed_tokens.weight", [vocabulary, hidden]]];
  for (let layer = 0; layer < layers; layer++) {
    const at = `model.layers.${layer}`;
    shapes.push(
      [`${at}.input_layernorm.weight`, [hidden]],
      [`${at}.self_attn.q_proj.weight`, [hidden, hidden]],
      [`${at}.self_attn.k_proj.weight`, [kvRows, hidden]],
      [`${at}.self_attn.v_proj.weight`, [kvRows, hidden]],
      [`${at}.self_attn.o_proj.weight`, [hidden, hidden]],
      [`${at}.post_attention_layernorm.weight`, [hidden]],
      [`${at}.mlp.gate_proj.weight`, [intermediate, hidden]],
      [`${at}.mlp.up_proj.weight`, [intermediate, hidden]],
      [`${at}.mlp.down_proj.weight`, [hidden, intermediate]],
    );
  }
  shapes.push(["model.norm.weight", [hidden]]);
  const tensors = shapes.map(
    ([name, shape], i): TensorToWrite => ({ name, dtype: "bf16", shape, bytes: () => bytesOf(name, shape, i) }),
  );
  await mkdir(folder, { recursive: true });
  const perShard = Math.ceil(tensors.length / shards);
  const weightMap: Record<string, string> = {};
  for (let shard = 0; shard < shards; shard++) {
    const part = tensors.slice(shard * perShard, (shard + 1) * perShard);
    const number = (n: number) => String(n).padStart(5, "0");
    const file = `model-${number(shard + 1)}-of-${number(shards)}.safetensors`;
    const handle = await open(join(folder, file), "w");
    const write = async (bytes: Uint8Array) => void (await handle.writeFile(bytes));
    await writeSafetensors({ write, close: () => handle.close() }, part);
    for (const { name } of part) weightMap[name] = file;
  }
  const config = {
    architectures: ["LlamaForCausalLM"],
    model_type: "llama",
    torch_dtype: "bfloat16",
    hidden_act: "silu",
    hidden_size: hidden,
    intermediate_size: intermediate,
    num_hidden_layers: layers,
    num_attention_heads: heads,
    num_key_value_heads: kvHeads,
    max_position_embeddings: 8192,
    rms_norm_eps: 1e-5,
    rope_theta: 500000,
    tie_word_embeddings: true,
    vocab_size: vocabulary,
    bos_token_id: 1,
    eos_token_id: 2,
  };
  await writeFile(join(folder, "config.json"), JSON.stringify(config));
  await writeFile(join(folder, "model.safetensors.index.json"), JSON.stringify({ weight_map: weightMap }));
  for (const file of ["tokenizer.json", "tokenizer_config.json"])
    await copyFile(join(stories, file), join(folder, file));
  return shapes.reduce((sum, [, shape]) => sum + shape.reduce((product, dim) => product * dim, 1), 0);
}

/** Of one process: resident now, at most, CPU ticks. Linux. */
function usageOf(pid: number): { readonly residentKB: number; readonly ticks: number } {
  try {
    const status = readFileSync(`/proc/${pid}/status`, "utf8");
    const [user, system] = readFileSync(`/proc/${pid}/stat`, "utf8")
      .replace(/^.*\) /, "")
      .split(" ")
      .slice(11, 13);
    return { residentKB: Number(/VmRSS:\s+(\d+)/.exec(status)?.[1] ?? 0), ticks: Number(user) + Number(system) };
  } catch {
    return { residentKB: 0, ticks: 0 }; // it has just ended
  }
}

/** A process and all that it started. */
function treeOf(pid: number): number[] {
  try {
    const tasks = readdirSync(`/proc/${pid}/task`);
    const children = tasks.flatMap((task) =>
      readFileSync(`/proc/${pid}/task/${task}/children`, "utf8").trim().split(" ").filter(Boolean).map(Number),
    );
    return [pid, ...children.flatMap(treeOf)];
  } catch {
    return [];
  }
}

interface Cost {
  readonly peakMB: number;
  readonly wallSeconds: number;
  readonly cpuSeconds: number;
  readonly exitCode: number | null;
  readonly lastLine: string;
}

const SAMPLE_MS = 20;
/** Ticks of /proc a second; Linux has had no other number since 2.4. */
const TICKS = 100;

async function measure(args: readonly string[], cache: string): Promise<Cost> {
  const started = performance.now();
  const child = spawn(process.execPath, [join(root, "bin/nibble.js"), ...args], {
    stdio: ["ignore", "inherit", "pipe"],
    env: { ...process.env, NIBBLE_CACHE: cache },
  });
  let said = "";
  child.stderr.on("data", (data: Buffer) => {
    said = (said + data.toString()).slice(-4096);
  });
  let peakKB = 0;
  const ticks = new Map<number, number>();
  const timer = setInterval(() => {
    let sum = 0;
    for (const pid of treeOf(child.pid!)) {
      const usage = usageOf(pid);
      sum += usage.residentKB;
      if (usage.ticks > 0) ticks.set(pid, usage.ticks);
    }
    peakKB = Math.max(peakKB, sum);
  }, SAMPLE_MS);
  const exitCode = await new Promise<number | null>((resolve) => child.on("close", resolve));
  clearInterval(timer);
  return {
    peakMB: Math.round(peakKB / 1024),
    wallSeconds: Math.round((performance.now() - started) / 1000),
    cpuSeconds: Math.round([...ticks.values()].reduce((sum, count) => sum + count, 0) / TICKS),
    exitCode,
    lastLine: said.trim().split("\n").at(-1) ?? "",
  };
}

/** Characters of the embedded model's sample in a window of its tokens, and a little more. */
const WINDOW_CHARACTERS = 1400;
/** A quarter of a short text is held back. */
const CALIBRATION_SHARE = 0.75;

const place = flags.keep ?? (await mkdtemp(join(tmpdir(), "nibble-memory-")));
await mkdir(place, { recursive: true });
try {
  const made = join(place, "checkpoint");
  const parameters = positionals.length === 0 ? await makeCheckpoint(made) : undefined;
  const text: string[] = [];
  if (flags.windows) {
    const sample = readFileSync(join(stories, "stories-sample.txt"), "utf8");
    const file = join(place, "calibration.txt");
    await writeFile(file, sample.slice(0, (Number(flags.windows) / CALIBRATION_SHARE) * WINDOW_CHARACTERS));
    text.push("--calibration", file);
  }
  const args = ["quantize", positionals[0] ?? made, "--output", join(place, "q4"), "--force", ...text, ...passed];
  const { peakMB, wallSeconds, cpuSeconds, exitCode, lastLine } = await measure(args, join(place, "cache"));
  if (parameters) console.log(`${(parameters / 1e9).toFixed(2)}e9 parameters, ${flags.layers} layers`);
  console.log(`exit ${exitCode}: ${lastLine}`);
  console.log(`peak ${peakMB} MB, ${wallSeconds} s wall, ${cpuSeconds} s CPU`);
} finally {
  if (!flags.keep) await rm(place, { recursive: true });
}
