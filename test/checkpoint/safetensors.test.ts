import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { readSafetensorsHeader, type TensorToWrite, writeSafetensors } from "../../src/checkpoint/safetensors.ts";
import type { ByteSource } from "../../src/files.ts";
import { memoryFile, memorySink } from "../../src/memory-files.ts";
import { type DType, elementCount, sizeOf } from "../../src/tensor/dtypes.ts";

/** A file with any header and `dataBytes` bytes of data. */
function fileWith(header: unknown, dataBytes: number): ByteSource {
  const json = new TextEncoder().encode(typeof header === "string" ? header : JSON.stringify(header));
  const bytes = new Uint8Array(8 + json.length + dataBytes);
  new DataView(bytes.buffer).setBigUint64(0, BigInt(json.length), true);
  bytes.set(json, 8);
  return memoryFile("m.safetensors", bytes);
}

async function written(tensors: readonly TensorToWrite[]): Promise<Uint8Array> {
  const sink = memorySink("m");
  await writeSafetensors(await sink.create("x"), tensors);
  return sink.files.get("x")!;
}

const F32 = (start: number, count: number) => ({
  dtype: "F32",
  shape: [count],
  data_offsets: [start, start + 4 * count],
});

describe("headers that lie are refused", () => {
  const cases: [string, unknown, number, RegExp][] = [
    ["data beyond the file", { a: F32(0, 4) }, 8, /"a" ends at byte 16 of the data, but the file holds 8/],
    ["overlapping tensors", { a: F32(0, 4), b: F32(8, 4) }, 24, /"b" overlaps/],
    ["the same bytes twice", { a: F32(0, 4), b: F32(0, 4) }, 16, /overlaps/],
    ["a hole", { a: F32(0, 1), b: F32(8, 1) }, 12, /4 bytes before tensor "b"/],
    ["a hole at the start", { a: F32(4, 1) }, 8, /4 bytes before tensor "a"/],
    ["bytes after the last tensor", { a: F32(0, 1) }, 8, /4 bytes after the last tensor/],
    ["negative offsets", { a: { dtype: "U8", shape: [4], data_offsets: [-4, 0] } }, 4, /data_offsets \[-4,0\]/],
    ["offsets in the wrong order", { a: { dtype: "U8", shape: [4], data_offsets: [4, 0] } }, 4, /data_offsets/],
    ["a negative dimension", { a: { dtype: "U8", shape: [-4], data_offsets: [0, 4] } }, 4, /shape \[-4\]/],
    ["a fractional dimension", { a: { dtype: "U8", shape: [0.5], data_offsets: [0, 4] } }, 4, /shape/],
    ["2^53 elements", { a: { dtype: "F32", shape: [2 ** 53], data_offsets: [0, 4] } }, 4, /shape/],
    [
      "dims whose product wraps",
      { a: { dtype: "U8", shape: [2 ** 32, 2 ** 32, 0.5 * 2 ** 1], data_offsets: [0, 0] } },
      0,
      /needs 18446744073709551616 bytes/,
    ],
    ["an end at 2^53", { a: { dtype: "U8", shape: [4], data_offsets: [0, 2 ** 53] } }, 4, /data_offsets/],
    [
      "a size that is not the shape's",
      { a: { dtype: "F32", shape: [3], data_offsets: [0, 16] } },
      16,
      /needs 12 bytes/,
    ],
    ["an unknown dtype", { a: { dtype: "F33", shape: [1], data_offsets: [0, 4] } }, 4, /dtype "F33"; Nibble reads F64/],
    ["a dtype named like an object's own", { a: { dtype: "toString", shape: [1], data_offsets: [0, 4] } }, 4, /dtype/],
    ["no dtype", { a: { shape: [1], data_offsets: [0, 4] } }, 4, /dtype/],
    ["no shape", { a: { dtype: "F32", data_offsets: [0, 4] } }, 4, /shape/],
    ["no offsets", { a: { dtype: "F32", shape: [1] } }, 4, /data_offsets/],
    ["a tensor that is no object", { a: 3 }, 4, /instead of an object/],
    ["an array", [1], 0, /no object/],
    ["no JSON", '{"a":', 0, /no JSON/],
    ["an empty header", "", 0, /no JSON/],
    ["metadata that is no text", { __metadata__: { a: 1 } }, 0, /__metadata__/],
    [
      "the same name twice",
      '{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"\\u0061":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
      2,
      /"a" twice/,
    ],
  ];
  test.each(cases)("%s", async (_, header, dataBytes, message) => {
    await expect(readSafetensorsHeader(fileWith(header, dataBytes))).rejects.toMatchObject({
      code: "bad_file",
      message: expect.stringMatching(message),
    });
  });

  test.each([100_000_001n, 2n ** 53n, 2n ** 64n - 1n])("a header of %d bytes", async (length) => {
    const bytes = new Uint8Array(16);
    new DataView(bytes.buffer).setBigUint64(0, length, true);
    await expect(readSafetensorsHeader(memoryFile("m", bytes))).rejects.toMatchObject({ code: "bad_file" });
  });

  test("a type of the format that no float model uses is unsupported, by name", async () => {
    const file = fileWith({ a: { dtype: "F8_E8M0", shape: [4], data_offsets: [0, 4] } }, 4);
    await expect(readSafetensorsHeader(file)).rejects.toMatchObject({ code: "unsupported", param: "a" });
  });
});

const dtype = fc.constantFrom(...(Object.keys(sizeOf) as DType[]));
const tensors = fc
  .uniqueArray(fc.record({ name: fc.string(), dtype, shape: fc.array(fc.nat(4), { maxLength: 3 }) }), {
    selector: ({ name }) => name,
    maxLength: 5,
  })
  .map((list) =>
    list
      .filter(({ name }) => name !== "__metadata__" && name !== "__proto__")
      .map((tensor, i) => ({
        ...tensor,
        bytes: () => new Uint8Array(elementCount(tensor.shape) * sizeOf[tensor.dtype]).fill(i + 1),
      })),
  );

test("what is written is read back, whatever names, types and shapes", async () => {
  await fc.assert(
    fc.asyncProperty(tensors, async (list) => {
      const bytes = await written(list);
      const header = await readSafetensorsHeader(memoryFile("m", bytes));
      expect([...header.tensors.keys()].sort()).toEqual(list.map(({ name }) => name).sort());
      for (const { name, dtype, shape, bytes: make } of list) {
        const read = header.tensors.get(name)!;
        expect(read).toMatchObject({ dtype, shape });
        expect(bytes.slice(read.offset, read.offset + read.sizeBytes)).toEqual(make());
      }
    }),
  );
});

test("a file cut off anywhere is refused", async () => {
  const whole = await written([
    { name: "a", dtype: "f32", shape: [3, 2], bytes: () => new Uint8Array(24) },
    { name: "b", dtype: "bf16", shape: [5], bytes: () => new Uint8Array(10) },
  ]);
  for (let length = 0; length < whole.length; length++) {
    await expect(readSafetensorsHeader(memoryFile("m", whole.slice(0, length)))).rejects.toMatchObject({
      code: "bad_file",
    });
  }
  await expect(readSafetensorsHeader(memoryFile("m", whole))).resolves.toBeDefined();
});

test("any byte of the header changed gives a header or a NibbleError, nothing else", async () => {
  const whole = await written([{ name: "a", dtype: "f32", shape: [3, 2], bytes: () => new Uint8Array(24) }]);
  await fc.assert(
    fc.asyncProperty(fc.nat(whole.length - 25), fc.nat(255), async (at, value) => {
      const changed = whole.slice();
      changed[at] = value;
      try {
        await readSafetensorsHeader(memoryFile("m", changed));
      } catch (error) {
        expect(error).toMatchObject({ name: "NibbleError" });
      }
    }),
  );
});
