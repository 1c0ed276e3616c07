/** SHA-256 of files of any size, in any runtime. */
import { sha256 } from "@noble/hashes/sha2.js";
import { bytesToHex } from "@noble/hashes/utils.js";
import type { ByteSource, FolderSink } from "./files.ts";

const CHUNK_BYTES = 4 << 20;

/** Lower-case hexadecimal SHA-256 of bytes. */
export function sha256Hex(bytes: Uint8Array): string {
  return bytesToHex(sha256(bytes));
}

/** Lower-case hexadecimal SHA-256 of a source, read in pieces. */
export async function sha256OfSource(source: ByteSource): Promise<string> {
  const hash = sha256.create();
  for (let offset = 0; offset < source.sizeBytes; offset += CHUNK_BYTES) {
    hash.update(await source.read(offset, Math.min(CHUNK_BYTES, source.sizeBytes - offset)));
  }
  return bytesToHex(hash.digest());
}

/** SHA-256 of a file that was just written. */
export async function sha256OfWritten(sink: FolderSink, path: string): Promise<string> {
  if (sink.sha256) return sink.sha256(path);
  const source = await sink.written.open(path);
  try {
    return await sha256OfSource(source);
  } finally {
    await source.close?.();
  }
}
