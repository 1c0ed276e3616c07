/** Bytes that a page already holds, as sources: blobs, files a user dropped or picked, and files in memory. */
import { NibbleError } from "../errors.ts";
import type { ByteSource, FolderSource } from "../files.ts";
import type { BlobFolder } from "./opfs.ts";

/** A Blob or File as a ByteSource; only the slices asked for are read. */
export function blobSource(name: string, blob: Blob): ByteSource {
  return {
    name,
    sizeBytes: blob.size,
    async read(offset, length) {
      if (offset < 0 || offset + length > blob.size) {
        const end = offset + length;
        throw new NibbleError("bad_file", `${name}: bytes ${offset} to ${end} were asked for, it has ${blob.size}.`);
      }
      return new Uint8Array(await blob.slice(offset, offset + length).arrayBuffer());
    },
  };
}

/** Files by path as a folder. */
export function blobFolder(name: string, files: ReadonlyMap<string, Blob>): FolderSource & BlobFolder {
  const blob = async (path: string) => {
    const found = files.get(path);
    if (!found) throw new NibbleError("not_found", `${name}: there is no ${path} among its ${files.size} files.`);
    return found;
  };
  return {
    name,
    list: async () => [...files.keys()].sort(),
    has: async (path) => files.has(path),
    open: async (path) => blobSource(`${name}/${path}`, await blob(path)),
    blob,
  };
}

/** What `<input type=file webkitdirectory>` gives: paths start with the folder's own name, which goes. */
export function fileListFolder(files: Iterable<File>): { name: string; files: Map<string, File> } {
  const byPath = new Map<string, File>();
  let name = "folder";
  for (const file of files) {
    const parts = (file.webkitRelativePath || file.name).split("/");
    if (parts.length > 1) name = parts.shift()!;
    byPath.set(parts.join("/"), file);
  }
  return { name, files: byPath };
}

/** What a drop gives: every file of every dropped folder, a single folder's own name left out of the paths. */
export async function droppedFolder(items: DataTransferItemList): Promise<{ name: string; files: Map<string, File> }> {
  // Entries have to be taken before the first await: the list is empty afterwards.
  const entries = Array.from(items, (item) => item.webkitGetAsEntry()).filter((entry) => entry !== null);
  const files = new Map<string, File>();
  const only = entries.length === 1 && entries[0].isDirectory;
  for (const entry of entries) await collect(entry, only ? "" : entry.name, files);
  return { name: entries[0]?.name ?? "folder", files };
}

async function collect(entry: FileSystemEntry, path: string, into: Map<string, File>): Promise<void> {
  if (entry.isFile) {
    into.set(
      path || entry.name,
      await new Promise<File>((done, fail) => (entry as FileSystemFileEntry).file(done, fail)),
    );
    return;
  }
  const reader = (entry as FileSystemDirectoryEntry).createReader();
  for (;;) {
    // A reader gives at most 100 entries a call; an empty answer is the end.
    const batch = await new Promise<FileSystemEntry[]>((done, fail) => reader.readEntries(done, fail));
    if (batch.length === 0) return;
    for (const child of batch) await collect(child, path ? `${path}/${child.name}` : child.name, into);
  }
}
