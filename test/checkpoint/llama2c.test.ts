import { readFileSync } from "node:fs";
import { expect, test } from "vitest";
import { openHfFolder } from "../../src/checkpoint/hf-folder.ts";
import { openLlama2c } from "../../src/checkpoint/llama2c.ts";
import { memoryFile } from "../../src/memory-files.ts";
import { nodeFolder } from "../../src/node/files.ts";
import { repoPath } from "../helpers.ts";

const folder = repoPath("models/stories260k");
const model = new Uint8Array(readFileSync(`${folder}/stories260K.bin`));
const tokenizer = memoryFile("tok512.bin", new Uint8Array(readFileSync(`${folder}/tok512.bin`)));
const open = (bytes: Uint8Array, tok = tokenizer) => openLlama2c(memoryFile("stories260K.bin", bytes), tok);

test("the weights and the config are those of the Hugging Face folder beside it", async () => {
  const ours = await open(model);
  const hf = await openHfFolder(nodeFolder(folder));
  expect([...ours.tensors.keys()].sort()).toEqual([...hf.tensors.keys()].sort());
  for (const name of hf.tensors.keys()) expect(await ours.readTensor(name), name).toEqual(await hf.readTensor(name));
  for (const [key, value] of Object.entries(ours.config)) expect(hf.config[key], key).toEqual(value);
  await hf.dispose();
});

test("the tokenizer is the published tokenizer.json, merge for merge", async () => {
  const { sideFiles } = await open(model);
  for (const file of ["tokenizer.json", "tokenizer_config.json"]) {
    const made = JSON.parse(new TextDecoder().decode(sideFiles.get(file)));
    expect(made).toEqual(JSON.parse(readFileSync(`${folder}/${file}`, "utf8")));
  }
});

/** The same model as version 1 stores it: another header, norms first, no rotary tables. */
function versionOne(tied: boolean): Uint8Array {
  const [dim, hidden, layers, vocab] = [64, 172, 5, 512];
  const header = new Uint8Array(256);
  const view = new DataView(header.buffer);
  view.setUint32(0, 0x616b3432, true);
  view.setInt32(4, 1, true);
  header.set(model.subarray(0, 28), 8);
  header[36] = tied ? 1 : 0;
  const sizes = [
    vocab * dim,
    layers * dim,
    layers * dim * dim,
    (layers * dim * dim) / 2,
    (layers * dim * dim) / 2,
    layers * dim * dim,
    layers * dim,
    layers * hidden * dim,
    layers * hidden * dim,
    layers * hidden * dim,
    dim,
  ];
  let at = 28;
  const [embedding, attentionNorm, q, k, v, o, mlpNorm, w1, w2, w3, norm] = sizes.map((size) =>
    model.subarray(at, (at += 4 * size)),
  );
  const parts = [header, attentionNorm, mlpNorm, norm, embedding, q, k, v, o, w1, w2, w3, ...(tied ? [] : [embedding])];
  return new Uint8Array(Buffer.concat(parts));
}

test("version 1 holds the same, and says by a byte whether the head is tied", async () => {
  const zero = await open(model);
  const one = await open(versionOne(true));
  for (const name of zero.tensors.keys()) expect(await one.readTensor(name), name).toEqual(await zero.readTensor(name));
  const untied = await open(versionOne(false));
  expect(untied.config.tie_word_embeddings).toBe(false);
  expect((await untied.readTensor("lm_head.weight")).data).toEqual(
    (await zero.readTensor("model.embed_tokens.weight")).data,
  );
});

test("a negative vocabulary means a head of its own at the end", async () => {
  const untied = new Uint8Array(model.length + 4 * 512 * 64);
  untied.set(model);
  new DataView(untied.buffer).setInt32(20, -512, true);
  untied.set(
    model.subarray(28, 28 + 4 * 512 * 64).map((byte, i) => (i % 4 === 3 ? byte ^ 0x80 : byte)),
    model.length,
  );
  const checkpoint = await open(untied);
  expect(checkpoint.config).toMatchObject({ tie_word_embeddings: false, vocab_size: 512 });
  const embedding = await checkpoint.readTensor("model.embed_tokens.weight");
  expect((await checkpoint.readTensor("lm_head.weight")).data).toEqual(embedding.data.map((x) => -x));
});

test("files that are something else say so", async () => {
  const changed = (at: number, value: number) => {
    const bytes = model.slice();
    new DataView(bytes.buffer).setInt32(at, value, true);
    return bytes;
  };
  const cases: [Uint8Array, string, RegExp][] = [
    [model.slice(0, 20), "bad_file", /only 20 bytes/],
    [model.slice(0, -4), "bad_file", /cut off/],
    [changed(8, 2 ** 31 - 1), "bad_file", /2147483647 layers/],
    [changed(8, -1), "bad_file", /layers -1/],
    [changed(12, 7), "bad_file", /7 heads/],
    [changed(0, 0x04034b50), "unsupported", /pickle/],
    [changed(0, 0x616b3432), "unsupported", /version 172/],
  ];
  for (const [bytes, code, message] of cases) {
    await expect(open(bytes)).rejects.toMatchObject({ code, message: expect.stringMatching(message) });
  }
  const cut = memoryFile("tok512.bin", (await tokenizer.read(0, 1000)).slice());
  await expect(open(model, cut)).rejects.toMatchObject({
    code: "bad_file",
    message: expect.stringMatching(/ends within piece/),
  });
});
