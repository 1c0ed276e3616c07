/** Files on a disk: the interfaces of src/files.ts over node:fs. */
import { createHash } from "node:crypto";
import { createReadStream } from "node:fs";
import { open, readdir, stat } from "node:fs/promises";
import { join, relative, resolve, sep } from "node:path";
import { NibbleError } from "../errors.ts";
import type { ByteSource, FolderSource } from "../files.ts";
import { checkRange } from "../memory-files.ts";

/** Most bytes that one read call of Node takes. */
const MAX_READ_BYTES = 2 ** 30;

/** A file, read at any position; errors: `not_found`, `bad_file` when it turns out shorter than it was. */
export async function nodeFile(path: string): Promise<ByteSource> {
  const handle = await open(path, "r").catch((error) => Promise.reject(fileError(error, path)));
  const info = await handle.stat();
  if (!info.isFile()) {
    await handle.close();
    throw new NibbleError("bad_file", `${path} is no file.`);
  }
  const source: ByteSource = {
    name: path,
    sizeBytes: info.size,
    async read(offset, length) {
      checkRange(source, offset, length);
      const bytes = new Uint8Array(length);
      for (let done = 0; done < length; ) {
        const { bytesRead } = await handle
          .read(bytes, done, Math.min(length - done, MAX_READ_BYTES), offset + done)
          .catch((error) => Promise.reject(fileError(error, path)));
        if (bytesRead === 0) throw new NibbleError("bad_file", `${path} became shorter while it was read.`);
        done += bytesRead;
      }
      return bytes;
    },
    async sha256() {
      const hash = createHash("sha256");
      for await (const piece of createReadStream(path, { highWaterMark: 2 ** 20 })) hash.update(piece);
      return hash.digest("hex");
    },
    close: () => handle.close(),
  };
  return source;
}

/** A folder; files outside of it are refused, links inside of it are followed (the hub's cache is made of them). */
export function nodeFolder(path: string): FolderSource {
  const inside = (file: string): string => {
    const full = resolve(path, file);
    if (full.startsWith(resolve(path) + sep)) return full;
    throw new NibbleError("bad_file", `${path}: "${file}" is not a path inside this folder.`);
  };
  return {
    name: path,
    list: async () => (await listFiles(path, path)).sort(),
    has: async (file) =>
      stat(inside(file)).then(
        (info) => info.isFile(),
        () => false,
      ),
    open: async (file) => nodeFile(inside(file)),
  };
}

async function listFiles(root: string, folder: string): Promise<string[]> {
  const entries = await readdir(folder, { withFileTypes: true }).catch((error) =>
    Promise.reject(fileError(error, folder)),
  );
  const files: string[] = [];
  for (const entry of entries) {
    if (entry.name === ".git" || entry.name === "node_modules") continue;
    const path = join(folder, entry.name);
    if (entry.isDirectory()) files.push(...(await listFiles(root, path)));
    else if (entry.isFile() || (entry.isSymbolicLink() && (await isFile(path)))) {
      files.push(relative(root, path).split(sep).join("/"));
    }
  }
  return files;
}

/** A link into nowhere is no file. */
export function isFile(path: string): Promise<boolean> {
  return stat(path).then(
    (info) => info.isFile(),
    () => false,
  );
}

/** What the system says about a file, in Nibble's codes. */
export function fileError(error: unknown, path: string): unknown {
  if (error instanceof NibbleError) return error;
  const { code, message } = error as NodeJS.ErrnoException;
  switch (code) {
    case "ENOENT":
      return new NibbleError("not_found", `${path} does not exist.`, { cause: error });
    case "ENOSPC":
    case "EDQUOT":
    case "EFBIG":
      return new NibbleError("no_space", `${path}: the disk is full (${code}). Free some space and run it again.`, {
        cause: error,
      });
    case "EACCES":
    case "EPERM":
    case "EROFS":
      return new NibbleError("bad_option", `${path} may not be read or written by this user (${code}).`, {
        cause: error,
      });
    case "ENOTDIR":
    case "EISDIR":
      return new NibbleError(
        "bad_option",
        `${path}: a file was wanted and a folder found, or the other way (${code}).`,
        {
          cause: error,
        },
      );
    default:
      return code ? new NibbleError("bad_file", `${path}: ${message}`, { cause: error }) : error;
  }
}
