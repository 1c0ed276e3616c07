/**
 * A block of the prefix cache as a file's bytes, wherever the file lies (a disk, a page's OPFS):
 *   "NIBBLEKV", version, sha256 of the rest; then the header's length, the header as JSON, the parts' bytes
 */
import { NibbleError } from "../errors.ts";
import type { Block } from "./prefix-cache.ts";

const MAGIC = new TextEncoder().encode("NIBBLEKV");
/** Changes when the layout or what the blocks mean does. */
export const PREFIX_VERSION = 1;
export const PREFIX_SUFFIX = ".kv";
/** Of the hash that tells one model's blocks from another's, in hexadecimal: enough that no two models meet. */
export const FINGERPRINT_DIGITS = 32;
const HASH_BYTES = 32;
/** Magic, version and hash. */
const REST_AT = MAGIC.length + 4 + HASH_BYTES;

type Numbers = Float32Array | Uint16Array | Int8Array | Uint8Array;
const ARRAYS = { Float32Array, Uint16Array, Int8Array, Uint8Array } as const;
type ArrayName = keyof typeof ARRAYS;

interface Header {
  readonly tokens: readonly number[];
  readonly parent: string;
  readonly parts: readonly (readonly [ArrayName, number])[];
}

/** The runtime's fastest one. */
export type Sha256 = (bytes: Uint8Array) => Uint8Array;

export function encodeBlock({ tokens, parent, parts }: Block<ArrayBufferView>, sha256: Sha256): Uint8Array {
  const arrays = parts as readonly Numbers[];
  const names = arrays.map((part) => [part.constructor.name as ArrayName, part.length] as const);
  const header = new TextEncoder().encode(JSON.stringify({ tokens, parent, parts: names } satisfies Header));
  const bodyBytes = arrays.reduce((sum, { byteLength }) => sum + byteLength, 0);
  const bytes = new Uint8Array(REST_AT + 4 + header.byteLength + bodyBytes);
  const view = new DataView(bytes.buffer);
  bytes.set(MAGIC);
  view.setUint32(MAGIC.length, PREFIX_VERSION, true);
  view.setUint32(REST_AT, header.byteLength, true);
  let at = REST_AT + 4;
  bytes.set(header, at);
  at += header.byteLength;
  for (const { buffer, byteOffset, byteLength } of arrays) {
    bytes.set(new Uint8Array(buffer, byteOffset, byteLength), at);
    at += byteLength;
  }
  bytes.set(sha256(bytes.subarray(REST_AT)), MAGIC.length + 4);
  return bytes;
}

/** Errors: `bad_file` where a byte is not as it was written, or the file ends early. */
export function decodeBlock(bytes: Uint8Array, sha256: Sha256): Block<ArrayBufferView> {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const equal = (at: number, wanted: Uint8Array) => wanted.every((byte, i) => bytes[at + i] === byte);
  if (
    bytes.byteLength < REST_AT + 4 ||
    !equal(0, MAGIC) ||
    view.getUint32(MAGIC.length, true) !== PREFIX_VERSION ||
    !equal(MAGIC.length + 4, sha256(bytes.subarray(REST_AT)))
  ) {
    throw new NibbleError("bad_file", "no block of a prefix cache, or a damaged one");
  }
  let at = REST_AT + 4 + view.getUint32(REST_AT, true);
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(REST_AT + 4, at))) as Header;
  const parts = header.parts.map(([name, length]) => {
    const part = new ARRAYS[name](length);
    new Uint8Array(part.buffer).set(bytes.subarray(at, at + part.byteLength));
    at += part.byteLength;
    return part;
  });
  const sizeBytes = parts.reduce((sum, { byteLength }) => sum + byteLength, 0);
  return { tokens: header.tokens, parent: header.parent, parts, sizeBytes };
}
