/** Writes GGUF v3: for tests, and to hand a tokenizer or a model to programs that read nothing else. */
import type { ByteSink } from "../files.ts";
import { GGML_TYPES, type GgmlType } from "./ggml-types.ts";
import { type GgufValueType, VALUE_TYPES } from "./gguf.ts";

/** A value with its type; for an array, the type of its items. */
export interface TypedValue {
  readonly type: Exclude<GgufValueType, "array">;
  readonly value: number | bigint | boolean | string | readonly (number | bigint | boolean | string)[];
}

export interface GgufTensorToWrite {
  readonly name: string;
  readonly type: GgmlType;
  /** Row-major, outermost first. */
  readonly shape: readonly number[];
  /** In the type's own blocks. */
  readonly bytes: Uint8Array;
}

/** Strings, booleans and typed numbers; what GGUF wants as u32 or f32 has to be said. */
export type GgufEntries = Readonly<Record<string, TypedValue | string | boolean | readonly string[]>>;

export async function writeGguf(
  sink: ByteSink,
  metadata: GgufEntries,
  tensors: readonly GgufTensorToWrite[],
): Promise<void> {
  const alignment = Number((metadata["general.alignment"] as TypedValue | undefined)?.value ?? 32);
  const align = (size: number) => Math.ceil(size / alignment) * alignment;
  const out = new Bytes();
  out.number("u32", 0x46554747);
  out.number("u32", 3);
  out.number("u64", tensors.length);
  out.number("u64", Object.keys(metadata).length);
  for (const [key, entry] of Object.entries(metadata)) {
    out.string(key);
    out.entry(typed(entry));
  }
  let offset = 0;
  for (const { name, type, shape, bytes } of tensors) {
    out.string(name);
    out.number("u32", shape.length);
    for (const dim of [...shape].reverse()) out.number("u64", dim);
    out.number("u32", GGML_TYPES[type].id);
    out.number("u64", offset);
    offset += align(bytes.length);
  }
  const head = out.finish();
  await sink.write(padded(head, align(head.length)));
  for (const { bytes } of tensors) await sink.write(padded(bytes, align(bytes.length)));
  await sink.close();
}

function typed(entry: GgufEntries[string]): TypedValue {
  if (typeof entry === "string" || Array.isArray(entry)) return { type: "string", value: entry };
  if (typeof entry === "boolean") return { type: "bool", value: entry };
  return entry as TypedValue;
}

function padded(bytes: Uint8Array, length: number): Uint8Array {
  if (bytes.length === length) return bytes;
  const whole = new Uint8Array(length);
  whole.set(bytes);
  return whole;
}

/** Bytes of a number. */
const SIZES: Readonly<Record<GgufNumberType, number>> = {
  u8: 1,
  i8: 1,
  bool: 1,
  u16: 2,
  i16: 2,
  u32: 4,
  i32: 4,
  f32: 4,
  u64: 8,
  i64: 8,
  f64: 8,
};
type GgufNumberType = Exclude<GgufValueType, "string" | "array">;

/** A growing little-endian buffer. */
class Bytes {
  private bytes: Uint8Array = new Uint8Array(1024);
  private view = new DataView(this.bytes.buffer);
  private end = 0;

  private reserve(length: number): number {
    if (this.end + length > this.bytes.length) {
      this.bytes = padded(this.bytes, Math.max(2 * this.bytes.length, this.end + length));
      this.view = new DataView(this.bytes.buffer, this.bytes.byteOffset, this.bytes.byteLength);
    }
    this.end += length;
    return this.end - length;
  }

  number(type: GgufNumberType, value: number | bigint | boolean): void {
    const number = Number(value);
    const at = this.reserve(SIZES[type]); // first: it may move the buffer
    switch (type) {
      case "u8":
      case "i8":
      case "bool":
        this.view.setUint8(at, number);
        return;
      case "u16":
      case "i16":
        this.view.setUint16(at, number, true);
        return;
      case "u32":
      case "i32":
        this.view.setUint32(at, number, true);
        return;
      case "f32":
        this.view.setFloat32(at, number, true);
        return;
      case "f64":
        this.view.setFloat64(at, number, true);
        return;
      default:
        this.view.setBigUint64(at, BigInt(value), true);
        return;
    }
  }

  string(text: string): void {
    const bytes = new TextEncoder().encode(text);
    this.number("u64", bytes.length);
    const at = this.reserve(bytes.length);
    this.bytes.set(bytes, at);
  }

  private one(type: TypedValue["type"], value: TypedValue["value"]): void {
    if (type === "string") this.string(value as string);
    else this.number(type, value as number);
  }

  entry({ type, value }: TypedValue): void {
    const id = VALUE_TYPES.indexOf(type);
    if (!Array.isArray(value)) {
      this.number("u32", id);
      this.one(type, value);
      return;
    }
    this.number("u32", VALUE_TYPES.indexOf("array"));
    this.number("u32", id);
    this.number("u64", value.length);
    for (const item of value) this.one(type, item);
  }

  finish(): Uint8Array {
    return this.bytes.subarray(0, this.end);
  }
}
