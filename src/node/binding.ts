/**
 * Which way to ONNX Runtime an engine takes: the C API where it is known to work here, else onnxruntime-node's own
 * binding. A wrong ABI takes the whole process down, so a child process tries it first, once per version of
 * everything that takes part; the answer is remembered in Nibble's cache folder.
 */
import { spawn } from "node:child_process";
import { existsSync, readFileSync } from "node:fs";
import { mkdir, readFile, rename, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { NibbleError } from "../errors.ts";
import { cacheFolder } from "./cache.ts";
import { moduleEntry } from "./workers.ts";

/** "portable" is onnxruntime-node, "capi" the C API of the same library. */
export type Binding = "portable" | "capi";

/** A model of one node answers in well under a second; a child that hangs is a binding that does not work. */
const PROBE_TIMEOUT_MS = 30_000;

/**
 * The binding to use; errors: `unsupported` where "capi" was asked for and does not work, or WebGPU where there is no
 * adapter for it.
 */
export async function chooseBinding(wish: Binding | undefined, device: "cpu" | "webgpu"): Promise<Binding> {
  if (device === "webgpu") await requireAdapter();
  if (wish === "portable") return "portable";
  const failure = device === "cpu" ? await capiFailure() : "it runs on the CPU only";
  if (failure === undefined) return "capi";
  if (wish === "capi") {
    throw new NibbleError("unsupported", `--binding capi does not work here: ${failure}.`, { param: "binding" });
  }
  return "portable";
}

let adapter: Promise<string | undefined> | undefined;

/** A GPU's driver takes the process down when it fails, so a child tries it; once a process, drivers come and go. */
async function requireAdapter(): Promise<void> {
  adapter ??= probe(new URL("./webgpu-probe.ts", import.meta.url));
  const failure = await adapter;
  if (failure === undefined) return;
  throw new NibbleError(
    "unsupported",
    `--device webgpu: onnxruntime-node finds no GPU that its WebGPU provider can use here (${failure}). --device cpu runs everywhere.`,
    { param: "device" },
  );
}

let probed: Promise<string | undefined> | undefined;

/** Why the C API cannot be used, or undefined where it can. */
function capiFailure(): Promise<string | undefined> {
  probed ??= rememberedProbe();
  return probed;
}

async function rememberedProbe(): Promise<string | undefined> {
  const versions = participants();
  if (typeof versions === "string") return versions;
  const key = versions.join(" ");
  const path = join(cacheFolder(), "capi-probe.json");
  const known = await readFile(path, "utf8").then(
    (text) => JSON.parse(text) as { key?: string; failure?: string },
    () => ({}) as { key?: string; failure?: string },
  );
  if (known.key === key) return known.failure;
  const failure = await probe(new URL("./capi-probe.ts", import.meta.url));
  const partial = `${path}.${process.pid}.partial`;
  try {
    await mkdir(cacheFolder(), { recursive: true });
    await writeFile(partial, JSON.stringify({ key, failure }));
    await rename(partial, path);
  } catch {
    // a cache that cannot be written only costs the next start another probe
  }
  return failure;
}

/** What has to fit together, with versions; a reason where something is not there. */
function participants(): string[] | string {
  const require = createRequire(import.meta.url);
  const versions = [`node ${process.version}`, `${process.platform}-${process.arch}`];
  for (const name of ["onnxruntime-node", "koffi"]) {
    try {
      let folder = dirname(require.resolve(name));
      while (!existsSync(join(folder, "package.json")) && dirname(folder) !== folder) folder = dirname(folder);
      const { version } = JSON.parse(readFileSync(join(folder, "package.json"), "utf8")) as { version?: string };
      versions.push(`${name} ${version}`);
    } catch {
      return `${name} is not installed`;
    }
  }
  return versions;
}

/** Runs a module in a child process; why it failed, or undefined. */
function probe(module: URL): Promise<string | undefined> {
  return new Promise((resolve) => {
    const child = spawn(process.execPath, ["--input-type=module", "--eval", moduleEntry(module)], {
      stdio: ["ignore", "ignore", "pipe"],
      timeout: PROBE_TIMEOUT_MS,
    });
    let errors = "";
    child.stderr.on("data", (data) => (errors += data));
    child.on("error", (error) => resolve(`a child process could not be started (${error.message})`));
    child.on("close", (code, signal) => {
      if (code === 0) resolve(undefined);
      else resolve(`a test run ended with ${signal ?? `exit code ${code}`}${errors ? `: ${lastLine(errors)}` : ""}`);
    });
  });
}

function lastLine(text: string): string {
  const line = text.split("\n").find((candidate) => /Error:/.test(candidate)) ?? text.trim().split("\n").at(-1);
  // of ONNX Runtime's own checks, what follows file, line and condition
  return line?.trim().replace(/^.* was false\. /, "") ?? "";
}
