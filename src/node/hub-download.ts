/**
 * One file of the hub into the cache's `blobs/<hash>`: resumed where an earlier run stopped, and checked against the
 * hash that names it (SHA-256 of an LFS file, git's SHA-1 of a small one).
 */
import { createHash, type Hash } from "node:crypto";
import { createReadStream } from "node:fs";
import { mkdir, open, rename, rm, stat } from "node:fs/promises";
import { dirname } from "node:path";
import { NibbleError } from "../errors.ts";
import { fileError } from "./files.ts";
import { type HubConnection, retrying } from "./hub-http.ts";

export interface HubFile {
  readonly path: string;
  readonly sizeBytes: number;
  /** Name of its blob. */
  readonly hash: string;
  /** Which hash that is: a 64-digit SHA-256, or git's SHA-1 over "blob <size>\0" and the bytes. */
  readonly isSha256: boolean;
}

/** Downloads to `blob` unless it is there; `onBytes` is told how many bytes are there so far. */
export async function downloadBlob(
  hub: HubConnection,
  url: string,
  file: HubFile,
  blob: string,
  onBytes: (bytes: number) => void,
  signal?: AbortSignal,
): Promise<void> {
  if (await sizeOf(blob)) return onBytes(file.sizeBytes);
  await mkdir(dirname(blob), { recursive: true }).catch((error) => Promise.reject(fileError(error, blob)));
  const incomplete = `${blob}.incomplete`; // huggingface_hub's name too
  let mayResume = true;
  let bytes = 0;
  const report = (have: number) => {
    bytes = Math.max(bytes, have);
    onBytes(have);
  };
  const attempt = async () => {
    const hash = await receive(hub, url, file, incomplete, report, mayResume);
    if (hash === file.hash) return;
    await rm(incomplete, { force: true });
    if (!mayResume) {
      throw new NibbleError(
        "verification",
        `${file.path} from ${new URL(url).host} has the hash ${hash}, but the hub says ${file.hash}; it was thrown away.`,
      );
    }
    mayResume = false; // what was there from before may have been another program's: once more from the start
    throw new Error(`${file.path} did not have its hash`);
  };
  await retrying(attempt, { signal, progress: () => bytes });
  await rename(incomplete, blob).catch((error) => Promise.reject(fileError(error, blob)));
}

async function sizeOf(path: string): Promise<number | undefined> {
  return stat(path).then(
    (info) => info.size,
    () => undefined,
  );
}

/** Appends the rest of the file to `incomplete`; the hash of the whole. */
async function receive(
  hub: HubConnection,
  url: string,
  file: HubFile,
  incomplete: string,
  onBytes: (bytes: number) => void,
  mayResume: boolean,
): Promise<string> {
  let have = mayResume ? ((await sizeOf(incomplete)) ?? 0) : 0;
  if (have > file.sizeBytes) have = 0;
  if (have === file.sizeBytes && have > 0) return hashOf(await hashBegun(file, incomplete, have));

  const response = await hub.fetch(url, have > 0 ? { headers: { range: `bytes=${have}-` } } : {});
  const begins = Number(/^bytes (\d+)-/.exec(response.headers.get("content-range") ?? "")?.[1] ?? 0);
  if (response.status !== 206 || begins !== have) have = 0; // the whole file came
  if (begins !== 0 && have === 0) throw new Error(`${file.path}: the server sent another part than was asked for`);
  const hash = await hashBegun(file, incomplete, have);
  const handle = await open(incomplete, have > 0 ? "a" : "w").catch((error) =>
    Promise.reject(fileError(error, incomplete)),
  );
  try {
    for await (const piece of response.body as unknown as AsyncIterable<Uint8Array>) {
      if (have + piece.length > file.sizeBytes) {
        throw new NibbleError(
          "network",
          `${file.path}: more bytes came than the ${file.sizeBytes} that the hub lists.`,
        );
      }
      await handle.writeFile(piece).catch((error) => Promise.reject(fileError(error, incomplete)));
      hash.update(piece);
      have += piece.length;
      onBytes(have);
    }
    await handle.sync();
  } finally {
    await handle.close();
  }
  if (have < file.sizeBytes)
    throw new Error(`${file.path}: the connection ended after ${have} of ${file.sizeBytes} bytes`);
  return hashOf(hash);
}

/** A hash that has seen the first `bytes` of the file on disk. */
async function hashBegun(file: HubFile, path: string, bytes: number): Promise<Hash> {
  const hash = createHash(file.isSha256 ? "sha256" : "sha1");
  if (!file.isSha256) hash.update(`blob ${file.sizeBytes}\0`);
  if (bytes > 0) {
    for await (const piece of createReadStream(path, { end: bytes - 1, highWaterMark: 2 ** 20 })) hash.update(piece);
  }
  return hash;
}

function hashOf(hash: Hash): string {
  return hash.digest("hex");
}
