/** Which files of a hub repository Nibble reads: weights in one format, config and tokenizer, nothing else. */
import { SIDE_FILES } from "../checkpoint/hf-folder.ts";
import { isJsonObject, parseJsonObject } from "../checkpoint/json.ts";
import { NibbleError } from "../errors.ts";
import type { HubFile } from "./hub-download.ts";
import { formatBytes } from "./memory.ts";

export interface Repository {
  readonly name: string;
  readonly list: readonly HubFile[];
  /** A small file of it as text. */
  read(path: string): Promise<string>;
}

const INDEX = "model.safetensors.index.json";

/** The files needed to open the model, or the one GGUF that `wanted` names. */
export async function chooseFiles(repository: Repository, wanted?: string): Promise<HubFile[]> {
  const { name, list } = repository;
  const find = (path: string): HubFile => {
    const file = list.find((entry) => entry.path === path);
    if (file) return file;
    throw new NibbleError("not_found", `${name} has no file ${path}. It has ${ggufs(list) || "no GGUF"}.`);
  };
  if (wanted) return withParts(wanted).map(find);

  const paths = new Set(list.map(({ path }) => path));
  const small = list.filter(({ path }) => path === "config.json" || SIDE_FILES.test(path));
  if (paths.has("adapter_config.json"))
    return [find("adapter_config.json"), find("adapter_model.safetensors"), ...small];
  if (paths.has("model.safetensors")) return [...small, find("model.safetensors")];
  if (paths.has(INDEX)) {
    const { weight_map: map } = parseJsonObject(await repository.read(INDEX), `${name}/${INDEX}`);
    const shards = isJsonObject(map) ? [...new Set(Object.values(map))].sort() : [];
    return [...small, find(INDEX), ...shards.map((path) => find(String(path)))];
  }
  const numbered = list.filter(({ path }) => /^[^/]+-\d+-of-\d+\.safetensors$/.test(path));
  if (numbered.length > 0) return [...small, ...numbered];

  const gguf = list.filter(({ path }) => path.endsWith(".gguf") && !/mmproj/i.test(path));
  const firsts = gguf.filter(({ path }) => !/-\d+-of-\d+\.gguf$/.test(path) || /-0*1-of-\d+\.gguf$/.test(path));
  if (firsts.length === 1) return withParts(firsts[0].path).map(find);
  if (firsts.length > 1) {
    throw new NibbleError(
      "bad_option",
      `${name} holds several GGUF files; name one, as in ${name}/${firsts[0].path}: ${ggufs(list)}.`,
    );
  }
  const pickled = list.find(({ path }) => /\.(bin|pt|pth)$/.test(path));
  const found = pickled
    ? `only ${pickled.path}, a pickle, which can run code when it is opened; ask its owner for safetensors (https://huggingface.co/spaces/safetensors/convert)`
    : `neither model.safetensors nor a GGUF (it has ${[...paths].slice(0, 8).join(", ")})`;
  throw new NibbleError("unsupported", `${name} has ${found}.`);
}

/** A split GGUF is all its parts. */
export function withParts(path: string): string[] {
  const match = /^(.*-)(\d+)-of-(\d+)\.gguf$/.exec(path);
  if (!match) return [path];
  const [, stem, number, count] = match;
  return Array.from({ length: Number(count) }, (_, i) => {
    return `${stem}${String(i + 1).padStart(number.length, "0")}-of-${count}.gguf`;
  });
}

function ggufs(list: readonly HubFile[]): string {
  return list
    .filter(({ path }) => path.endsWith(".gguf"))
    .map(({ path, sizeBytes }) => (sizeBytes > 0 ? `${path} (${formatBytes(sizeBytes)})` : path))
    .join(", ");
}
