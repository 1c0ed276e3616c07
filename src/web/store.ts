/**
 * Models kept in the browser: OPFS folders `models/<id>/files`, each with a record of where its bytes came from. A
 * download writes as bytes arrive, goes on where it stopped, and is whole only when every hash is right.
 */
import { sha256 } from "@noble/hashes/sha2.js";
import { NibbleError } from "../errors.ts";
import { MANIFEST, type Manifest } from "../export/model-folder.ts";
import { type FolderSource, readText } from "../files.ts";
import { type BlobFolder, fileHandle, handleFolder, listFiles, openSink, storageError, subfolder } from "./opfs.ts";
import { forgetPrefixes, PREFIXES } from "./prefix-store.ts";
import type { RemoteFile, RemoteModel } from "./remote.ts";
import type { AnswerSpeed, AnswerSpeeds } from "./thread-choice.ts";

export interface StoredModel {
  readonly id: string;
  /** URL or hub address it came from. */
  readonly origin: string;
  /** Bytes on disk now, and when whole. */
  readonly storedBytes: number;
  readonly sizeBytes: number;
  /** Made here from the download: the integer twin of a 4-bit graph. */
  readonly madeBytes: number;
  /** What was computed of prompts, for later visits. */
  readonly promptBytes: number;
  readonly complete: boolean;
  /** Every file had a hash to compare with, and it was right. */
  readonly verified: boolean;
  /** Milliseconds since 1970. */
  readonly savedAt: number;
}

export interface DownloadProgress {
  readonly file: string;
  readonly receivedBytes: number;
  readonly totalBytes: number;
  /** Over the last seconds. */
  readonly bytesPerSecond: number;
  /** Undefined until a rate is known. */
  readonly secondsLeft: number | undefined;
}

interface FileRecord extends RemoteFile {
  readonly etag?: string;
  readonly done: boolean;
}

interface ModelRecord {
  readonly id: string;
  readonly origin: string;
  readonly savedAt: number;
  readonly files: Readonly<Record<string, FileRecord>>;
}

/** Tries of one file before giving up; between them it waits 1, 2, 4 seconds. */
const TRIES = 4;
const FIRST_WAIT_MS = 1000;
const RATE_WINDOW_MS = 3000;
/** Beside a model's record. */
const SPEEDS = "speeds.json";

export class ModelStore {
  private constructor(private readonly root: FileSystemDirectoryHandle) {}

  /** The store of this origin; throws `unsupported` where the browser has no OPFS (private windows of some). */
  static async open(): Promise<ModelStore> {
    try {
      const root = await navigator.storage.getDirectory();
      return new ModelStore((await subfolder(root, "models", true))!);
    } catch (cause) {
      throw new NibbleError("unsupported", "This browser keeps no files for pages (private window?).", { cause });
    }
  }

  async list(): Promise<StoredModel[]> {
    const models: StoredModel[] = [];
    for await (const [slug, handle] of this.root.entries()) {
      if (handle.kind !== "directory") continue;
      const record = await this.record(decodeURIComponent(slug));
      if (record) models.push(await this.describe(record));
    }
    return models.sort((a, b) => b.savedAt - a.savedAt);
  }

  async get(id: string): Promise<StoredModel | undefined> {
    const record = await this.record(id);
    return record && this.describe(record);
  }

  async delete(id: string): Promise<void> {
    try {
      await this.root.removeEntry(slug(id), { recursive: true });
    } catch (cause) {
      if ((cause as DOMException).name !== "NotFoundError") throw storageError(id, cause);
    }
  }

  /** Deletes what was computed of a model's prompts. */
  async forgetPrompts(id: string): Promise<void> {
    const prefixes = await subfolder(this.root, `${slug(id)}/${PREFIXES}`);
    if (prefixes) await forgetPrefixes(prefixes);
  }

  /** The files of a model to read from. */
  async folder(id: string): Promise<FolderSource & BlobFolder> {
    const files = await subfolder(this.root, `${slug(id)}/files`);
    if (!files) throw new NibbleError("not_found", `${id} is not stored in this browser.`);
    return handleFolder(files, id);
  }

  /** Where a model made in the page is written; `adopt` records it afterwards. */
  async directory(id: string): Promise<FileSystemDirectoryHandle> {
    return (await subfolder(this.root, slug(id), true))!;
  }

  /** Records a model folder, nibble.json included, that was written below `directory(id)/files` by something else. */
  async adopt(id: string, origin: string): Promise<StoredModel> {
    const files = (await subfolder(this.root, `${slug(id)}/files`, true))!;
    const manifest = JSON.parse(await readText(handleFolder(files, id), MANIFEST)) as Manifest;
    const entries: [string, FileRecord][] = [];
    for (const path of await listFiles(files)) {
      const { size } = await (await fileHandle(files, path))!.getFile();
      entries.push([path, { path, sizeBytes: size, sha256: manifest.files[path]?.sha256, done: true }]);
    }
    const record = { id, origin, savedAt: Date.now(), files: Object.fromEntries(entries) };
    await this.write(record);
    return this.describe(record);
  }

  /** What answers of a model took on this machine, as `noteSpeed` kept it. */
  async speeds(id: string): Promise<AnswerSpeeds> {
    const handle = await fileHandle(this.root, `${slug(id)}/${SPEEDS}`);
    if (!handle) return {};
    try {
      return JSON.parse(await (await handle.getFile()).text()) as AnswerSpeeds;
    } catch {
      return {}; // half written by a tab that died: measured again
    }
  }

  async noteSpeed(id: string, threads: number, speed: AnswerSpeed): Promise<void> {
    const speeds = { ...(await this.speeds(id)), [threads]: speed };
    const sink = await openSink(this.root, `${slug(id)}/${SPEEDS}`);
    await sink.write(new TextEncoder().encode(JSON.stringify(speeds)));
    await sink.close();
  }

  /** Fetches what is missing of `files`; stopping keeps what is there. Two tabs take turns. */
  download(
    remote: RemoteModel,
    files: readonly RemoteFile[],
    options: { onProgress?: (progress: DownloadProgress) => void; signal?: AbortSignal } = {},
  ): Promise<StoredModel> {
    return navigator.locks.request(`nibble-download:${remote.id}`, () => this.downloadAlone(remote, files, options));
  }

  private async downloadAlone(
    remote: RemoteModel,
    files: readonly RemoteFile[],
    { onProgress, signal }: { onProgress?: (progress: DownloadProgress) => void; signal?: AbortSignal },
  ): Promise<StoredModel> {
    const before = await this.record(remote.id);
    const known = before?.origin === remote.origin ? before.files : {};
    let record: ModelRecord = { id: remote.id, origin: remote.origin, savedAt: Date.now(), files: {} };
    for (const file of files) {
      const old = known[file.path];
      // A file of another size or hash is another file: it starts over.
      const same = old && old.sizeBytes === file.sizeBytes && old.sha256 === file.sha256;
      record = withFile(record, same ? { ...file, etag: old.etag, done: old.done } : { ...file, done: false });
    }
    await this.write(record);
    const meter = new Meter(
      files.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0),
      onProgress,
    );
    for (const file of files) {
      if (record.files[file.path].done) {
        meter.add(file.path, file.sizeBytes, false);
        continue;
      }
      // What was made from the old files is not of these.
      await (await this.directory(remote.id)).removeEntry("made", { recursive: true }).catch(() => undefined);
      const etag = await this.fetchFile(remote, record.files[file.path], meter, signal, async (tag) => {
        record = withFile(record, { ...record.files[file.path], etag: tag });
        await this.write(record);
      });
      record = withFile(record, { ...file, etag, done: true });
      await this.write(record);
    }
    return this.describe(record);
  }

  private async fetchFile(
    remote: RemoteModel,
    file: FileRecord,
    meter: Meter,
    signal: AbortSignal | undefined,
    onEtag: (etag: string | undefined) => Promise<void>,
  ): Promise<string | undefined> {
    const folder = (await subfolder(this.root, `${slug(remote.id)}/files`, true))!;
    const start = meter.receivedBytes;
    let etag = file.etag;
    for (let attempt = 1; ; attempt++) {
      meter.rewind(start);
      try {
        return await this.fetchOnce(remote, { ...file, etag }, folder, meter, signal, async (tag) => {
          etag = tag;
          await onEtag(tag);
        });
      } catch (error) {
        if (signal?.aborted) throw new NibbleError("aborted", `${remote.id}: the download was stopped.`);
        const { code } = error as NibbleError;
        if (code !== "network" || attempt === TRIES) throw error;
        await new Promise((done) => setTimeout(done, FIRST_WAIT_MS * 2 ** (attempt - 1)));
      }
    }
  }

  /** One try from where the file ends now; its hash covers the bytes of earlier tries too. */
  private async fetchOnce(
    remote: RemoteModel,
    file: FileRecord,
    folder: FileSystemDirectoryHandle,
    meter: Meter,
    signal: AbortSignal | undefined,
    onEtag: (etag: string | undefined) => Promise<void>,
  ): Promise<string | undefined> {
    const { path, sizeBytes } = file;
    const there = await (await fileHandle(folder, path))?.getFile();
    const resume = there && there.size <= sizeBytes && !file.estimated ? there.size : 0;
    const hash = sha256.create();
    let size = 0;
    let opened = resume === sizeBytes && resume > 0 ? undefined : await remote.open(path, resume, signal);
    if (opened && resume > 0 && (opened.offset !== resume || opened.etag !== file.etag)) {
      // The server has other bytes now, or knows no Range: take the file from its start.
      await opened.body.cancel();
      opened = await remote.open(path, 0, signal);
    }
    const offset = opened ? opened.offset : resume;
    if (offset > 0) {
      for await (const chunk of chunksOf(there!.slice(0, offset).stream())) hash.update(chunk);
      size = offset;
      meter.add(path, offset, false);
    }
    if (opened) {
      await onEtag(opened.etag);
      const sink = await openSink(folder, path, offset);
      try {
        for await (const chunk of chunksOf(opened.body)) {
          await sink.write(chunk);
          hash.update(chunk);
          size += chunk.byteLength;
          meter.add(path, chunk.byteLength, true);
          if (size > sizeBytes && !file.estimated) break;
        }
      } catch (cause) {
        if (cause instanceof NibbleError) throw cause;
        throw new NibbleError("network", `${path}: the connection ended at byte ${size} of ${sizeBytes}.`, { cause });
      } finally {
        await sink.close();
      }
    }
    if (file.estimated) return opened?.etag;
    if (size < sizeBytes) {
      throw new NibbleError("network", `${path}: the server ended at byte ${size} of ${sizeBytes}.`);
    }
    const found = hex(hash.digest());
    if (size > sizeBytes || (file.sha256 && found !== file.sha256)) {
      await this.discard(folder, path);
      const message =
        size > sizeBytes
          ? `${path}: the server sent more than the ${sizeBytes} bytes the model folder lists.`
          : `${path}: its SHA-256 is ${found}, the model folder lists ${file.sha256}. The bytes were deleted; download again, or from another host.`;
      throw new NibbleError("verification", message);
    }
    return opened ? opened.etag : file.etag;
  }

  private async discard(folder: FileSystemDirectoryHandle, path: string): Promise<void> {
    const sink = await openSink(folder, path, 0);
    await sink.close();
  }

  private async record(id: string): Promise<ModelRecord | undefined> {
    const handle = await fileHandle(this.root, `${slug(id)}/record.json`);
    if (!handle) return undefined;
    try {
      return JSON.parse(await (await handle.getFile()).text()) as ModelRecord;
    } catch {
      return undefined; // a tab that died while writing it: the model's files are fetched again
    }
  }

  private async write(record: ModelRecord): Promise<void> {
    const sink = await openSink(this.root, `${slug(record.id)}/record.json`);
    await sink.write(new TextEncoder().encode(JSON.stringify(record)));
    await sink.close();
  }

  private async describe(record: ModelRecord): Promise<StoredModel> {
    const files = Object.values(record.files);
    const bytesBelow = async (path: string) => {
      const folder = await subfolder(this.root, `${slug(record.id)}/${path}`);
      let sum = 0;
      for (const file of folder ? await listFiles(folder) : []) {
        sum += (await (await fileHandle(folder!, file))!.getFile()).size;
      }
      return sum;
    };
    return {
      id: record.id,
      origin: record.origin,
      storedBytes: await bytesBelow("files"),
      madeBytes: await bytesBelow("made"),
      promptBytes: await bytesBelow(PREFIXES),
      sizeBytes: files.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0),
      complete: files.every(({ done }) => done),
      verified: files.every(({ done, sha256: hash, path }) => done && (hash !== undefined || path === MANIFEST)),
      savedAt: record.savedAt,
    };
  }
}

function slug(id: string): string {
  return encodeURIComponent(id);
}

function withFile(record: ModelRecord, file: FileRecord): ModelRecord {
  return { ...record, files: { ...record.files, [file.path]: file } };
}

function hex(bytes: Uint8Array): string {
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Streams are async iterables in some browsers only. */
async function* chunksOf(stream: ReadableStream<Uint8Array>): AsyncGenerator<Uint8Array> {
  const reader = stream.getReader();
  try {
    for (let chunk = await reader.read(); !chunk.done; chunk = await reader.read()) yield chunk.value;
  } finally {
    await reader.cancel().catch(() => undefined);
  }
}

/** Counts bytes and reports at most ten times a second. */
class Meter {
  receivedBytes = 0;
  private reportedAt = 0;
  private readonly samples: { at: number; bytes: number }[] = [];
  private networkBytes = 0;

  constructor(
    private readonly totalBytes: number,
    private readonly onProgress: ((progress: DownloadProgress) => void) | undefined,
  ) {}

  rewind(receivedBytes: number): void {
    this.receivedBytes = receivedBytes;
  }

  /** @param fromNetwork false for bytes that were stored already: they say nothing about the rate. */
  add(file: string, bytes: number, fromNetwork: boolean): void {
    this.receivedBytes += bytes;
    const now = performance.now();
    if (fromNetwork) {
      this.networkBytes += bytes;
      this.samples.push({ at: now, bytes: this.networkBytes });
      while (this.samples[0].at < now - RATE_WINDOW_MS) this.samples.shift();
    }
    if (now - this.reportedAt < 100 && this.receivedBytes < this.totalBytes) return;
    this.reportedAt = now;
    const [first] = this.samples;
    const seconds = first ? (now - first.at) / 1000 : 0;
    const bytesPerSecond = seconds > 0.2 ? (this.networkBytes - first.bytes) / seconds : 0;
    const left = this.totalBytes - this.receivedBytes;
    const secondsLeft = bytesPerSecond > 0 ? left / bytesPerSecond : undefined;
    this.onProgress?.({
      file,
      receivedBytes: this.receivedBytes,
      totalBytes: this.totalBytes,
      bytesPerSecond,
      secondsLeft,
    });
  }
}
