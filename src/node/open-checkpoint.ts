/** One name to a checkpoint: a folder or a file on disk, or a model of the Hugging Face hub. */
import { stat } from "node:fs/promises";
import { basename, dirname, join } from "node:path";
import type { Checkpoint } from "../checkpoint/checkpoint.ts";
import { openGgufCheckpoint } from "../checkpoint/gguf-checkpoint.ts";
import { openHfFolder } from "../checkpoint/hf-folder.ts";
import { openLlama2c } from "../checkpoint/llama2c.ts";
import { withAdapter } from "../checkpoint/lora.ts";
import { NibbleError } from "../errors.ts";
import type { ByteSource, FolderSource } from "../files.ts";
import type { OnProgress } from "../progress.ts";
import { tokenizerFilesFromGguf } from "../tokenizer/from-gguf.ts";
import { isFile, nodeFile, nodeFolder } from "./files.ts";
import { downloadModel, parseHubId } from "./hub.ts";
import { withParts } from "./hub-files.ts";

export interface OpenCheckpointOptions {
  /** A LoRA adapter in PEFT's format, merged as the weights are read: a folder or a hub id. */
  readonly adapter?: string;
  /** Branch, tag or commit of a hub id; `org/name@revision` says the same. */
  readonly revision?: string;
  /** For gated and private models; default: HF_TOKEN, or what `hf auth login` stored. */
  readonly token?: string;
  readonly onProgress?: OnProgress;
  readonly signal?: AbortSignal;
}

const POSSIBLE =
  "a Hugging Face folder, a .safetensors file with its config.json beside it, a .gguf, a llama2.c .bin, or a hub id (org/name[@revision], org/name/file.gguf)";

/** Opens a Hugging Face folder, .safetensors, .gguf, llama2.c .bin or a hub id (`org/name[@revision]`). */
export async function openCheckpoint(spec: string, options: OpenCheckpointOptions = {}): Promise<Checkpoint> {
  const base = await openBase(spec, options);
  if (options.adapter === undefined) return base;
  try {
    const { token, onProgress, signal } = options;
    return await withAdapter(base, nodeFolder(await adapterFolder(options.adapter, { token, onProgress, signal })));
  } catch (error) {
    await base.dispose();
    throw error;
  }
}

async function openBase(spec: string, options: OpenCheckpointOptions): Promise<Checkpoint> {
  const info = await stat(spec).catch(() => undefined);
  if (info && options.revision) {
    throw new NibbleError("bad_option", `${spec} is on this disk; --revision is for hub ids.`, { param: "revision" });
  }
  if (info?.isDirectory()) return openFolder(spec);
  if (info) return openFile(spec);
  if (parseHubId(spec) === undefined || /^[.~/]|\\/.test(spec)) {
    throw new NibbleError("not_found", `${spec} does not exist. A checkpoint is ${POSSIBLE}.`);
  }
  const { folder, files, notes } = await downloadModel(spec, options).catch((error) =>
    Promise.reject(notHere(spec, error)),
  );
  const gguf = files.find((path) => path.endsWith(".gguf"));
  const checkpoint = await (gguf ? openGguf(join(folder, gguf), spec) : openHfFolder(nodeFolder(folder), spec));
  return { ...checkpoint, notes: [...checkpoint.notes, ...notes] };
}

/** A mistyped path looks like a hub id: the message says that it was taken for one. */
function notHere(spec: string, error: unknown): unknown {
  if (!(error instanceof NibbleError) || (error.code !== "not_found" && error.code !== "network")) return error;
  const message = `There is no file or folder ${spec} here, and as a model of the hub: ${error.message}`;
  return new NibbleError(error.code, message, { cause: error, param: error.param });
}

async function openFolder(path: string): Promise<Checkpoint> {
  const folder = nodeFolder(path);
  if (await folder.has("config.json")) return openHfFolder(folder);
  const files = (await folder.list()).filter((file) => !file.includes("/"));
  const ggufs = files.filter((file) => file.endsWith(".gguf") && withParts(file)[0] === file);
  if (ggufs.length === 1) return openGguf(join(path, ggufs[0]));
  if (ggufs.length > 1)
    throw new NibbleError("bad_option", `${path} holds several GGUF files; name one: ${ggufs.join(", ")}.`);
  return openHfFolder(folder); // says what is missing
}

async function openFile(path: string): Promise<Checkpoint> {
  const source = await nodeFile(path);
  const start = source.sizeBytes >= 4 ? await source.read(0, 4) : new Uint8Array();
  const isGguf = new TextDecoder().decode(start) === "GGUF";
  if (isGguf || path.endsWith(".gguf")) {
    await source.close?.();
    return openGguf(path);
  }
  if (path.endsWith(".safetensors")) {
    await source.close?.();
    return openHfFolder(folderAround(path), path);
  }
  if (path.endsWith(".bin")) return openBin(source, dirname(path));
  await source.close?.();
  throw new NibbleError("unsupported", `${path} is no checkpoint that Nibble reads: ${POSSIBLE}.`);
}

/** The folder of a weights file; where the file is not one of the usual names, without the others. */
function folderAround(path: string): FolderSource {
  const folder = nodeFolder(dirname(path));
  const name = basename(path);
  if (name === "model.safetensors" || /-\d+-of-\d+\.safetensors$/.test(name)) return folder;
  const isOther = (file: string) => /\.safetensors(\.index\.json)?$/.test(file) && file !== name;
  return { ...folder, list: async () => (await folder.list()).filter((file) => !isOther(file)) };
}

/** A GGUF, with all its parts where it is split. */
async function openGguf(path: string, name = path): Promise<Checkpoint> {
  const sources: ByteSource[] = [];
  try {
    for (const part of withParts(basename(path))) sources.push(await nodeFile(join(dirname(path), part)));
    return await openGgufCheckpoint(sources, tokenizerFilesFromGguf, name);
  } catch (error) {
    await Promise.all(sources.map((source) => source.close?.()));
    throw error;
  }
}

/** llama2.c's tokenizer has no fixed name: tok<vocabulary>.bin or tokenizer.bin. */
async function openBin(source: ByteSource, folder: string): Promise<Checkpoint> {
  let tokenizer: ByteSource | undefined;
  try {
    const header = source.sizeBytes >= 36 ? await source.read(0, 36) : new Uint8Array(36);
    const view = new DataView(header.buffer, header.byteOffset, 36);
    const vocabSize = Math.abs(view.getInt32(view.getUint32(0, true) === 0x616b3432 ? 28 : 20, true));
    const candidates = [`tok${vocabSize}.bin`, "tokenizer.bin"].map((name) => join(folder, name));
    for (const path of candidates) if (!tokenizer && (await isFile(path))) tokenizer = await nodeFile(path);
    return await openLlama2c(source, tokenizer);
  } catch (error) {
    await Promise.all([source.close?.(), tokenizer?.close?.()]);
    throw error;
  }
}

async function adapterFolder(spec: string, options: Omit<OpenCheckpointOptions, "adapter">): Promise<string> {
  const info = await stat(spec).catch(() => undefined);
  if (info?.isDirectory()) return spec;
  if (info) return dirname(spec); // its adapter_model.safetensors was named
  if (parseHubId(spec) && !/^[.~/]|\\/.test(spec)) return (await downloadModel(spec, options)).folder;
  throw new NibbleError("not_found", `${spec} does not exist. An adapter is a folder in PEFT's format or a hub id.`, {
    param: "adapter",
  });
}
