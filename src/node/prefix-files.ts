/**
 * Blocks of the prefix cache as files, so that a long system prompt is computed once and not once a process.
 *   <dir>/<fingerprint>/<key>.kv   as runtime/prefix-block.ts writes it
 * A fingerprint is of graph, weights and format: another model, another cache format or another version of this layout
 * finds nothing. Files appear whole or not at all; one that is not what its hash says is deleted and computed anew. All
 * of a folder together is bounded, and what was not used for longest goes first.
 */
import { createHash } from "node:crypto";
import { mkdirSync, readdirSync, readFileSync, rmSync, statSync, utimesSync } from "node:fs";
import { rename, rm, stat, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { NibbleError } from "../errors.ts";
import type { Manifest } from "../export/model-folder.ts";
import { dataFiles } from "../export/open-graph.ts";
import { decodeModel } from "../onnx/proto.ts";
import {
  decodeBlock,
  encodeBlock,
  FINGERPRINT_DIGITS,
  PREFIX_SUFFIX,
  PREFIX_VERSION,
} from "../runtime/prefix-block.ts";
import type { Block, BlockStore } from "../runtime/prefix-cache.ts";

const sha256 = (bytes: Uint8Array) => createHash("sha256").update(bytes).digest();
/** On disk at most, where nobody says: the prompts of a few dozen assistants. */
export const DEFAULT_PREFIX_DISK_BYTES = 2 ** 30;

/** What blocks of this graph's cache depend on: the graph's bytes and the weights beside it. */
export async function cacheFingerprint(
  folder: string,
  graph: string,
  manifest: Pick<Manifest, "files"> | undefined,
): Promise<string> {
  const bytes = readFileSync(join(folder, graph));
  const hash = createHash("sha256").update(`${PREFIX_VERSION}\n`).update(bytes);
  const directory = graph.slice(0, graph.lastIndexOf("/") + 1);
  for (const file of dataFiles(decodeModel(bytes))) {
    const path = directory + file;
    const { size, mtimeMs } = await stat(join(folder, path));
    // another's folder has no hashes: size and time tell a file that was replaced
    hash.update(`${path} ${size} ${manifest?.files[path]?.sha256 ?? mtimeMs}\n`);
  }
  return hash.digest("hex").slice(0, FINGERPRINT_DIGITS);
}

export class PrefixFiles implements BlockStore<ArrayBufferView> {
  private readonly folder: string;
  /** Every file of the folder, other models' too, least recently used first. */
  private readonly sizes = new Map<string, number>();
  private total = 0;
  /** Read or written here, hence as they should be. */
  private readonly good = new Set<string>();
  private writing: Promise<void> = Promise.resolve();

  /** Errors: `bad_option` where the folder cannot be made or read. */
  constructor(
    dir: string,
    fingerprint: string,
    private readonly maxBytes: number,
    /** Told of files that are not what they were. */
    private readonly onNote: (note: string) => void = () => {},
  ) {
    this.folder = join(dir, fingerprint);
    try {
      mkdirSync(this.folder, { recursive: true });
      for (const { path, sizeBytes } of filesByUse(dir)) this.count(path, sizeBytes);
    } catch (cause) {
      throw new NibbleError("bad_option", `${dir} cannot hold a prefix cache: ${(cause as Error).message}`, {
        cause,
        param: "prefixCacheDir",
      });
    }
  }

  get bytes(): number {
    return this.total;
  }

  read(key: string): Block<ArrayBufferView> | undefined {
    const path = this.path(key);
    if (!this.sizes.has(path)) return undefined;
    try {
      const block = decodeBlock(readFileSync(path), sha256);
      const now = new Date();
      utimesSync(path, now, now);
      this.count(path, this.sizes.get(path)!);
      this.good.add(path);
      return block;
    } catch (error) {
      this.forget(path); // it is computed again and written again
      rmSync(path, { force: true });
      if ((error as NodeJS.ErrnoException).code !== "ENOENT") {
        this.onNote(`${path}: ${(error as Error).message}; it is deleted, and computed anew`);
      }
      return undefined;
    }
  }

  /** Writes in the background; the block's arrays must not change any more. */
  write(key: string, block: Block<ArrayBufferView>): void {
    const path = this.path(key);
    if (this.good.has(path)) return;
    const bytes = encodeBlock(block, sha256);
    if (bytes.byteLength > this.maxBytes) return;
    this.count(path, bytes.byteLength);
    this.good.add(path);
    this.writing = this.writing.then(() => this.writeNow(path, bytes));
  }

  private async writeNow(path: string, bytes: Uint8Array): Promise<void> {
    const unfinished = `${path}.${process.pid}.tmp`;
    try {
      await writeFile(unfinished, bytes);
      await rename(unfinished, path);
      for (const oldest of [...this.sizes.keys()]) {
        if (this.total <= this.maxBytes) break;
        this.forget(oldest);
        await rm(oldest, { force: true });
      }
    } catch {
      // a full disk costs the cache, not the answer
      this.forget(path);
      await rm(unfinished, { force: true }).catch(() => undefined);
    }
  }

  /** Resolves when everything is written. */
  async close(): Promise<void> {
    await this.writing;
  }

  private path(key: string): string {
    return join(this.folder, key + PREFIX_SUFFIX);
  }

  /** A file was used just now. */
  private count(path: string, sizeBytes: number): void {
    this.forget(path);
    this.sizes.set(path, sizeBytes);
    this.total += sizeBytes;
  }

  private forget(path: string): void {
    this.total -= this.sizes.get(path) ?? 0;
    this.sizes.delete(path);
    this.good.delete(path);
  }
}

function filesByUse(dir: string): { path: string; sizeBytes: number }[] {
  const files: { path: string; sizeBytes: number; usedMs: number }[] = [];
  for (const folder of readdirSync(dir, { withFileTypes: true })) {
    if (!folder.isDirectory()) continue;
    for (const name of readdirSync(join(dir, folder.name))) {
      if (!name.endsWith(PREFIX_SUFFIX)) continue;
      const path = join(dir, folder.name, name);
      const { size, mtimeMs } = statSync(path);
      files.push({ path, sizeBytes: size, usedMs: mtimeMs });
    }
  }
  return files.sort((a, b) => a.usedMs - b.usedMs);
}
