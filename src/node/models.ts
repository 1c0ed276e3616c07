/** The models on this machine: made by Nibble (a list in its cache folder) and downloaded (the hub's own cache). */
import { mkdir, readdir, readFile, rename, rm, stat, writeFile } from "node:fs/promises";
import { basename, join, resolve } from "node:path";
import { scanCacheDir } from "@huggingface/hub";
import { NibbleError } from "../errors.ts";
import { cacheFolder } from "./cache.ts";

export interface LocalModel {
  readonly kind: "made" | "downloaded";
  /** A made model's folder name, or a hub id. */
  readonly name: string;
  readonly path: string;
  readonly sizeBytes: number;
  readonly modifiedAt: Date;
}

/** Every exported folder holds this file; `removeModel` deletes no folder without it. */
const MADE_MARK = "nibble.json";

const listPath = (): string => join(cacheFolder(), "models.json");

async function readMade(): Promise<string[]> {
  try {
    const paths: unknown = JSON.parse(await readFile(listPath(), "utf8"));
    return Array.isArray(paths) ? paths.filter((path) => typeof path === "string") : [];
  } catch {
    return []; // not written yet, or damaged: it only says where to look
  }
}

async function writeMade(paths: readonly string[]): Promise<void> {
  await mkdir(cacheFolder(), { recursive: true });
  const partial = `${listPath()}.${process.pid}.partial`;
  await writeFile(partial, `${JSON.stringify(paths, null, 2)}\n`);
  await rename(partial, listPath());
}

/** Adds a folder that was just made to the list that `nibble list` shows. */
export async function rememberModel(folder: string): Promise<void> {
  const paths = await readMade();
  await writeMade([...new Set([...paths, resolve(folder)])]);
}

async function folderSize(folder: string): Promise<number> {
  let sizeBytes = 0;
  for (const entry of await readdir(folder, { withFileTypes: true, recursive: true })) {
    if (entry.isFile()) sizeBytes += (await stat(join(entry.parentPath ?? entry.path, entry.name))).size;
  }
  return sizeBytes;
}

async function madeModel(path: string): Promise<LocalModel | undefined> {
  try {
    const { mtime } = await stat(join(path, MADE_MARK));
    return { kind: "made", name: basename(path), path, sizeBytes: await folderSize(path), modifiedAt: mtime };
  } catch {
    return undefined; // moved or deleted since
  }
}

async function downloadedModels(): Promise<LocalModel[]> {
  try {
    const { repos } = await scanCacheDir();
    return repos
      .filter((repo) => repo.id.type === "model")
      .map((repo) => ({
        kind: "downloaded",
        name: repo.id.name,
        path: repo.path,
        sizeBytes: repo.size,
        modifiedAt: repo.lastModifiedAt,
      }));
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT" || /ENOENT|does not exist/i.test(String(error))) return [];
    throw error;
  }
}

/** Made models first, then downloaded ones, each by name. */
export async function listModels(): Promise<LocalModel[]> {
  const made = (await Promise.all((await readMade()).map(madeModel))).filter((model) => model !== undefined);
  const byName = (a: LocalModel, b: LocalModel) => a.name.localeCompare(b.name);
  return [...made.sort(byName), ...(await downloadedModels()).sort(byName)];
}

/** Deletes one model, named as `listModels` names it or by its path; errors: `not_found`, `bad_option`. */
export async function removeModel(name: string): Promise<LocalModel> {
  const models = await listModels();
  const found = models.filter((model) => model.name === name || model.path === resolve(name));
  const model = found.length === 0 ? await madeModel(resolve(name)) : found[0];
  if (!model) {
    const known = models.map((candidate) => candidate.name).join(", ") || "none";
    throw new NibbleError("not_found", `${name}: no such model; known: ${known}.`);
  }
  if (found.length > 1) {
    const paths = found.map((candidate) => candidate.path).join(", ");
    throw new NibbleError("bad_option", `${name} is the name of several models; give one's path: ${paths}.`);
  }
  await rm(model.path, { recursive: true, force: true });
  await writeMade((await readMade()).filter((path) => path !== model.path));
  return model;
}
