/**
 * A folder that appears whole or not at all: files are written to `<folder>.partial-<pid>` beside it, synced, and
 * renamed at commit. What an interrupted run left is removed when the process ends, or by the next run.
 */
import { rmSync } from "node:fs";
import { mkdir, open, readdir, rename, rm, stat } from "node:fs/promises";
import { basename, dirname, join, resolve, sep } from "node:path";
import { NibbleError } from "../errors.ts";
import type { ByteSink, FolderSink } from "../files.ts";
import { fileError, isFile, nodeFolder } from "./files.ts";

export interface NodeSinkOptions {
  /** Put the new folder in place of an existing model; without it, only an absent or empty folder is taken. */
  readonly overwrite?: boolean;
}

/** Partial folders of this process. */
const unfinished = new Set<string>();

/** Begins a folder at `folder`; errors: `bad_option` where something is in its place, `no_space` on a full disk. */
export async function nodeSink(folder: string, { overwrite = false }: NodeSinkOptions = {}): Promise<FolderSink> {
  const target = resolve(folder);
  const partial = `${target}.partial-${process.pid}`;
  await recoverInterrupted(target);
  await requireFree(target, overwrite);
  if (unfinished.has(partial)) throw new NibbleError("bad_option", `${folder} is being written already.`);
  await attempt(partial, () => mkdir(partial, { recursive: true }));
  remember(partial);

  const sinks = new Set<ByteSink>();
  let open = true;
  const requireOpen = () => {
    if (!open) throw new NibbleError("aborted", `${folder}: writing was ended before.`);
  };
  return {
    name: folder,
    written: nodeFolder(partial),
    async create(path) {
      requireOpen();
      const full = resolve(partial, path);
      if (!full.startsWith(partial + sep)) throw new NibbleError("bad_option", `"${path}" is not inside ${folder}.`);
      await attempt(full, () => mkdir(dirname(full), { recursive: true }));
      const sink = await nodeFileSink(full, () => sinks.delete(sink));
      sinks.add(sink);
      return sink;
    },
    async commit() {
      requireOpen();
      if (sinks.size > 0) throw new NibbleError("bad_option", `${folder}: a file in it is still open.`);
      await requireFree(target, overwrite);
      await attempt(target, () => putInPlace(partial, target));
      open = false;
      forget(partial);
    },
    async abort() {
      if (!open) return;
      open = false;
      await Promise.all([...sinks].map((sink) => sink.close().catch(() => undefined))); // the reason is known already
      await rm(partial, { recursive: true, force: true });
      forget(partial);
    },
  };
}

/** A file written front to back, on disk when close() returns. */
export async function nodeFileSink(path: string, onClose: () => void = () => {}): Promise<ByteSink> {
  const handle = await attempt(path, () => open(path, "w"));
  let closed = false;
  return {
    async write(bytes) {
      for (let done = 0; done < bytes.byteLength; ) {
        done += (await attempt(path, () => handle.write(bytes, done))).bytesWritten;
      }
    },
    async close() {
      if (closed) return;
      closed = true;
      try {
        await attempt(path, () => handle.sync());
      } finally {
        await handle.close();
        onClose();
      }
    },
  };
}

async function attempt<T>(path: string, action: () => Promise<T>): Promise<T> {
  try {
    return await action();
  } catch (error) {
    throw fileError(error, path);
  }
}

/** Errors: `bad_option` where something is in the folder's place that `nodeSink` would not replace. */
export async function requireFree(folder: string, overwrite: boolean): Promise<void> {
  const target = resolve(folder);
  const info = await stat(target).catch(() => undefined);
  if (!info) return;
  if (!info.isDirectory()) throw new NibbleError("bad_option", `${target} is a file; name a folder to write.`);
  const files = await attempt(target, () => readdir(target));
  if (files.length === 0) return;
  if (!overwrite) {
    throw new NibbleError("bad_option", `${target} exists and is not empty. Name another folder, or add --force.`);
  }
  // --force replaces the whole folder: what is no model of ours is not thrown away
  if (await isFile(join(target, "nibble.json"))) return;
  throw new NibbleError(
    "bad_option",
    `${target} holds files, but no nibble.json, so it is no model that Nibble wrote; it is not replaced. ` +
      "Name another folder, or remove it yourself.",
  );
}

async function putInPlace(partial: string, target: string): Promise<void> {
  await syncFolders(partial);
  const old = `${target}.replaced-${process.pid}`;
  const replaced = await rename(target, old).then(
    () => true,
    (error) => (error.code === "ENOENT" ? false : Promise.reject(error)),
  );
  try {
    await rename(partial, target);
  } catch (error) {
    if (replaced) await rename(old, target);
    throw error;
  }
  await syncFolder(dirname(target));
  if (replaced) await rm(old, { recursive: true, force: true });
}

/** The names in a folder are on disk only when the folder itself is synced. */
async function syncFolder(folder: string): Promise<void> {
  if (process.platform === "win32") return; // folders cannot be opened there
  const handle = await open(folder, "r");
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}

async function syncFolders(folder: string): Promise<void> {
  for (const entry of await readdir(folder, { withFileTypes: true })) {
    if (entry.isDirectory()) await syncFolders(join(folder, entry.name));
  }
  await syncFolder(folder);
}

/** Ends what runs before this one began: partial folders of dead processes go, a swap cut in two is finished. */
async function recoverInterrupted(target: string): Promise<void> {
  const parent = dirname(target);
  const names: string[] = await readdir(parent).catch(() => []);
  for (const name of names) {
    if (!name.startsWith(`${basename(target)}.`)) continue;
    const match = /^\.(partial|replaced)-(\d+)$/.exec(name.slice(basename(target).length));
    const path = join(parent, name);
    if (!match || unfinished.has(path) || (Number(match[2]) !== process.pid && isAlive(Number(match[2])))) continue;
    if (match[1] === "replaced" && !names.includes(basename(target))) await attempt(path, () => rename(path, target));
    else await attempt(path, () => rm(path, { recursive: true, force: true }));
  }
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === "EPERM"; // another user's
  }
}

function removeUnfinished(): void {
  for (const partial of unfinished) rmSync(partial, { recursive: true, force: true });
}

/** A signal that nobody else handles ends the process as it would have, after the clean-up. */
function onSignal(signal: NodeJS.Signals): void {
  if (process.listenerCount(signal) > 1) return; // the program ends in its own way, and `exit` cleans up
  removeUnfinished();
  process.off(signal, onSignal);
  process.kill(process.pid, signal);
}

const SIGNALS = ["SIGINT", "SIGTERM", "SIGHUP"] as const;

function remember(partial: string): void {
  if (unfinished.size === 0) {
    process.on("exit", removeUnfinished);
    for (const signal of SIGNALS) process.on(signal, onSignal);
  }
  unfinished.add(partial);
}

function forget(partial: string): void {
  unfinished.delete(partial);
  if (unfinished.size > 0) return;
  process.off("exit", removeUnfinished);
  for (const signal of SIGNALS) process.off(signal, onSignal);
}
