/** Files that lie in memory, for pages and tests: the interfaces of files.ts over Uint8Array and Blob. */
import { NibbleError } from "./errors.ts";
import type { ByteSource, FolderSink, FolderSource } from "./files.ts";

/** `bad_file` unless [offset, offset + length) lies inside the source. */
export function checkRange(source: Pick<ByteSource, "name" | "sizeBytes">, offset: number, length: number): void {
  if (offset >= 0 && length >= 0 && offset + length <= source.sizeBytes) return;
  throw new NibbleError(
    "bad_file",
    `${source.name}: bytes ${offset} to ${offset + length} were asked for, but it has ${source.sizeBytes}.`,
  );
}

export function memoryFile(name: string, bytes: Uint8Array): ByteSource {
  const source: ByteSource = {
    name,
    sizeBytes: bytes.byteLength,
    read: async (offset, length) => {
      checkRange(source, offset, length);
      return bytes.slice(offset, offset + length);
    },
  };
  return source;
}

/** A file that the user dropped on a page, or one of OPFS. */
export function blobFile(name: string, blob: Blob): ByteSource {
  const source: ByteSource = {
    name,
    sizeBytes: blob.size,
    read: async (offset, length) => {
      checkRange(source, offset, length);
      return new Uint8Array(await blob.slice(offset, offset + length).arrayBuffer());
    },
  };
  return source;
}

export function memoryFolder(name: string, files: ReadonlyMap<string, Uint8Array | Blob>): FolderSource {
  return {
    name,
    list: async () => [...files.keys()].sort(),
    has: async (path) => files.has(path),
    open: async (path) => {
      const content = files.get(path);
      if (content instanceof Uint8Array) return memoryFile(`${name}/${path}`, content);
      if (content) return blobFile(`${name}/${path}`, content);
      throw new NibbleError("not_found", `${name} has no file ${path}.`);
    },
  };
}

/** A folder written to memory: `files` holds what was closed. */
export function memorySink(name: string): FolderSink & { readonly files: ReadonlyMap<string, Uint8Array> } {
  const files = new Map<string, Uint8Array>();
  return {
    name,
    files,
    written: memoryFolder(name, files),
    create: async (path) => {
      const pieces: Uint8Array[] = [];
      return {
        write: async (bytes) => {
          pieces.push(bytes.slice());
        },
        close: async () => {
          const whole = new Uint8Array(pieces.reduce((sum, piece) => sum + piece.byteLength, 0));
          let end = 0;
          for (const piece of pieces) {
            whole.set(piece, end);
            end += piece.byteLength;
          }
          files.set(path, whole);
        },
      };
    },
    commit: async () => {},
    abort: async () => files.clear(),
  };
}
