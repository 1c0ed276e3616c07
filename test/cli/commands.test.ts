import { spawn } from "node:child_process";
import { existsSync } from "node:fs";
import { cp, mkdir, mkdtemp, readdir, readFile, rm, truncate, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { sha256Hex } from "../../src/hash.ts";
import { repoPath } from "../helpers.ts";
import { type CommandResult, nibble, type RunOptions } from "./nibble.ts";

const stories = repoPath("models", "stories260k");
let folder: string;
const run = (args: readonly string[], options: RunOptions = {}): Promise<CommandResult> =>
  nibble(args, {
    cwd: folder,
    env: { NIBBLE_CACHE: join(folder, "cache"), HF_HUB_CACHE: join(folder, "hub") },
    ...options,
  });

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), "nibble-cli-"));
});
afterAll(async () => {
  await rm(folder, { recursive: true });
});

describe("every command", () => {
  test.each(["quantize", "export", "inspect", "chat", "serve", "eval", "list", "rm"])(
    "%s has --help and --json",
    async (name) => {
      const { code, stdout } = await run([name, "--help"]);
      expect(code).toBe(0);
      expect(stdout).toContain(`Usage: nibble ${name}`);
      expect(stdout).toContain("--json");
    },
  );

  test("wrong use ends with code 2 and names what is wrong", async () => {
    for (const args of [["frobnicate"], ["list", "--frobnicate"], ["export", stories]]) {
      const { code, stderr } = await run(args);
      expect(code).toBe(2);
      expect(stderr).toMatch(/frobnicate|--output/);
    }
  });
});

test("wrong use with --json is a JSON document too", async () => {
  const { code, stdout } = await run(["quantize", stories, "-o", "never", "--bits", "two", "--json"]);
  expect(code).toBe(2);
  expect(JSON.parse(stdout).error).toMatchObject({ code: "bad_option", message: expect.stringContaining("--bits") });
});

test("what the export would refuse is refused before anything is quantized", async () => {
  const quantize = ["quantize", stories, "-o", "never", "--method", "rtn"];
  for (const flags of [
    ["--dtype", "q4f16", "--kv", "fp32"],
    ["--dtype", "q4f16", "--bits", "8"],
    ["--context", "100000"],
  ]) {
    const { code, stderr } = await run([...quantize, ...flags]);
    expect(code).not.toBe(0);
    expect(stderr).not.toContain("quantize layer");
  }
});

test("export makes a folder that inspect describes, list names and rm deletes", async () => {
  const made = await run(["export", stories, "-o", "f32"]);
  expect(made).toMatchObject({ code: 0 });
  expect(made.stdout).toMatch(/^made f32: onnx\/model\.onnx/);
  const inspected = JSON.parse((await run(["inspect", "f32", "--json", "--context", "100"])).stdout);
  expect(inspected.modelType).toBe("llama");
  const graph = inspected.graphs.find(({ path }: { path: string }) => path === "onnx/model.onnx");
  expect(graph.memory.kvBytes).toBe(graph.kvBytesPerToken * 100);
  const listed = JSON.parse((await run(["list", "--json"])).stdout);
  expect(listed).toMatchObject([{ kind: "made", name: "f32" }]);
  expect((await run(["rm", "f32"])).stdout).toMatch(/^removed f32/);
  expect(existsSync(join(folder, "f32"))).toBe(false);
});

test.each([
  ["3", "6", "onnx/model_q4.onnx"],
  ["5", "8", "onnx/model_int8.onnx"],
])("codes of %s bits and scales of %s are stored so, and answer", async (bits, scaleBits, path) => {
  const flags = [
    "--method",
    "rtn",
    "--group-size",
    "16",
    "--bits",
    bits,
    "--scale-bits",
    scaleBits,
    "--head-bits",
    "3",
  ];
  const made = await run(["quantize", stories, "-o", `w${bits}`, "--kv", "fp32", "--json", ...flags]);
  expect(made).toMatchObject({ code: 0 });
  const { manifest } = JSON.parse(made.stdout);
  expect(manifest).toMatchObject({ graph: path, recipe: { bits: Number(bits), scaleBits: Number(scaleBits) } });
  expect(manifest.measured.graphError).toBeLessThan(1e-4);
  expect(manifest.weights[0]).toMatchObject({ bits: Number(bits), scaleBits: Number(scaleBits), blockSize: 16 });
  const inspected = JSON.parse((await run(["inspect", `w${bits}`, "--json"])).stdout);
  expect(inspected.graphs.find((graph: { path: string }) => graph.path === path).formats).toEqual(manifest.weights);
  const answer = await run(["chat", `w${bits}`, "-p", "Once", "--max-tokens", "8", "--temperature", "0"]);
  expect(answer).toMatchObject({ code: 0 });
  expect(answer.stdout.length).toBeGreaterThan(8);
});

test("a context shorter than the windows of text is measured on what fits, and a template that is not there is named", async () => {
  const flags = ["--method", "rtn", "--dtype", "q4f16", "--context", "128", "--kv", "int8", "--json"];
  const made = await run(["quantize", stories, "-o", "short", ...flags]);
  expect(made).toMatchObject({ code: 0 });
  const { manifest } = JSON.parse(made.stdout);
  expect(manifest).toMatchObject({ contextLength: 128, measured: { drift: { positions: 8 * 127 } } });
  const { code, stderr } = await run(["chat", "short", "-p", "Once", "--chat-template", "none.jinja", "--quiet"]);
  expect([code, stderr]).toEqual([1, "nibble: --chat-template none.jinja does not exist.\n"]);
});

test("scales of 7 bits are refused", async () => {
  const { code, stderr } = await run(["quantize", stories, "-o", "never", "--scale-bits", "7"]);
  expect(code).toBe(2);
  expect(stderr).toContain("use 6, 8, 16");
});

test("export --prune sets half of every four weights to zero and says what that costs", async () => {
  const flags = ["--prune", "sparsegpt", "--sparsity", "2:4"];
  const made = await run(["export", stories, "-o", "pruned", ...flags, "--dtype", "fp16"]);
  expect(made).toMatchObject({ code: 0 });
  expect(made.stdout).toMatch(/mean KL/);
  const manifest = JSON.parse(await readFile(join(folder, "pruned", "nibble.json"), "utf8"));
  expect(manifest.recipe).toMatchObject({ name: "sparsegpt", prune: { sparsity: { n: 2, m: 4 } } });
  const wrong = await run(["quantize", stories, "-o", "never", "--sparsity", "0.5"]);
  expect(wrong).toMatchObject({ code: 2 });
  expect(wrong.stderr).toContain("--prune wanda or sparsegpt");
});

describe("a quantized model", () => {
  beforeAll(async () => {
    const args = ["quantize", stories, "-o", "q4", "--method", "gptq", "--bits", "4", "--json"];
    const { code, stdout, stderr } = await run(args);
    expect(stderr).toBe("");
    expect(code).toBe(0);
    expect(JSON.parse(stdout).manifest.measured.drift.kl.mean).toBeLessThan(0.2);
  });

  test("the same input gives the same bytes, by gptq and by the default preset", async () => {
    await run(["quantize", stories, "-o", "q4-again", "--method", "gptq", "--bits", "4", "--quiet"]);
    for (const name of ["default", "default-again"]) await run(["quantize", stories, "-o", name, "--quiet"]);
    for (const name of ["q4", "default"]) {
      // it holds the hash of every file
      const [first, second] = await Promise.all(
        [name, `${name}-again`].map((each) => readFile(join(folder, each, "nibble.json"))),
      );
      expect(second.equals(first)).toBe(true);
    }
  });

  test("an occupied folder is refused without --force, and not touched", async () => {
    const { code, stderr } = await run(["quantize", stories, "-o", "q4", "--method", "rtn"]);
    expect(code).toBe(2);
    expect(stderr).toContain("--force");
    expect(stderr).not.toContain("quantize layer"); // hours of a large model
    const manifest = JSON.parse(await readFile(join(folder, "q4", "nibble.json"), "utf8"));
    expect(manifest.recipe.name).toBe("gptq");
  });

  test("chat -p and standard input answer alike, greedily", async () => {
    const flags = ["--max-tokens", "24", "--temperature", "0", "--quiet"];
    const asked = await run(["chat", "q4", "-p", "Once upon a time", ...flags]);
    const piped = await run(["chat", "q4", ...flags], { input: "Once upon a time\n" });
    expect(asked.stdout).toMatch(/^, there was a/);
    expect(piped.stdout).toBe(asked.stdout);
    expect(asked.stderr).toBe("");
  });

  test("chat --json says how many tokens and how fast", async () => {
    const { stdout } = await run(["chat", "q4", "-p", "Once upon a time", "--max-tokens", "8", "--json"]);
    const answer = JSON.parse(stdout);
    expect(answer).toMatchObject({ finish: "length", usage: { completionTokens: 8 } });
    expect(answer.tokensPerSecond).toBeGreaterThan(1);
  });

  test.skipIf(process.platform !== "linux")(
    "a terminal gets a conversation with commands (needs script of util-linux)",
    async () => {
      const command = `"${process.execPath}" "${repoPath("bin", "nibble.js")}" chat q4 --max-tokens 8 --temperature 0`;
      const child = spawn("script", ["-qec", command, "/dev/null"], { cwd: folder });
      let shown = "";
      child.stdout.on("data", (bytes) => {
        const before = shown;
        shown += bytes;
        if (!before.includes("> ") && shown.includes("> "))
          child.stdin.write("/help\nOnce upon a time\n/frob\n/exit\n");
      });
      const code = await new Promise((resolve) => child.on("close", resolve));
      expect(shown).toContain("/reset");
      expect(shown).toContain(", there was a");
      expect(shown).toContain("tokens/s");
      expect(shown).toContain("/frob: no such command");
      expect(code).toBe(0);
    },
  );

  test("a context that cannot fit is refused before anything is loaded", async () => {
    const { code, stderr } = await run(["chat", "q4", "-p", "x", "--context", "100000", "--quiet"]);
    expect(code).toBe(2);
    expect(stderr).toMatch(/context of 100000 tokens/);
  });

  test("serve does not start with a key file that holds no key", async () => {
    await writeFile(join(folder, "keys"), "\n");
    const { code, stderr } = await run(["serve", "q4", "--port", "0", "--api-key-file", "keys"]);
    expect([code, stderr]).toEqual([2, expect.stringMatching(/holds no key/)]);
    expect((await run(["serve", "q4", "--api-key-file", "none"])).stderr).toMatch(/--api-key-file none cannot be read/);
  });

  test("serve answers over HTTP beside a broken model, names its address, and ends on SIGINT", async () => {
    await mkdir(join(folder, "broken"), { recursive: true });
    await writeFile(join(folder, "broken", "config.json"), "{");
    const command = ["serve", "q4", "broken", "--port", "0", "--json"];
    const child = spawn(process.execPath, [repoPath("bin", "nibble.js"), ...command], { cwd: folder });
    let stdout = "";
    const started = new Promise<{ api: string }>((resolve, reject) => {
      child.once("close", () => reject(new Error(`serve ended: ${stdout}`)));
      child.stdout.on("data", (bytes) => {
        stdout += bytes;
        if (stdout.trimEnd().endsWith("}")) resolve(JSON.parse(stdout));
      });
    });
    const { api } = await started;
    const response = await fetch(`${api}/completions`, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ model: "q4", prompt: "Once upon a time", max_tokens: 8, temperature: 0 }),
    });
    expect(await response.json()).toMatchObject({ choices: [{ text: expect.stringMatching(/^, there was a/) }] });
    const broken = await fetch(`${api}/completions`, {
      method: "POST",
      body: JSON.stringify({ model: "broken", prompt: "x" }),
    });
    expect([broken.status, (await broken.json()).error.type]).toEqual([503, "server_error"]);
    const { models } = await (await fetch(new URL("/api/tags", api))).json();
    const digest = sha256Hex(await readFile(join(folder, "q4", "nibble.json")));
    expect(models.map((model: { digest: string }) => model.digest)).toEqual([digest, ""]);
    const ended = new Promise((resolve) => child.once("close", resolve));
    child.kill("SIGINT");
    expect(await ended).toBe(0);
  });

  test("eval finds the drift that the export measured, in kind", async () => {
    const { code, stdout } = await run(["eval", "q4", "--against", stories, "--windows", "4", "--json"]);
    expect(code).toBe(0);
    const { kl, perplexity, perplexityReference } = JSON.parse(stdout);
    expect(kl.mean).toBeGreaterThan(0);
    expect(kl.mean).toBeLessThan(0.2);
    expect(perplexity).toBeGreaterThan(perplexityReference);
  });

  test("eval says what it will take, and takes --context, --threads and --device", async () => {
    const flags = ["--windows", "2", "--context", "64", "--threads", "1"];
    const { code, stdout, stderr } = await run(["eval", "q4", "--against", stories, ...flags]);
    expect(code).toBe(0);
    expect(stdout).toMatch(/sequenceLength 64/);
    expect(stderr).toMatch(/q4: memory: .* at 64 tokens\) of .* available/);
    const cached = await run(["eval", "q4", "--kv", "int8", "--device", "webgpu"]);
    expect([cached.code, cached.stderr]).toEqual([1, expect.stringMatching(/on the CPU; leave --device out/)]);
  });
});

test("inspect counts a checkpoint's parameters", async () => {
  const { stdout } = await run(["inspect", stories, "--json"]);
  expect(JSON.parse(stdout)).toMatchObject({ modelType: "llama", parameters: 260_032 });
});

describe("an error is one message and leaves nothing behind", () => {
  const broken = async (name: string, damage: (path: string) => Promise<void>): Promise<string> => {
    const path = join(folder, name);
    await cp(stories, path, { recursive: true });
    await damage(path);
    return path;
  };
  const expectFailure = async (args: readonly string[], message: RegExp): Promise<void> => {
    const before = await readdir(folder);
    const { code, stdout, stderr } = await run(args);
    expect(code).toBeGreaterThan(0);
    expect(stdout).toBe("");
    expect(stderr).toMatch(message);
    expect(stderr).not.toMatch(/\n\s+at /); // no stack
    expect(await readdir(folder)).toEqual(before);
  };

  test("no such checkpoint", () =>
    expectFailure(["export", "./nothing", "-o", "out", "--quiet"], /^nibble: .*nothing/));

  test("truncated weights", async () => {
    const path = await broken("truncated", (at) => truncate(join(at, "model.safetensors"), 500_000));
    await expectFailure(["export", path, "-o", "out", "--quiet"], /^nibble: .*model\.safetensors/);
  });

  test("an unknown family", async () => {
    const path = await broken("unknown", async (at) => {
      const config = JSON.parse(await readFile(join(at, "config.json"), "utf8"));
      await writeFile(join(at, "config.json"), JSON.stringify({ ...config, model_type: "frob" }));
    });
    await expectFailure(["export", path, "-o", "out", "--quiet"], /^nibble: .*"frob".*llama/);
  });

  test("a damaged file of an exported folder", async () => {
    await run(["export", stories, "-o", "damaged", "--no-check", "--quiet"]);
    const at = (name: string) => join(folder, "damaged", name);
    await truncate(at("onnx/model.onnx"), 10_000);
    await expectFailure(["inspect", "damaged"], /^nibble: .*model\.onnx/);
    for (const name of ["config.json", "nibble.json"]) {
      await truncate(at(name), 100);
      await expectFailure(["inspect", "damaged"], new RegExp(`^nibble: .*${name} is no JSON`));
      await expectFailure(["chat", "damaged", "-p", "x", "--quiet"], /^nibble: .*\.json/);
    }
    await expectFailure(["eval", "damaged", "--against", stories], /^nibble: .*nibble\.json is no JSON/);
  });

  test("with --json it is JSON on standard output", async () => {
    const { code, stdout, stderr } = await run(["export", "./nothing", "-o", "out", "--json"]);
    expect(code).toBe(1);
    expect(stderr).toBe("");
    expect(JSON.parse(stdout).error.code).toBe("not_found");
  });
});

test("Ctrl-C in the middle ends with code 130 and no half-made folder", async () => {
  const args = ["quantize", stories, "-o", "interrupted", "--method", "gptq"];
  const { code, stderr } = await run(args, { interruptAt: "quantize layer" });
  expect(stderr).toContain("Ctrl-C");
  expect(code).toBe(130);
  expect((await readdir(folder)).filter((name) => name.startsWith("interrupted"))).toEqual([]);
});

test("a flag that belongs where a model is loaded is refused by its name", async () => {
  const { code, stderr } = await run(["export", stories, "-o", "out", "--kv-policy", "h2o"]);
  expect(code).toBe(1);
  expect(stderr).toContain("--kv-policy: which tokens a cache keeps is chosen where the model is loaded");
});
