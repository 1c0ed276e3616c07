/**
 * Bytes in and bytes out, without saying whether they lie on a disk, in OPFS, behind HTTP or in memory.
 * `src/node/files.ts` implements these on `node:fs`; the page implements them on OPFS and dropped files.
 */

import { NibbleError } from "./errors.ts";

/** Random access to the bytes of one file. */
export interface ByteSource {
  /** Shown in messages: a path, a URL or a file name. */
  readonly name: string;
  readonly sizeBytes: number;
  /** Exactly `length` bytes from `offset`, in a buffer of their own; a NibbleError `bad_file` when the file is shorter. */
  read(offset: number, length: number): Promise<Uint8Array>;
  /** In hex, where the platform hashes faster than JavaScript does. */
  sha256?(): Promise<string>;
  close?(): Promise<void>;
}

/** Error `bad_file`: `found` is what is wrong with the file, a sentence without its end or one that asks. */
export function badFile({ name }: Pick<ByteSource, "name">, found: string): NibbleError {
  return new NibbleError("bad_file", `${name}: ${found}${found.endsWith("?") ? "" : "."}`);
}

/** A folder to read from; paths use `/`, relative to the folder. */
export interface FolderSource {
  readonly name: string;
  /** Every file below the folder, sorted. */
  list(): Promise<readonly string[]>;
  has(path: string): Promise<boolean>;
  open(path: string): Promise<ByteSource>;
}

/** A file being written, front to back. */
export interface ByteSink {
  write(bytes: Uint8Array): Promise<void>;
  close(): Promise<void>;
}

/**
 * A folder being made: everything is written beside its final place, and `commit` renames it there.
 * `abort` (or an exception before `commit`) leaves nothing behind.
 */
export interface FolderSink {
  readonly name: string;
  create(path: string): Promise<ByteSink>;
  /** Reads back what was written, for checking before `commit`. */
  readonly written: FolderSource;
  /** Lower-case hexadecimal SHA-256 of a finished file, where the platform hashes faster than JavaScript does. */
  sha256?(path: string): Promise<string>;
  commit(): Promise<void>;
  abort(): Promise<void>;
}

/** The whole of a source, for small files. */
export function readAll(source: ByteSource): Promise<Uint8Array> {
  return source.read(0, source.sizeBytes);
}

/** A file of a folder as text. */
export async function readText(folder: FolderSource, path: string): Promise<string> {
  const source = await folder.open(path);
  try {
    return new TextDecoder().decode(await readAll(source));
  } finally {
    await source.close?.();
  }
}
