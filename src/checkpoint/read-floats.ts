/** Stored numbers to float32, a piece at a time, so that a big tensor is never held twice. */
import { sha256 } from "@noble/hashes/sha2.js";
import { bytesToHex } from "@noble/hashes/utils.js";
import { NibbleError } from "../errors.ts";
import type { ByteSource } from "../files.ts";
import { bf16ToF32, type DType, f16ToF32, sizeOf, toFloat32 } from "../tensor/dtypes.ts";
import type { SourceFile } from "./checkpoint.ts";

/** Bytes read and converted at once. */
const PIECE_BYTES = 16 * 2 ** 20;

/** `count` elements of `dtype` from `offset` on; a source's read() gives bytes of their own, so they are aligned. */
export async function readFloats(
  source: ByteSource,
  offset: number,
  dtype: DType,
  count: number,
): Promise<Float32Array> {
  if (dtype === "f32") return toFloat32(await source.read(offset, count * 4), dtype); // no conversion: no copy
  const values = new Float32Array(count);
  const size = sizeOf[dtype];
  const pieceCount = PIECE_BYTES / size;
  for (let start = 0; start < count; start += pieceCount) {
    const length = Math.min(pieceCount, count - start);
    const bytes = await source.read(offset + start * size, length * size);
    const out = values.subarray(start, start + length);
    if (dtype === "f16") f16ToF32(new Uint16Array(bytes.buffer, bytes.byteOffset, length), out);
    else if (dtype === "bf16") bf16ToF32(new Uint16Array(bytes.buffer, bytes.byteOffset, length), out);
    else out.set(toFloat32(bytes, dtype));
  }
  return values;
}

/** `bad_weights` where a value is NaN or infinite. */
export function checkFinite(values: Float32Array, where: string, name: string): void {
  for (let i = 0; i < values.length; i++) {
    if (values[i] - values[i] === 0) continue; // NaN and infinity minus themselves are NaN
    throw new NibbleError("bad_weights", `${where}: tensor "${name}" holds ${values[i]} at element ${i}.`, {
      param: name,
    });
  }
}

/** `bad_option` unless start .. end are rows of the tensor: the bytes beyond belong to another one. */
export function checkRows(shape: readonly number[], start: number, end: number, where: string, name: string): void {
  if (start >= 0 && start <= end && end <= shape[0]) return;
  throw new NibbleError("bad_option", `${where}: tensor "${name}" [${shape}] has no rows ${start} to ${end}.`);
}

/** A source for the manifest; its hash is taken when somebody asks. */
export function sourceFile(name: string, source: ByteSource): SourceFile {
  return { name, sizeBytes: source.sizeBytes, sha256: () => hashSource(source) };
}

/** SHA-256 of the whole source, in hex. */
export async function hashSource(source: ByteSource): Promise<string> {
  if (source.sha256) return source.sha256();
  const hash = sha256.create();
  for (let offset = 0; offset < source.sizeBytes; offset += PIECE_BYTES) {
    hash.update(await source.read(offset, Math.min(PIECE_BYTES, source.sizeBytes - offset)));
  }
  return bytesToHex(hash.digest());
}
