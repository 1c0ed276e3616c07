/**
 * Models of the Hugging Face hub in the ecosystem's own cache (`~/.cache/huggingface/hub`, HF_HOME, HF_HUB_CACHE):
 * what Python tools downloaded is found, what is downloaded here they find. Listing goes through @huggingface/hub;
 * its download neither resumes nor checks hashes nor reports progress, so that part is hub-download.ts.
 */
import { mkdir, readFile, rename, stat, statfs, symlink, writeFile } from "node:fs/promises";
import { dirname, join, relative } from "node:path";
import { getHFHubCachePath, getRepoFolderName, listFiles, modelInfo } from "@huggingface/hub";
import { NibbleError } from "../errors.ts";
import type { OnProgress } from "../progress.ts";
import { fileError, isFile, nodeFolder } from "./files.ts";
import { downloadBlob, type HubFile } from "./hub-download.ts";
import { chooseFiles } from "./hub-files.ts";
import { connect, type HubConnection, isOffline } from "./hub-http.ts";

export interface HubOptions {
  readonly revision?: string;
  readonly token?: string;
  readonly onProgress?: OnProgress;
  readonly signal?: AbortSignal;
}

export interface HubModel {
  /** `org/name` */
  readonly id: string;
  /** A file of the repository, for GGUF: `org/name/model-q4_k_m.gguf`. */
  readonly file: string | undefined;
  /** Branch, tag or commit. */
  readonly revision: string;
}

/** A model in the cache. */
export interface HubSnapshot {
  /** The folder of this commit's files. */
  readonly folder: string;
  readonly commit: string;
  /** Those that were asked for. */
  readonly files: readonly string[];
  readonly notes: readonly string[];
}

/** `org/name`, `org/name@revision`, `org/name/file.gguf`, `org/name@revision/file.gguf`; undefined for anything else. */
export function parseHubId(spec: string): HubModel | undefined {
  const name = "[\\w][\\w.-]*";
  const match = new RegExp(`^(${name}/${name})(?:@([^@]+?))?(?:/([^@]+\\.gguf))?$`).exec(spec);
  if (!match || match[1].includes("..")) return undefined;
  return { id: match[1], revision: match[2] ?? "main", file: match[3] };
}

const COMMIT = /^[0-9a-f]{40}$/;

/** Brings what Nibble reads of a model into the cache; errors: `not_found`, `network`, `no_space`, `verification`. */
export async function downloadModel(spec: string, options: HubOptions = {}): Promise<HubSnapshot> {
  const parsed = parseHubId(spec);
  if (!parsed)
    throw new NibbleError("bad_option", `"${spec}" is no hub id; these look like org/name or org/name@revision.`);
  if (options.revision && parsed.revision !== "main" && parsed.revision !== options.revision) {
    throw new NibbleError("bad_option", `${spec} names a revision, and so does --revision ${options.revision}.`);
  }
  const model: HubModel = { ...parsed, revision: options.revision ?? parsed.revision };
  const storage = join(getHFHubCachePath(), getRepoFolderName({ name: model.id, type: "model" }));
  const name = model.revision === "main" ? model.id : `${model.id}@${model.revision}`;
  if (isOffline()) {
    const missing = new NibbleError("network", `${name} is not in the cache, and HF_HUB_OFFLINE is set.`);
    return requireCached(model, storage, missing, "HF_HUB_OFFLINE is set.");
  }
  const hub = await connect(name, options);
  const cached = await cachedCommit(model, storage);
  let commit: string;
  try {
    // what is there already need not wait for five tries to reach the hub
    commit = await resolveCommit(cached ? await connect(name, { ...options, tries: 1 }) : hub, model, storage);
  } catch (error) {
    if (!(error instanceof NibbleError) || error.code !== "network" || error.param === "token") throw error;
    return requireCached(model, storage, error); // no network: what an earlier run brought will do
  }
  const listed = await listRepository(hub, model, commit);
  const repository = {
    name,
    list: listed,
    read: (path: string) => readListed(hub, model, commit, listed, storage, path),
  };
  const files = await chooseFiles(repository, model.file);
  await fetchAll(hub, model, commit, storage, files, options);
  return { folder: snapshotOf(storage, commit), commit, files: files.map(({ path }) => path), notes: [] };
}

const snapshotOf = (storage: string, commit: string): string => join(storage, "snapshots", commit);

/** The commit that a branch or tag is at now; remembered under `refs/` for days without a network. */
async function resolveCommit(hub: HubConnection, { id, revision }: HubModel, storage: string): Promise<string> {
  const fetch = hub.fetch as typeof globalThis.fetch;
  const info = await modelInfo({ name: id, revision, hubUrl: hub.endpoint, additionalFields: ["sha"], fetch });
  const commit = info.sha;
  if (!COMMIT.test(commit)) throw new NibbleError("network", `${hub.endpoint} gives no commit for ${id}@${revision}.`);
  const refs = join(storage, "refs");
  const path = join(refs, revision);
  if (!path.startsWith(refs)) throw new NibbleError("bad_option", `"${revision}" is no revision.`);
  await writing(path, async () => {
    await mkdir(dirname(path), { recursive: true }); // other tools expect refs/ even where a commit was named
    if (commit !== revision) await writeFile(path, commit);
  });
  return commit;
}

async function writing<T>(path: string, action: () => Promise<T>): Promise<T> {
  return action().catch((error) => Promise.reject(fileError(error, path)));
}

async function listRepository(hub: HubConnection, { id, file }: HubModel, commit: string): Promise<HubFile[]> {
  const files: HubFile[] = [];
  const fetch = hub.fetch as typeof globalThis.fetch;
  const path = file?.includes("/") ? dirname(file) : undefined;
  for await (const entry of listFiles({ repo: id, revision: commit, path, hubUrl: hub.endpoint, fetch })) {
    if (entry.type !== "file" || entry.path.split("/").includes("..")) continue;
    const hash = entry.lfs?.oid.replace(/^sha256:/, "") ?? entry.oid ?? "";
    if (!/^[0-9a-f]{40}([0-9a-f]{24})?$/.test(hash)) continue;
    files.push({ path: entry.path, sizeBytes: entry.lfs?.size ?? entry.size, hash, isSha256: entry.lfs !== undefined });
  }
  return files;
}

function urlOf(hub: HubConnection, id: string, commit: string, path: string): string {
  return `${hub.endpoint}/${id}/resolve/${commit}/${path.split("/").map(encodeURIComponent).join("/")}`;
}

/** A small file (an index) that says which others are needed. */
async function readListed(
  hub: HubConnection,
  { id }: HubModel,
  commit: string,
  listed: readonly HubFile[],
  storage: string,
  path: string,
): Promise<string> {
  const file = listed.find((entry) => entry.path === path)!;
  const blob = join(storage, "blobs", file.hash);
  await downloadBlob(hub, urlOf(hub, id, commit, path), file, blob, () => {});
  return readFile(blob, "utf8");
}

async function fetchAll(
  hub: HubConnection,
  { id }: HubModel,
  commit: string,
  storage: string,
  files: readonly HubFile[],
  { onProgress, signal }: HubOptions,
): Promise<void> {
  const total = files.reduce((sum, file) => sum + file.sizeBytes, 0);
  const missing: HubFile[] = [];
  for (const file of files) if (!(await isFile(join(snapshotOf(storage, commit), file.path)))) missing.push(file);
  await requireSpace(storage, missing, id);
  let done = total - missing.reduce((sum, file) => sum + file.sizeBytes, 0);
  for (const file of missing) {
    const blob = join(storage, "blobs", file.hash);
    const report = (bytes: number) =>
      onProgress?.({ stage: `download ${file.path}`, done: done + bytes, total, unit: "bytes" });
    report(0);
    await downloadBlob(hub, urlOf(hub, id, commit, file.path), file, blob, report, signal);
    await point(join(snapshotOf(storage, commit), file.path), blob);
    done += file.sizeBytes;
    report(0);
  }
}

async function requireSpace(storage: string, files: readonly HubFile[], id: string): Promise<void> {
  let needed = 0;
  for (const { hash, sizeBytes } of files) {
    const blob = join(storage, "blobs", hash);
    if (await isFile(blob)) continue;
    const begun = await stat(`${blob}.incomplete`).catch(() => ({ size: 0 }));
    needed += Math.max(0, sizeBytes - begun.size);
  }
  if (needed === 0) return;
  await writing(storage, () => mkdir(storage, { recursive: true }));
  const { bavail, bsize } = await statfs(storage);
  if (bavail * bsize >= needed) return;
  throw new NibbleError(
    "no_space",
    `${id} needs ${(needed / 1e9).toFixed(2)} GB in ${storage}, and ${((bavail * bsize) / 1e9).toFixed(2)} GB are free. ` +
      "HF_HUB_CACHE puts the cache elsewhere.",
  );
}

/** `snapshots/<commit>/<path>` is a link to the blob; where links are not allowed (Windows), the blob itself. */
async function point(path: string, blob: string): Promise<void> {
  await writing(path, async () => {
    await mkdir(dirname(path), { recursive: true });
    try {
      await symlink(relative(dirname(path), blob), path);
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException;
      if (code === "EEXIST") return;
      if (code !== "EPERM" && code !== "ENOSYS") throw error;
      await rename(blob, path);
    }
  });
}

/** The commit of this revision that an earlier download left in the cache. */
async function cachedCommit({ revision }: HubModel, storage: string): Promise<string | undefined> {
  const ref = () => readFile(join(storage, "refs", revision), "utf8").catch(() => "");
  const commit = COMMIT.test(revision) ? revision : (await ref()).trim();
  const isThere = commit !== "" && (await stat(snapshotOf(storage, commit)).catch(() => undefined));
  return isThere ? commit : undefined;
}

/** The snapshot that an earlier download left, if it has what is needed; otherwise `error`. @param reason for people. */
async function requireCached(
  model: HubModel,
  storage: string,
  error: NibbleError,
  reason = error.message,
): Promise<HubSnapshot> {
  const commit = await cachedCommit(model, storage);
  if (!commit) throw error;
  const folder = snapshotOf(storage, commit);
  const cached = await nodeFolder(folder).list();
  const list = cached.map((path) => ({ path, sizeBytes: 0, hash: "", isSha256: false }));
  const read = (path: string) => readFile(join(folder, path), "utf8");
  const files = await chooseFiles({ name: model.id, list, read }, model.file);
  return {
    folder,
    commit,
    files: files.map(({ path }) => path),
    notes: [`${reason} The copy in the cache is used (commit ${commit.slice(0, 8)}).`],
  };
}
