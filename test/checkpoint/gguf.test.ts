import { readFileSync } from "node:fs";
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { type QuantizableType, quantizeGgml } from "../../src/checkpoint/ggml-quantize.ts";
import { GGML_TYPES, type GgmlType, typeInfo } from "../../src/checkpoint/ggml-types.ts";
import { type Gguf, readGguf } from "../../src/checkpoint/gguf.ts";
import { type GgufEntries, type GgufTensorToWrite, writeGguf } from "../../src/checkpoint/gguf-writer.ts";
import { readSafetensorsHeader } from "../../src/checkpoint/safetensors.ts";
import { memoryFile, memorySink } from "../../src/memory-files.ts";
import { f32ToF16, toFloat32 } from "../../src/tensor/dtypes.ts";
import { repoPath } from "../helpers.ts";

/** ggml multiplies and adds in float32, in an order that a compiler may change (README of the goldens). */
const DEQUANTIZED_RELATIVE = 1e-6;

const golden = (name: string) => new Uint8Array(readFileSync(repoPath("test/golden/gguf", name)));
const expected = JSON.parse(readFileSync(repoPath("test/golden/gguf/expected.json"), "utf8"));
const tensorsFile = golden("tensors.gguf");
const tensors = await readGguf(memoryFile("tensors.gguf", tensorsFile));
const referenceFile = golden("tensors.expected.safetensors");
const reference = await readSafetensorsHeader(memoryFile("tensors.expected.safetensors", referenceFile));

function referenceValues(name: string): Float32Array {
  const { offset, sizeBytes } = reference.tensors.get(name)!;
  return toFloat32(referenceFile.slice(offset, offset + sizeBytes), "f32");
}

function bytesOf(gguf: Gguf, file: Uint8Array, name: string): Uint8Array {
  const { offset, sizeBytes } = gguf.tensors.get(name)!;
  return file.slice(offset, offset + sizeBytes);
}

function dequantized(type: GgmlType, bytes: Uint8Array): Float32Array {
  const { blockBytes, blockSize, dequantize } = typeInfo(type);
  const count = bytes.length / blockBytes;
  const out = new Float32Array(count * blockSize);
  dequantize!(bytes, count, out);
  return out;
}

describe("golden file of the reference package", () => {
  test("metadata of every type, 64-bit extremes and a nested array included", () => {
    for (const [key, value] of Object.entries<unknown>(expected.tensors_gguf.kv)) {
      const read = tensors.metadata.get(key);
      if (/^t\.[ui]64$/.test(key)) expect(String(read)).toBe(value);
      else expect(read).toEqual(value);
    }
    expect(tensors.metadata.size).toBe(Object.keys(expected.tensors_gguf.kv).length);
  });

  test("names, types, shapes, places and sizes of the tensors", () => {
    for (const { name, type, row_major_shape, offset_in_file, nbytes } of expected.tensors_gguf.tensors) {
      expect(tensors.tensors.get(name)).toEqual({
        name,
        type,
        shape: row_major_shape,
        offset: offset_in_file,
        sizeBytes: nbytes,
      });
    }
  });

  test.each<{ name: string; type: GgmlType }>(expected.tensors_gguf.tensors)(
    "$name is worth what the reference says",
    ({ name, type }) => {
      const values = dequantized(type, bytesOf(tensors, tensorsFile, name));
      const wanted = referenceValues(name);
      expect(values.length).toBe(wanted.length);
      let worst = 0;
      for (let i = 0; i < values.length; i++) {
        worst = Math.max(worst, Math.abs(values[i] - wanted[i]) / Math.max(Math.abs(wanted[i]), 1e-30));
      }
      expect(worst).toBeLessThanOrEqual(DEQUANTIZED_RELATIVE);
    },
  );

  test.each(["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])("quantizing to %s gives the reference's bytes", (name) => {
    const type = name.toUpperCase() as QuantizableType;
    const made = quantizeGgml(referenceValues("src"), type);
    const wanted = bytesOf(tensors, tensorsFile, name);
    // only a value exactly between two codes may be rounded the other way
    const ours = dequantized(type, made);
    const theirs = dequantized(type, wanted);
    const source = referenceValues("src");
    for (let i = 0; i < source.length; i++) {
      if (ours[i] === theirs[i]) continue;
      const gap = Math.abs(Math.abs(ours[i] - source[i]) - Math.abs(theirs[i] - source[i]));
      expect(gap).toBeLessThan(1e-3 * Math.abs(ours[i] - theirs[i]));
    }
    const different = made.reduce((count, byte, i) => count + (byte === wanted[i] ? 0 : 1), 0);
    expect(different).toBe(0);
  });

  test("an alignment of 64 moves the tensors", async () => {
    const file = golden("align64.gguf");
    const gguf = await readGguf(memoryFile("align64.gguf", file));
    const { alignment, ...values } = expected.align64_gguf;
    expect(gguf.metadata.get("general.alignment")).toBe(alignment);
    expect([...gguf.tensors.keys()].sort()).toEqual(Object.keys(values).sort());
    for (const [name, wanted] of Object.entries(values)) {
      expect(gguf.tensors.get(name)!.offset % alignment).toBe(0);
      expect([...dequantized(gguf.tensors.get(name)!.type, bytesOf(gguf, file, name))]).toEqual(wanted);
    }
  });
});

test("ternary and MXFP4 blocks are worth what the reference package says", async () => {
  const [file, wantedFile] = [golden("more-types.gguf"), golden("more-types.expected.safetensors")];
  const gguf = await readGguf(memoryFile("more-types.gguf", file));
  const wanted = await readSafetensorsHeader(memoryFile("more-types.expected.safetensors", wantedFile));
  expect([...gguf.tensors.keys()].sort()).toEqual(["MXFP4", "MXFP4.edges", "TQ1_0", "TQ2_0"]);
  for (const [name, { offset, sizeBytes }] of wanted.tensors) {
    const values = dequantized(gguf.tensors.get(name)!.type, bytesOf(gguf, file, name));
    expect(values, name).toEqual(toFloat32(wantedFile.slice(offset, offset + sizeBytes), "f32"));
  }
});

async function written(metadata: GgufEntries, list: readonly GgufTensorToWrite[] = []): Promise<Uint8Array> {
  const sink = memorySink("m");
  await writeGguf(await sink.create("x"), metadata, list);
  return sink.files.get("x")!;
}

const read = (bytes: Uint8Array) => readGguf(memoryFile("m.gguf", bytes));
const zeros = (name: string, shape: number[], type: GgmlType = "F32"): GgufTensorToWrite => {
  const { blockSize, blockBytes } = GGML_TYPES[type];
  return { name, type, shape, bytes: new Uint8Array((shape.reduce((p, d) => p * d, 1) / blockSize) * blockBytes) };
};

const small = await written({ "general.architecture": "test", list: ["a", "b"], n: { type: "u32", value: 3 } }, [
  zeros("a", [2, 32], "Q4_0"),
  zeros("b", [3]),
]);

test("what is written is read back", async () => {
  const gguf = await read(small);
  expect(Object.fromEntries(gguf.metadata)).toEqual({ "general.architecture": "test", list: ["a", "b"], n: 3 });
  expect(gguf.tensors.get("a")).toMatchObject({ type: "Q4_0", shape: [2, 32], sizeBytes: 36 });
  expect(gguf.tensors.get("b")).toMatchObject({ type: "F32", shape: [3], sizeBytes: 12 });
});

test("any metadata is read back", async () => {
  const value = fc.oneof(
    fc.string({ unit: "grapheme" }),
    fc.boolean(),
    fc.array(fc.string(), { maxLength: 4 }),
    fc.integer({ min: 0, max: 2 ** 32 - 1 }).map((value) => ({ type: "u32" as const, value })),
    fc.integer({ min: -(2 ** 31), max: 2 ** 31 - 1 }).map((value) => ({ type: "i32" as const, value })),
    fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }).map((value) => ({ type: "u64" as const, value })),
    fc.double({ noNaN: true }).map((value) => ({ type: "f64" as const, value })),
    fc.array(fc.float({ noNaN: true }), { maxLength: 4 }).map((value) => ({ type: "f32" as const, value })),
  );
  const entries = fc.dictionary(
    fc.string({ minLength: 1 }).filter((key) => key !== "__proto__"),
    value,
  );
  await fc.assert(
    fc.asyncProperty(entries, async (metadata) => {
      const { metadata: back } = await read(await written(metadata));
      for (const [key, entry] of Object.entries(metadata)) {
        const plain = typeof entry === "object" && "value" in entry ? entry.value : entry;
        const wanted = typeof plain === "bigint" && plain <= BigInt(Number.MAX_SAFE_INTEGER) ? Number(plain) : plain;
        expect(back.get(key)).toEqual(wanted);
      }
    }),
  );
});

test("a header longer than the first read is read whole", async () => {
  const tokens = Array.from({ length: 200_000 }, (_, i) => `token ${i}`);
  const gguf = await read(await written({ tokens }, [zeros("a", [3])]));
  expect(gguf.metadata.get("tokens")).toEqual(tokens);
  expect(gguf.tensors.size).toBe(1);
});

test("a file cut off anywhere is refused", async () => {
  const { offset, sizeBytes } = (await read(small)).tensors.get("b")!;
  for (let length = 0; length < offset + sizeBytes; length++) {
    await expect(read(small.slice(0, length))).rejects.toMatchObject({ code: "bad_file" });
  }
});

test("any byte of the header changed gives a header or a NibbleError, nothing else", async () => {
  const { offset } = (await read(small)).tensors.get("a")!;
  await fc.assert(
    fc.asyncProperty(fc.nat(offset - 1), fc.nat(255), async (at, value) => {
      const changed = small.slice();
      changed[at] = value;
      try {
        await read(changed);
      } catch (error) {
        expect(error).toMatchObject({ name: "NibbleError" });
      }
    }),
    { numRuns: 1000 },
  );
});

describe("headers that lie are refused", () => {
  /** The small file with `value` at the place of `what`. */
  async function lying(edit: (view: DataView, at: (text: string) => number) => void): Promise<unknown> {
    const bytes = small.slice();
    const at = (text: string) => Buffer.from(bytes.buffer).indexOf(text);
    edit(new DataView(bytes.buffer), at);
    return read(bytes).catch((error) => error);
  }
  const infoOf = (at: number) => at + 1; // behind the one-letter name
  const nameOfA = (at: (text: string) => number) => at("a\u0002\0\0\0 \0\0\0\0\0\0\0");

  test.each<[string, Parameters<typeof lying>[0], string, RegExp]>([
    ["another magic", (v) => v.setUint32(0, 1), "bad_file", /GGUF/],
    ["version 1", (v) => v.setUint32(4, 1, true), "unsupported", /version 1/],
    ["big-endian", (v) => v.setUint32(4, 3, false), "unsupported", /big-endian/],
    ["2^53 tensors", (v) => v.setBigUint64(8, 2n ** 53n, true), "bad_file", /tensor count is 9007199254740992/],
    ["2^40 tensors", (v) => v.setBigUint64(8, 2n ** 40n, true), "bad_file", /more than the file/],
    ["2^63 metadata", (v) => v.setBigUint64(16, 2n ** 63n, true), "bad_file", /metadata count/],
    ["a key of 2^40 bytes", (v) => v.setBigUint64(24, 2n ** 40n, true), "bad_file", /ends at/],
    ["an array of 2^40", (v, at) => v.setBigUint64(at("list") + 12, 2n ** 40n, true), "bad_file", /more than the file/],
    ["an unknown value type", (v, at) => v.setUint32(at("list") + 4, 99, true), "bad_file", /unknown type 99/],
    ["five dimensions", (v, at) => v.setUint32(infoOf(nameOfA(at)), 5, true), "bad_file", /5 dimensions/],
    [
      "a row that is no whole block",
      (v, at) => v.setBigUint64(infoOf(nameOfA(at)) + 4, 33n, true),
      "bad_file",
      /blocks of 32/,
    ],
    ["2^52 rows", (v, at) => v.setBigUint64(infoOf(nameOfA(at)) + 12, 2n ** 52n, true), "bad_file", /needs/],
    ["no rows", (v, at) => v.setBigUint64(infoOf(nameOfA(at)) + 12, 0n, true), "bad_file", /shape \[0,32\]/],
    [
      "an unknown tensor type",
      (v, at) => v.setUint32(infoOf(nameOfA(at)) + 20, 77, true),
      "bad_file",
      /unknown type 77/,
    ],
    [
      "an offset beyond the file",
      (v, at) => v.setBigUint64(infoOf(nameOfA(at)) + 24, 4096n, true),
      "bad_file",
      /cut off/,
    ],
    [
      "an offset off the alignment",
      (v, at) => v.setBigUint64(infoOf(nameOfA(at)) + 24, 1n, true),
      "bad_file",
      /alignment/,
    ],
    ["overlapping tensors", (v, at) => v.setBigUint64(infoOf(nameOfA(at)) + 24, 32n, true), "bad_file", /overlaps/],
  ])("%s", async (_, edit, code, message) => {
    expect(await lying(edit)).toMatchObject({ code, message: expect.stringMatching(message) });
  });

  test.each([0, 3, 2 ** 30])("an alignment of %d", async (value) => {
    const bytes = await written({ "general.alignment": { type: "u32", value: 32 } });
    const at = Buffer.from(bytes).indexOf("general.alignment") + "general.alignment".length + 4;
    new DataView(bytes.buffer, bytes.byteOffset).setUint32(at, value, true);
    await expect(read(bytes)).rejects.toMatchObject({ code: "bad_file", message: expect.stringMatching(/alignment/) });
  });

  test("a tensor's name twice", async () => {
    const twice = await written({}, [zeros("a", [8]), zeros("a", [8])]);
    await expect(read(twice)).rejects.toMatchObject({ code: "bad_file", message: expect.stringMatching(/twice/) });
  });
});

/** Straight from ggml's reference quantizer, in double precision: close to, not equal to, its float32 bytes. */
test("Q8_0 of any block is within half a step", () => {
  fc.assert(
    fc.property(fc.array(fc.float({ noNaN: true, min: -100, max: 100 }), { minLength: 32, maxLength: 32 }), (list) => {
      const values = Float32Array.from(list);
      const back = dequantized("Q8_0", quantizeGgml(values, "Q8_0"));
      const largest = values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
      const step = largest / 127;
      const scaleError = toFloat32(new Uint8Array(f32ToF16(Float32Array.of(step)).buffer), "f16")[0] - step;
      for (let i = 0; i < 32; i++) {
        expect(Math.abs(back[i] - values[i])).toBeLessThanOrEqual(0.501 * step + 127 * Math.abs(scaleError) + 1e-6);
      }
    }),
  );
});
