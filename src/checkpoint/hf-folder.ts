/**
 * A Hugging Face model folder as a checkpoint: config.json, model.safetensors or its shards, and the small files beside
 * them. Only headers are read here; tensors are read when somebody asks for them.
 */
import { NibbleError } from "../errors.ts";
import { type ByteSource, type FolderSource, readAll, readText } from "../files.ts";
import { type FloatTensor, sizeOf } from "../tensor/dtypes.ts";
import { checkShapes } from "./check-shapes.ts";
import type { Checkpoint, SourceFile, TensorInfo } from "./checkpoint.ts";
import { isJsonObject, type JsonObject, parseJsonObject } from "./json.ts";
import { checkFinite, checkRows, readFloats, sourceFile } from "./read-floats.ts";
import { readSafetensorsHeader, type SafetensorsTensor } from "./safetensors.ts";
import { textPart } from "./text-part.ts";

/** Files that go along with the weights: tokenizer, template, defaults of sampling, licence. */
export const SIDE_FILES =
  /^((tokenizer|tokenizer_config|generation_config|special_tokens_map|added_tokens|vocab|chat_template)\.json|chat_template\.jinja|tokenizer\.model|merges\.txt|LICEN[CS]E(\.\w+)?|NOTICE(\.\w+)?|(additional_)?chat_templates?\/[\w.-]+\.jinja)$/;
/** gemma3's tokenizer.json has 33 MB. */
const MAX_SIDE_FILE_BYTES = 128 * 2 ** 20;

const SINGLE = "model.safetensors";
const INDEX = "model.safetensors.index.json";

/** Opens a Hugging Face folder; errors: `not_found`, `bad_file`, `bad_config`, `unsupported`. */
export async function openHfFolder(folder: FolderSource, name = folder.name): Promise<Checkpoint> {
  const files = await folder.list();
  const stored = await readConfig(folder, files);
  const opened: ByteSource[] = [];
  try {
    const shards = await openShards(folder, files, opened);
    const tensors = new Map<string, StoredTensor>();
    for (const { source, entries } of shards)
      for (const entry of entries) tensors.set(entry.name, { ...entry, source });
    const text = textPart(stored, tensors, name);
    const readers = floatReaders(name, text.tensors);
    checkShapes(text.config, readers.tensors, name);
    const config = await readSource(folder, "config.json");
    const sideFiles = await readSideFiles(folder, files);
    return {
      ...readers,
      name,
      config: text.config,
      sideFiles,
      sources: [config, ...shards.map(({ path, source }) => sourceFile(path, source))],
      notes: [...text.notes, ...tokenizerNote(sideFiles)],
      dispose: async () => {
        await Promise.all(opened.map((source) => source.close?.()));
      },
    };
  } catch (error) {
    await Promise.all(opened.map((source) => source.close?.()));
    throw error;
  }
}

function tokenizerNote(sideFiles: ReadonlyMap<string, Uint8Array>): string[] {
  if (sideFiles.has("tokenizer.json") || !sideFiles.has("tokenizer.model")) return [];
  return ["Its tokenizer is only there as tokenizer.model; export and chat need a tokenizer.json."];
}

/** A tensor's place in one of the files. */
export interface StoredTensor extends SafetensorsTensor {
  readonly source: ByteSource;
}

/** The reading half of a checkpoint whose tensors lie in safetensors files, by the names they are to have. */
export function floatReaders(
  where: string,
  stored: ReadonlyMap<string, StoredTensor>,
): Pick<Checkpoint, "tensors" | "readTensor" | "readRows"> {
  const tensors = new Map<string, TensorInfo>();
  for (const [name, { dtype, shape }] of stored) tensors.set(name, { name, storedAs: dtype, shape });
  const rows = async (name: string, start: number, end: number, shape: readonly number[]): Promise<FloatTensor> => {
    const { source, offset, dtype } = stored.get(name)!;
    const rowLength = shape.slice(1).reduce((product, dim) => product * dim, 1);
    const at = offset + start * rowLength * sizeOf[dtype];
    const data = await readFloats(source, at, dtype, (end - start) * rowLength);
    checkFinite(data, where, name);
    return { shape: [end - start, ...shape.slice(1)], data };
  };
  const infoOf = (name: string): TensorInfo => {
    const info = tensors.get(name);
    if (info) return info;
    throw new NibbleError("not_found", `${where} has no tensor "${name}".`, { param: name });
  };
  return {
    tensors,
    readTensor: async (name) => {
      const { shape } = infoOf(name);
      if (shape.length > 0) return rows(name, 0, shape[0], shape);
      return { shape, data: (await rows(name, 0, 1, [1])).data }; // a scalar
    },
    readRows: async (name, start, end) => {
      const { shape } = infoOf(name);
      checkRows(shape, start, end, where, name);
      return rows(name, start, end, shape);
    },
  };
}

async function readConfig(folder: FolderSource, files: readonly string[]): Promise<JsonObject> {
  if (!files.includes("config.json")) {
    const found = files.length === 0 ? "it is empty" : `it holds ${files.slice(0, 8).join(", ")}`;
    const hint = files.includes("adapter_config.json")
      ? "This is a LoRA adapter: name its base model, and give this folder as --adapter."
      : "A Hugging Face folder has config.json and model.safetensors.";
    throw new NibbleError("not_found", `${folder.name} has no config.json (${found}). ${hint}`);
  }
  const config = parseJsonObject(await readText(folder, "config.json"), `${folder.name}/config.json`);
  const quantization = config.quantization_config;
  if (isJsonObject(quantization)) {
    throw new NibbleError(
      "unsupported",
      `${folder.name} is quantized already (quantization_config: ${quantization.quant_method ?? "unnamed"}); ` +
        "start from the float checkpoint it was made of, or from a GGUF.",
      { param: "quantization_config" },
    );
  }
  return config;
}

interface Shard {
  readonly path: string;
  readonly source: ByteSource;
  readonly entries: readonly SafetensorsTensor[];
}

async function openShards(folder: FolderSource, files: readonly string[], opened: ByteSource[]): Promise<Shard[]> {
  const open = async (path: string): Promise<Shard> => {
    const source = await folder.open(path);
    opened.push(source);
    return { path, source, entries: [...(await readSafetensorsHeader(source)).tensors.values()] };
  };
  if (files.includes(SINGLE)) return [await open(SINGLE)]; // transformers' order
  if (files.includes(INDEX)) return openIndexed(folder, files, open);

  const numbered = files.filter((path) => /^[^/]*-\d+-of-\d+\.safetensors$/.test(path));
  const others = files.filter((path) => /^[^/]+\.safetensors$/.test(path) && !/^(adapter_|consolidated)/.test(path));
  const paths = numbered.length > 0 ? numbered : others.length === 1 ? others : [];
  if (paths.length === 0) throw noWeights(folder, files);
  requireAllParts(folder, numbered);
  const shards: Shard[] = [];
  const homes = new Map<string, string>();
  for (const path of paths) {
    const shard = await open(path);
    for (const { name } of shard.entries) {
      const home = homes.get(name);
      if (home) {
        throw new NibbleError("bad_file", `${folder.name}: ${home} and ${path} both hold tensor "${name}".`);
      }
      homes.set(name, path);
    }
    shards.push(shard);
  }
  return shards;
}

/** model.safetensors.index.json says which file holds which tensor. */
async function openIndexed(
  folder: FolderSource,
  files: readonly string[],
  open: (path: string) => Promise<Shard>,
): Promise<Shard[]> {
  const where = `${folder.name}/${INDEX}`;
  const { weight_map: map } = parseJsonObject(await readText(folder, INDEX), where);
  if (!isJsonObject(map) || !Object.values(map).every((path) => typeof path === "string")) {
    throw new NibbleError("bad_file", `${where}: its weight_map is no map from tensor names to files.`);
  }
  const namesByPath = new Map<string, Set<string>>();
  for (const [name, path] of Object.entries(map as Record<string, string>)) {
    namesByPath.set(path, (namesByPath.get(path) ?? new Set()).add(name));
  }
  const missing = [...namesByPath.keys()].filter((path) => !files.includes(path));
  if (missing.length > 0) {
    throw new NibbleError(
      "not_found",
      `${folder.name}: ${missing.length} of the ${namesByPath.size} shards that ${INDEX} names are not there: ` +
        `${missing.slice(0, 5).join(", ")}${missing.length > 5 ? ", ..." : ""}. Download them too.`,
    );
  }
  const shards: Shard[] = [];
  for (const [path, names] of [...namesByPath].sort(([a], [b]) => (a < b ? -1 : 1))) {
    const shard = await open(path);
    const entries = shard.entries.filter(({ name }) => names.delete(name));
    const [absent] = names;
    if (absent !== undefined) {
      throw new NibbleError(
        "bad_file",
        `${folder.name}: ${INDEX} says that ${path} holds "${absent}", but it does not.`,
      );
    }
    shards.push({ ...shard, entries });
  }
  return shards;
}

/** Shards without an index: "-00002-of-00003" tells how many there have to be. */
function requireAllParts(folder: FolderSource, numbered: readonly string[]): void {
  if (numbered.length === 0) return;
  const wanted = Number(/-of-(\d+)\.safetensors$/.exec(numbered[0])?.[1]);
  if (numbered.length === wanted) return;
  throw new NibbleError(
    "not_found",
    `${folder.name}: ${numbered.length} of ${wanted} shards are there (${numbered.join(", ")}). Download the others too.`,
  );
}

function noWeights(folder: FolderSource, files: readonly string[]): NibbleError {
  const pickled = files.find((path) => /\.(bin|pt|pth|ckpt)$/.test(path));
  if (files.some((path) => path.startsWith("onnx/"))) {
    return new NibbleError(
      "unsupported",
      `${folder.name} holds an exported ONNX model, not a checkpoint; chat, serve and eval take it as it is.`,
    );
  }
  if (files.includes("consolidated.safetensors")) {
    return new NibbleError(
      "unsupported",
      `${folder.name} has consolidated.safetensors, Mistral's own layout; download the repository's model*.safetensors.`,
    );
  }
  if (pickled) {
    return new NibbleError(
      "unsupported",
      `${folder.name} has its weights in ${pickled}, a pickle, which can run code when it is opened. ` +
        "Convert it: https://huggingface.co/spaces/safetensors/convert, or save_pretrained() of transformers.",
    );
  }
  return new NibbleError("not_found", `${folder.name} has a config.json, but no ${SINGLE} and no ${INDEX}.`);
}

async function readSource(folder: FolderSource, path: string): Promise<SourceFile> {
  const source = await folder.open(path);
  const { sizeBytes } = source;
  await source.close?.();
  return {
    name: path,
    sizeBytes,
    sha256: async () => {
      const again = await folder.open(path);
      try {
        return await sourceFile(path, again).sha256();
      } finally {
        await again.close?.();
      }
    },
  };
}

/** Tokenizer, template and licence, as bytes. */
export async function readSideFiles(folder: FolderSource, files: readonly string[]): Promise<Map<string, Uint8Array>> {
  const sideFiles = new Map<string, Uint8Array>();
  for (const path of files.filter((file) => SIDE_FILES.test(file))) {
    const source = await folder.open(path);
    try {
      if (source.sizeBytes > MAX_SIDE_FILE_BYTES) {
        throw new NibbleError(
          "bad_file",
          `${source.name} has ${source.sizeBytes} bytes; a file of that name stays below ${MAX_SIDE_FILE_BYTES}.`,
        );
      }
      sideFiles.set(path, await readAll(source));
    } finally {
      await source.close?.();
    }
  }
  return sideFiles;
}
