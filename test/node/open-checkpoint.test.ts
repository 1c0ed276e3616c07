import { copyFileSync, cpSync, mkdirSync, mkdtempSync, readFileSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, test } from "vitest";
import { type GgufEntries, type GgufTensorToWrite, writeGguf } from "../../src/checkpoint/gguf-writer.ts";
import { writeSafetensors } from "../../src/checkpoint/safetensors.ts";
import { memorySink } from "../../src/memory-files.ts";
import { openCheckpoint } from "../../src/node/open-checkpoint.ts";
import { repoPath } from "../helpers.ts";

const stories = repoPath("models/stories260k");
const mixed = repoPath("test/golden/gguf/tiny-llama-mixed.gguf");
const fresh = () => mkdtempSync(join(tmpdir(), "nibble-open-"));

/** The numbers of one tensor, to tell that the same model was opened. */
async function norm(path: string): Promise<number[]> {
  const checkpoint = await openCheckpoint(path);
  const { data } = await checkpoint.readTensor("model.norm.weight");
  await checkpoint.dispose();
  return [...data];
}

test("a folder, its weights file alone and llama2.c's .bin are the same model", async () => {
  const wanted = await norm(stories);
  expect(await norm(join(stories, "model.safetensors"))).toEqual(wanted);
  expect(await norm(join(stories, "stories260K.bin"))).toEqual(wanted);
});

test("the tokenizer beside a .bin is found by its size or its usual name, and missed aloud", async () => {
  const folder = fresh();
  copyFileSync(join(stories, "stories260K.bin"), join(folder, "m.bin"));
  const without = await openCheckpoint(join(folder, "m.bin"));
  expect(without.notes[0]).toMatch(/tokenizer\.bin or tok512\.bin/);
  copyFileSync(join(stories, "tok512.bin"), join(folder, "tokenizer.bin"));
  const beside = await openCheckpoint(join(folder, "m.bin"));
  expect([...beside.sideFiles.keys()]).toContain("tokenizer.json");
  await Promise.all([without.dispose(), beside.dispose()]);
});

test("a weights file of another name is opened without the others in its folder", async () => {
  const folder = fresh();
  cpSync(stories, folder, { recursive: true });
  const sink = memorySink("m");
  const bytes = () => new Uint8Array(Float32Array.of(1, 2).buffer);
  await writeSafetensors(await sink.create("x"), [{ name: "other", dtype: "f32", shape: [2], bytes }]);
  writeFileSync(join(folder, "mine.safetensors"), sink.files.get("x")!);
  const checkpoint = await openCheckpoint(join(folder, "mine.safetensors"));
  expect([...checkpoint.tensors.keys()]).toEqual(["other"]);
  await checkpoint.dispose();
});

test("a GGUF by its name, by its first bytes, and as the only one of a folder", async () => {
  const folder = fresh();
  copyFileSync(mixed, join(folder, "model.gguf"));
  copyFileSync(mixed, join(folder, "blob-without-name"));
  const wanted = await norm(mixed);
  expect(await norm(folder)).toEqual(wanted);
  expect(await norm(join(folder, "blob-without-name"))).toEqual(wanted);
  copyFileSync(mixed, join(folder, "second.gguf"));
  await expect(openCheckpoint(folder)).rejects.toMatchObject({
    code: "bad_option",
    message: expect.stringMatching(/model\.gguf, second\.gguf/),
  });
});

test("a split GGUF is all its parts", async () => {
  const folder = fresh();
  const u32 = (value: number) => ({ type: "u32", value }) as const;
  const metadata: GgufEntries = {
    "general.architecture": "llama",
    "split.count": { type: "u16", value: 2 },
    "llama.block_count": u32(1),
    "llama.context_length": u32(64),
    "llama.embedding_length": u32(32),
    "llama.feed_forward_length": u32(64),
    "llama.attention.head_count": u32(2),
    "llama.attention.layer_norm_rms_epsilon": { type: "f32", value: 1e-5 },
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "default",
    "tokenizer.ggml.tokens": ["a", "b", "ab"],
    "tokenizer.ggml.token_type": { type: "i32", value: [1, 1, 1] },
    "tokenizer.ggml.merges": ["a b"],
  };
  const tensor = (name: string, shape: number[]): GgufTensorToWrite => ({
    name,
    type: "F32",
    shape,
    bytes: new Uint8Array(shape.reduce((product, dim) => product * dim, 4)),
  });
  const parts: [GgufEntries, GgufTensorToWrite[]][] = [
    [metadata, [tensor("token_embd.weight", [8, 32])]],
    [{ "split.count": { type: "u16", value: 2 } }, [tensor("blk.0.attn_q.weight", [32, 32])]],
  ];
  for (const [i, [entries, tensors]] of parts.entries()) {
    const sink = memorySink("m");
    await writeGguf(await sink.create("x"), entries, tensors);
    writeFileSync(join(folder, `m-0000${i + 1}-of-00002.gguf`), sink.files.get("x")!);
  }
  for (const path of [folder, join(folder, "m-00001-of-00002.gguf")]) {
    const checkpoint = await openCheckpoint(path);
    expect([...checkpoint.tensors.keys()]).toEqual([
      "model.embed_tokens.weight",
      "model.layers.0.self_attn.q_proj.weight",
    ]);
    expect(checkpoint.sources).toHaveLength(2);
    await checkpoint.dispose();
  }
});

test("an adapter is merged as the weights are read", async () => {
  const folder = fresh();
  const target = "model.layers.0.self_attn.v_proj";
  writeFileSync(join(folder, "adapter_config.json"), JSON.stringify({ peft_type: "LORA", r: 1, lora_alpha: 2 }));
  const ones = (count: number) => () => new Uint8Array(new Float32Array(count).fill(1).buffer);
  const sink = memorySink("m");
  await writeSafetensors(await sink.create("x"), [
    { name: `base_model.model.${target}.lora_A.weight`, dtype: "f32", shape: [1, 64], bytes: ones(64) },
    { name: `base_model.model.${target}.lora_B.weight`, dtype: "f32", shape: [32, 1], bytes: ones(32) },
  ]);
  writeFileSync(join(folder, "adapter_model.safetensors"), sink.files.get("x")!);
  const base = await openCheckpoint(stories);
  const adapted = await openCheckpoint(stories, { adapter: folder });
  const [before, after] = [await base.readTensor(`${target}.weight`), await adapted.readTensor(`${target}.weight`)];
  expect(after.data).toEqual(before.data.map((x) => x + 2));
  await Promise.all([base.dispose(), adapted.dispose()]);
  await expect(openCheckpoint(stories, { adapter: join(folder, "none") })).rejects.toMatchObject({
    code: "not_found",
    param: "adapter",
  });
});

test("what is no checkpoint says what one is", async () => {
  const folder = fresh();
  writeFileSync(join(folder, "a.txt"), "hello");
  writeFileSync(join(folder, "cut.gguf"), readFileSync(mixed).subarray(0, 1000));
  writeFileSync(join(folder, "pytorch_model.bin"), "PK\u0003\u0004".padEnd(100, "x"));
  mkdirSync(join(folder, "empty"));
  const cases: [string, string, RegExp][] = [
    [join(folder, "none"), "not_found", /A checkpoint is a Hugging Face folder/],
    ["./none/here", "not_found", /does not exist/],
    [join(folder, "a.txt"), "unsupported", /llama2\.c \.bin/],
    [join(folder, "cut.gguf"), "bad_file", /cut off/],
    [join(folder, "pytorch_model.bin"), "unsupported", /pickle/],
    [join(folder, "empty"), "not_found", /empty/],
  ];
  for (const [path, code, message] of cases) {
    await expect(openCheckpoint(path), path).rejects.toMatchObject({ code, message: expect.stringMatching(message) });
  }
  await expect(openCheckpoint(stories, { revision: "v1" })).rejects.toMatchObject({
    code: "bad_option",
    param: "revision",
  });
});
