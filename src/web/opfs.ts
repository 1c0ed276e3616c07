/**
 * The origin private file system as folders: `navigator.storage.getDirectory()` read as a FolderSource and written as a
 * FolderSink. Writing uses sync access handles, which every browser has in workers and only there.
 */
import { NibbleError } from "../errors.ts";
import type { ByteSink, ByteSource, FolderSink, FolderSource } from "../files.ts";
import { blobSource } from "./dropped.ts";

/** A folder below `root`, its parents too; `undefined` when it is not there and may not be made. */
export async function subfolder(
  root: FileSystemDirectoryHandle,
  path: string,
  create = false,
): Promise<FileSystemDirectoryHandle | undefined> {
  let folder = root;
  for (const part of path.split("/").filter(Boolean)) {
    try {
      folder = await folder.getDirectoryHandle(part, { create });
    } catch (cause) {
      if (!create && (cause as DOMException).name === "NotFoundError") return undefined;
      throw storageError(path, cause);
    }
  }
  return folder;
}

/** FileSystemSyncAccessHandle, which TypeScript declares for workers only and this file shares with the page. */
interface SyncAccessHandle {
  write(bytes: Uint8Array, options: { at: number }): number;
  truncate(sizeBytes: number): void;
  flush(): void;
  close(): void;
}
type WorkerFileHandle = FileSystemFileHandle & { createSyncAccessHandle(): Promise<SyncAccessHandle> };

function split(path: string): { folder: string; file: string } {
  const slash = path.lastIndexOf("/");
  return { folder: path.slice(0, Math.max(slash, 0)), file: path.slice(slash + 1) };
}

/** The handle of a file below `root`, or undefined. */
export async function fileHandle(
  root: FileSystemDirectoryHandle,
  path: string,
  create = false,
): Promise<FileSystemFileHandle | undefined> {
  const { folder, file } = split(path);
  const parent = await subfolder(root, folder, create);
  try {
    return await parent?.getFileHandle(file, { create });
  } catch (cause) {
    if (!create && (cause as DOMException).name === "NotFoundError") return undefined;
    throw storageError(path, cause);
  }
}

/** A browser's storage failure in our words. */
export function storageError(path: string, cause: unknown): NibbleError {
  if (cause instanceof NibbleError) return cause;
  const { name, message } = cause as DOMException;
  if (name === "QuotaExceededError") {
    return new NibbleError("no_space", `${path}: the browser's storage for this site is full; delete a model.`, {
      cause,
    });
  }
  if (name === "NoModificationAllowedError") {
    return new NibbleError("overloaded", `${path}: another tab is writing this file; close it or wait.`, { cause });
  }
  return new NibbleError("bad_file", `${path}: the browser's storage said ${name}: ${message}`, { cause });
}

/** A file opened for writing from `offset`; `truncate` first when starting over. */
export async function openSink(
  root: FileSystemDirectoryHandle,
  path: string,
  offset = 0,
): Promise<ByteSink & { flush(): void }> {
  const handle = await fileHandle(root, path, true);
  let access: SyncAccessHandle;
  try {
    access = await (handle as WorkerFileHandle).createSyncAccessHandle();
  } catch (cause) {
    throw storageError(path, cause);
  }
  access.truncate(offset);
  let at = offset;
  return {
    async write(bytes) {
      try {
        const written = access.write(bytes, { at });
        at += written;
        if (written !== bytes.byteLength) {
          throw new NibbleError("no_space", `${path}: the browser stored ${written} of ${bytes.byteLength} bytes.`);
        }
      } catch (cause) {
        throw storageError(path, cause);
      }
    },
    flush: () => access.flush(),
    async close() {
      access.flush();
      access.close();
    },
  };
}

/** Every file below a directory handle, sorted. */
export async function listFiles(folder: FileSystemDirectoryHandle, prefix = ""): Promise<string[]> {
  const paths: string[] = [];
  for await (const [name, handle] of folder.entries()) {
    if (handle.kind === "file") paths.push(prefix + name);
    else paths.push(...(await listFiles(handle as FileSystemDirectoryHandle, `${prefix}${name}/`)));
  }
  return paths.sort();
}

/** A directory handle (OPFS, or one the user picked) as a folder to read from. */
export function handleFolder(root: FileSystemDirectoryHandle, name = root.name): FolderSource & BlobFolder {
  const blob = async (path: string) => {
    const handle = await fileHandle(root, path);
    if (!handle) throw new NibbleError("not_found", `${name}: there is no ${path}.`);
    return handle.getFile();
  };
  return {
    name,
    list: () => listFiles(root),
    has: async (path) => (await fileHandle(root, path)) !== undefined,
    open: async (path): Promise<ByteSource> => blobSource(`${name}/${path}`, await blob(path)),
    blob,
  };
}

/** A folder whose files can be handed to ONNX Runtime without copying them into JavaScript first. */
export interface BlobFolder {
  blob(path: string): Promise<Blob>;
}

/** A folder being made below `root`: written as `<path>.partial`, marked whole by moving it to `path`. */
export async function opfsSink(root: FileSystemDirectoryHandle, path: string): Promise<FolderSink> {
  const partial = `${path}.partial`;
  const parts = split(partial);
  const parent = (await subfolder(root, parts.folder, true))!;
  await parent.removeEntry(parts.file, { recursive: true }).catch(() => undefined);
  const made = (await subfolder(root, partial, true))!;
  return {
    name: path,
    create: (file) => openSink(made, file),
    written: handleFolder(made, path),
    async commit() {
      // Directories cannot be moved in every browser, files can: OPFS files move without copying their bytes.
      const target = (await subfolder(root, path, true))!;
      for (const file of await listFiles(made)) await moveFile(made, target, file);
      await parent.removeEntry(parts.file, { recursive: true });
    },
    async abort() {
      await parent.removeEntry(parts.file, { recursive: true }).catch(() => undefined);
    },
  };
}

async function moveFile(from: FileSystemDirectoryHandle, to: FileSystemDirectoryHandle, path: string): Promise<void> {
  const { folder, file } = split(path);
  const handle = (await fileHandle(from, path)) as FileSystemFileHandle & {
    move?(to: FileSystemDirectoryHandle, name: string): Promise<void>;
  };
  const target = (await subfolder(to, folder, true))!;
  if (handle.move) return handle.move(target, file);
  const sink = await openSink(to, path);
  try {
    const reader = (await handle.getFile()).stream().getReader();
    for (let chunk = await reader.read(); !chunk.done; chunk = await reader.read()) await sink.write(chunk.value);
  } finally {
    await sink.close();
  }
}
