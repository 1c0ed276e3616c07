/**
 * The prefix cache of a page: what was computed of prompts outlives the tab, so that a long system prompt is computed
 * once and not once a visit.
 *   models/<id>/prefixes/<fingerprint>/<key>.kv   as runtime/prefix-block.ts writes it
 *   models/<id>/prefixes/used.json                when each was last used: OPFS keeps no such time
 * A fingerprint is of graph, weights and device, hence of the cache's numbers: anything else finds nothing. A file that is
 * not what its hash says is deleted, and computed anew. A model's files together are bounded; what was not used for
 * longest goes first. They go with their model.
 */
import { sha256 } from "@noble/hashes/sha2.js";
import { sha256Hex } from "../hash.ts";
import {
  decodeBlock,
  encodeBlock,
  FINGERPRINT_DIGITS,
  PREFIX_SUFFIX,
  PREFIX_VERSION,
} from "../runtime/prefix-block.ts";
import { BLOCK_TOKENS, type Block, belongsTo, blocksOf } from "../runtime/prefix-cache.ts";
import { fileHandle, listFiles, openSink, subfolder } from "./opfs.ts";

/** Below a model's own folder. */
export const PREFIXES = "prefixes";
const USED = "used.json";
/** Of one model at most, where nobody says: some 5,000 tokens of SmolLM2's float cache, 20,000 of its int8 one. */
export const DEFAULT_PREFIX_BYTES = 2 ** 28;
/** A cache whose rows can be taken out and put back. */
export interface PrefixRows {
  /** The tokens that it holds. */
  readonly held: readonly number[];
  /** Of each cache input, `count` rows from token `start`. */
  takeRows(start: number, count: number): Promise<Uint8Array[]>;
  /** Puts blocks behind the first `start` rows, in the place of what was there. */
  putRows(start: number, blocks: readonly Pick<Block<Uint8Array>, "tokens" | "parts">[]): void;
}

/** What blocks depend on. @param weights of each file that the graph's numbers come from, what tells it from another */
export function prefixFingerprint(graph: Uint8Array, device: string, weights: readonly string[]): string {
  const parts = [PREFIX_VERSION, device, sha256Hex(graph), ...weights];
  return sha256Hex(new TextEncoder().encode(parts.join("\n"))).slice(0, FINGERPRINT_DIGITS);
}

export class PrefixStore {
  /** Every file of the model, other fingerprints' too, least recently used first: path -> bytes. */
  private readonly sizes = new Map<string, number>();
  private readonly usedAt: Record<string, number> = {};
  private total = 0;

  private constructor(
    private readonly root: FileSystemDirectoryHandle,
    private readonly fingerprint: string,
    private readonly maxBytes: number,
    /** Told of files that are not what they were. */
    private readonly onNote: (note: string) => void,
  ) {}

  /** @param directory the model's own folder */
  static async open(
    directory: FileSystemDirectoryHandle,
    fingerprint: string,
    maxBytes = DEFAULT_PREFIX_BYTES,
    onNote: (note: string) => void = () => {},
  ): Promise<PrefixStore> {
    const store = new PrefixStore((await subfolder(directory, PREFIXES, true))!, fingerprint, maxBytes, onNote);
    await store.list();
    return store;
  }

  private async list(): Promise<void> {
    const used = await readUsed(this.root);
    const files: { path: string; sizeBytes: number; usedMs: number }[] = [];
    for (const path of await listFiles(this.root)) {
      if (!path.endsWith(PREFIX_SUFFIX)) continue;
      const file = await (await fileHandle(this.root, path))!.getFile();
      files.push({ path, sizeBytes: file.size, usedMs: used[path] ?? file.lastModified });
    }
    for (const { path, sizeBytes, usedMs } of files.sort((a, b) => a.usedMs - b.usedMs)) {
      this.touch(path, sizeBytes, usedMs);
    }
  }

  get bytes(): number {
    return this.total;
  }

  /**
   * Gives `rows` what is kept of a prompt's beginning beyond the `shared` tokens that they hold of it. Returns how many
   * tokens of the prompt they hold then, never all: the model has to see the last one.
   */
  async restore(rows: PrefixRows, prompt: readonly number[], shared: number): Promise<number> {
    const start = Math.floor(shared / BLOCK_TOKENS) * BLOCK_TOKENS;
    const blocks: Block<Uint8Array>[] = [];
    for (const place of blocksOf(prompt, prompt.length - 1)) {
      const path = this.path(place.key);
      if (!this.sizes.has(path)) break;
      if (place.start < start) continue;
      const block = await this.read(path);
      if (!block || !belongsTo(block, place)) break;
      blocks.push(block as Block<Uint8Array>);
    }
    const end = start + blocks.length * BLOCK_TOKENS;
    if (end <= shared) return shared;
    rows.putRows(start, blocks);
    return end;
  }

  /** Keeps every whole block of a prompt that `rows` hold; what there is no room for costs the cache, not the answer. */
  async keep(rows: PrefixRows, prompt: readonly number[]): Promise<void> {
    const { held } = rows;
    let count = 0;
    while (count < Math.min(held.length, prompt.length) && held[count] === prompt[count]) count++;
    const chain = [...blocksOf(prompt, count)];
    try {
      for (const { start, key, parent, tokens } of chain) {
        const path = this.path(key);
        if (this.sizes.has(path)) continue;
        const parts = await rows.takeRows(start, BLOCK_TOKENS);
        await this.write(path, { tokens, parent, parts, sizeBytes: 0 });
      }
      // the first block is needed most
      for (const path of chain.map(({ key }) => this.path(key)).reverse()) {
        const sizeBytes = this.sizes.get(path);
        if (sizeBytes !== undefined) this.touch(path, sizeBytes);
      }
      await this.makeRoom();
      await this.writeUsed();
    } catch {
      // a full disk, or another tab that writes the same
    }
  }

  /** Forgets everything, of other fingerprints too. */
  async clear(): Promise<void> {
    this.sizes.clear();
    this.total = 0;
    await forgetPrefixes(this.root);
  }

  private async read(path: string): Promise<Block<ArrayBufferView> | undefined> {
    try {
      const file = await (await fileHandle(this.root, path))?.getFile();
      if (file) return decodeBlock(new Uint8Array(await file.arrayBuffer()), sha256);
    } catch (error) {
      this.onNote(`${path}: ${(error as Error).message}; it is deleted, and computed anew`);
      await this.remove(path);
    }
    this.forget(path);
    return undefined;
  }

  private async write(path: string, block: Block<ArrayBufferView>): Promise<void> {
    const bytes = encodeBlock(block, sha256);
    if (bytes.byteLength > this.maxBytes) return;
    const sink = await openSink(this.root, path);
    try {
      await sink.write(bytes);
    } finally {
      await sink.close();
    }
    this.touch(path, bytes.byteLength);
  }

  private async makeRoom(): Promise<void> {
    for (const oldest of [...this.sizes.keys()]) {
      if (this.total <= this.maxBytes) break;
      await this.remove(oldest);
    }
  }

  private async remove(path: string): Promise<void> {
    this.forget(path);
    const [folder, file] = path.split("/");
    await (await subfolder(this.root, folder))?.removeEntry(file).catch(() => undefined);
  }

  private async writeUsed(): Promise<void> {
    const used = Object.fromEntries([...this.sizes.keys()].map((path) => [path, this.usedAt[path]]));
    const sink = await openSink(this.root, USED);
    await sink.write(new TextEncoder().encode(JSON.stringify(used)));
    await sink.close();
  }

  private path(key: string): string {
    return `${this.fingerprint}/${key}${PREFIX_SUFFIX}`;
  }

  private touch(path: string, sizeBytes: number, usedMs = Date.now()): void {
    this.forget(path);
    this.sizes.set(path, sizeBytes);
    this.usedAt[path] = usedMs;
    this.total += sizeBytes;
  }

  private forget(path: string): void {
    this.total -= this.sizes.get(path) ?? 0;
    this.sizes.delete(path);
    delete this.usedAt[path];
  }
}

/** Empties a model's folder of them, in whatever worker it is open. */
export async function forgetPrefixes(prefixes: FileSystemDirectoryHandle): Promise<void> {
  for await (const name of prefixes.keys())
    await prefixes.removeEntry(name, { recursive: true }).catch(() => undefined);
}

async function readUsed(root: FileSystemDirectoryHandle): Promise<Readonly<Record<string, number>>> {
  try {
    const file = await (await fileHandle(root, USED))?.getFile();
    return file ? (JSON.parse(await file.text()) as Record<string, number>) : {};
  } catch {
    return {}; // half written by a tab that died: the files' own times do
  }
}
