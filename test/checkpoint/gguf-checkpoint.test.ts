/** GGUF to Hugging Face names and numbers: the reference's own file, every family's conversion undone, real files. */
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { resolveModel } from "../../src/arch/index.ts";
import type { Checkpoint } from "../../src/checkpoint/checkpoint.ts";
import { openGgufCheckpoint } from "../../src/checkpoint/gguf-checkpoint.ts";
import { type GgufEntries, type GgufTensorToWrite, writeGguf } from "../../src/checkpoint/gguf-writer.ts";
import { openHfFolder } from "../../src/checkpoint/hf-folder.ts";
import { readSafetensorsHeader } from "../../src/checkpoint/safetensors.ts";
import { memoryFile, memorySink } from "../../src/memory-files.ts";
import { nodeFile, nodeFolder } from "../../src/node/files.ts";
import { toFloat32 } from "../../src/tensor/dtypes.ts";
import { Decoder, floats, maxDifference, readGolden, withConfig } from "../arch/golden-model.ts";
import { isMissing, modelPath, repoPath, sharedPath } from "../helpers.ts";
import { toGguf } from "./to-gguf.ts";

/** golden/gguf/README.md: logits of tiny-llama-mixed. */
const MIXED_TOLERANCE = 3e-4;
/** golden/models/README.md, float32. */
const LOGITS_TOLERANCE = 2e-4;
/** (w + 1) - 1 in float32, for gemma's norms; everything else comes back as it was. */
const PLUS_ONE_TOLERANCE = 1.2e-7;

const noTokenizer = () => new Map<string, Uint8Array>();
const open = (bytes: Uint8Array, name = "m.gguf") => openGgufCheckpoint([memoryFile(name, bytes)], noTokenizer);

async function logitsOf(checkpoint: Checkpoint, ids: number[]): Promise<Float32Array> {
  const decoder = await Decoder.of(resolveModel(checkpoint));
  const { logits } = await decoder.run([ids], [ids.map(() => 1)]);
  await decoder.dispose();
  return floats(logits);
}

test("tiny-llama-mixed: eight tensor types, interleaved q and k, the reference's logits", async () => {
  const folder = repoPath("test/golden/gguf");
  const checkpoint = await open(new Uint8Array(readFileSync(join(folder, "tiny-llama-mixed.gguf"))));
  expect(checkpoint.config).toMatchObject({ model_type: "llama", num_key_value_heads: 2, tie_word_embeddings: false });
  expect(checkpoint.config.rms_norm_eps).toBe(1e-5);
  expect(checkpoint.notes[0]).toMatch(/quantized already \(Q8_0/);
  const { tiny_llama_mixed: golden } = JSON.parse(readFileSync(join(folder, "expected.json"), "utf8"));
  const file = new Uint8Array(readFileSync(join(folder, "tiny-llama-mixed.expected.safetensors")));
  const { tensors } = await readSafetensorsHeader(memoryFile("expected", file));
  const { offset, sizeBytes } = tensors.get("logits")!;
  const wanted = toFloat32(file.slice(offset, offset + sizeBytes), "f32");
  expect(maxDifference(await logitsOf(checkpoint, golden.input_ids), wanted)).toBeLessThan(MIXED_TOLERANCE);
});

const folders = [repoPath("test/golden/models"), sharedPath("golden/models")].filter((folder) => !isMissing(folder));
const families = new Map(
  folders.flatMap((folder) =>
    readdirSync(folder)
      .filter((name) => existsSync(join(folder, name, "golden.json")))
      .map((name) => [name, join(folder, name)] as const),
  ),
);

describe.each([...families])("%s, as llama.cpp converts it", (name, folder) => {
  test("gives back every tensor and the reference's logits", async () => {
    const original = await openHfFolder(nodeFolder(folder));
    const checkpoint = await open(await toGguf(original));
    const prefix = name === "gpt2-hubkeys" ? "transformer." : "";
    for (const tensor of original.tensors.keys()) {
      if (/\.attn\.(masked_)?bias$/.test(tensor)) continue; // gpt2's mask buffers
      const wanted = await original.readTensor(tensor);
      const got = await checkpoint.readTensor(prefix + tensor);
      expect(got.shape, tensor).toEqual(wanted.shape);
      expect(maxDifference(got.data, wanted.data), tensor).toBeLessThanOrEqual(
        /^gemma/.test(name) && tensor.endsWith("norm.weight") ? PLUS_ONE_TOLERANCE * 4 : 0,
      );
      const [rows, end] = [got.shape[0], Math.min(3, got.shape[0])];
      const part = await checkpoint.readRows!(prefix + tensor, 1, end);
      const size = got.data.length / rows;
      expect(part.data, `rows of ${tensor}`).toEqual(got.data.slice(size, end * size));
    }
    const golden = await readGolden(folder);
    await original.dispose();
    // the one key of these that a GGUF does not hold: llama.cpp takes the head size in its place
    const config = { query_pre_attn_scalar: original.config.query_pre_attn_scalar };
    expect(
      maxDifference(
        await logitsOf(withConfig(checkpoint, name === "gemma2" ? config : {}), [...golden.inputIds]),
        golden.logits.data,
      ),
    ).toBeLessThan(LOGITS_TOLERANCE);
  });
});

describe("what is not a model Nibble reads says why", () => {
  const f32 = (name: string, shape: number[]): GgufTensorToWrite => ({
    name,
    type: "F32",
    shape,
    bytes: new Uint8Array(shape.reduce((product, dim) => product * dim, 4)),
  });
  const u32 = (value: number) => ({ type: "u32", value }) as const;
  const metadata: GgufEntries = {
    "general.architecture": "llama",
    "llama.block_count": u32(1),
    "llama.context_length": u32(64),
    "llama.embedding_length": u32(32),
    "llama.feed_forward_length": u32(64),
    "llama.attention.head_count": u32(2),
    "llama.attention.layer_norm_rms_epsilon": { type: "f32", value: 1e-5 },
  };
  const tensors = [f32("token_embd.weight", [8, 32]), f32("blk.0.attn_q.weight", [32, 32])];
  async function opened(changes: GgufEntries, list = tensors): Promise<Checkpoint> {
    const sink = memorySink("m");
    await writeGguf(await sink.create("x"), { ...metadata, ...changes }, list);
    return open(sink.files.get("x")!);
  }

  test("the file that the cases below change is fine", async () => {
    await expect(opened({})).resolves.toMatchObject({ config: { model_type: "llama", vocab_size: 8 } });
  });

  const zeros = (length: number) => new Uint8Array(length);
  test.each<[string, GgufEntries, GgufTensorToWrite[], string, RegExp]>([
    [
      "an unknown architecture",
      { "general.architecture": "mamba" },
      tensors,
      "unsupported",
      /"mamba"; Nibble reads llama, granite/,
    ],
    [
      "a key that may change the computation",
      { "llama.attention.temperature_scale": { type: "f32", value: 0.1 } },
      tensors,
      "bad_config",
      /attention\.temperature_scale \(0\.1/,
    ],
    ["a missing key", { "llama.block_count": "one" }, tensors, "bad_config", /block_count is "one"/],
    ["more layers than tensors", { "llama.block_count": u32(2 ** 32 - 1) }, tensors, "bad_config", /only 2 tensors/],
    ["bidirectional attention", { "llama.attention.causal": false }, tensors, "bad_config", /causal is false/],
    ["an unknown scaling", { "llama.rope.scaling.type": "dynamic" }, tensors, "bad_config", /dynamic/],
    [
      "a head size that is not the matrix's",
      { "llama.attention.key_length": u32(12) },
      tensors,
      "bad_config",
      /key_length is 12/,
    ],
    ["an unknown tensor", {}, [...tensors, f32("blk.0.ssm_a.weight", [4])], "unsupported", /ssm_a/],
    ["no embedding", {}, [tensors[1]], "bad_weights", /token_embd/],
    [
      "a type that is not computed",
      {},
      [...tensors, { name: "blk.0.attn_v.weight", type: "Q8_K", shape: [1, 256], bytes: zeros(292) }],
      "unsupported",
      /Q8_K/,
    ],
    ["one part of several", { "split.count": { type: "u16", value: 3 } }, tensors, "not_found", /one of 3 parts/],
  ])("%s", async (_, changes, list, code, message) => {
    await expect(opened(changes, list)).rejects.toMatchObject({ code, message: expect.stringMatching(message) });
  });

  test("yarn and linear scalings come through with every key that they have", async () => {
    const f = (value: number) => ({ type: "f32", value }) as const;
    const yarn = await opened({
      "llama.rope.scaling.type": "yarn",
      "llama.rope.scaling.factor": f(4),
      "llama.rope.scaling.original_context_length": u32(16),
      "llama.rope.scaling.yarn_beta_fast": f(24),
      "llama.rope.scaling.yarn_attn_factor": f(1.25),
    });
    expect(yarn.config.rope_scaling).toEqual({
      rope_type: "yarn",
      factor: 4,
      original_max_position_embeddings: 16,
      beta_fast: 24,
      attention_factor: 1.25,
    });
    const old = await opened({ "llama.rope.scale_linear": f(2) });
    expect(old.config.rope_scaling).toEqual({ rope_type: "linear", factor: 2 });
  });

  test("divisors of rotary frequencies that are not llama3's are kept as they are", async () => {
    const factors: GgufTensorToWrite = {
      name: "rope_freqs.weight",
      type: "F32",
      shape: [8],
      bytes: new Uint8Array(Float32Array.of(1, 1, 2, 3, 3, 4, 4, 5).buffer),
    };
    const { config } = await opened({}, [...tensors, factors]);
    expect(config.rope_scaling).toMatchObject({
      rope_type: "longrope",
      attention_factor: 1,
      short_factor: [1, 1, 2, 3, 3, 4, 4, 5],
    });
    const qwen2 = Object.fromEntries(
      Object.entries(metadata).map(([key, value]) => [key.replace(/^llama/, "qwen2"), value]),
    );
    await expect(opened({ ...qwen2, "general.architecture": "qwen2" }, [...tensors, factors])).rejects.toMatchObject({
      code: "unsupported",
      param: "rope_freqs.weight",
    });
  });

  test("an image encoder in the same file is left out, and a note says so", async () => {
    const list = [...tensors, f32("v.blk.0.attn_q.weight", [4, 4]), f32("mm.input_projection.weight", [4, 4])];
    const checkpoint = await opened({ "llama.vision.block_count": u32(1), "llama.mm.tokens_per_image": u32(4) }, list);
    expect(checkpoint.tensors.size).toBe(2);
    expect(checkpoint.notes).toEqual(["m.gguf is multimodal: its text model is taken, 2 tensors are left out."]);
  });

  test("NaN scales are found when the tensor is read", async () => {
    const bytes = new Uint8Array(32 * 34);
    bytes[1] = 0x7e; // the first block's scale is NaN
    const list: GgufTensorToWrite[] = [
      tensors[0],
      { name: "blk.0.attn_q.weight", type: "Q8_0", shape: [32, 32], bytes },
    ];
    const checkpoint = await opened({}, list);
    await expect(checkpoint.readTensor("model.layers.0.self_attn.q_proj.weight")).rejects.toMatchObject({
      code: "bad_weights",
    });
  });
});

describe("real files", () => {
  const smollm2 = modelPath("smollm2/smollm2-135m-instruct-q4_1.gguf");
  test.skipIf(isMissing(smollm2))(
    "SmolLM2's GGUF holds OUT/hf's function: embedding equal, o(v) equal up to float16",
    async () => {
      const gguf = await openGgufCheckpoint([await nodeFile(smollm2)], noTokenizer);
      const hf = await openHfFolder(nodeFolder(modelPath("smollm2/hf")));
      const { torch_dtype: _, pad_token_id: __, ...wanted } = hf.config;
      for (const key of [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "tie_word_embeddings",
        "vocab_size",
        "model_type",
      ]) {
        expect(gguf.config[key], key).toEqual(wanted[key]);
      }
      expect([...gguf.tensors.keys()].sort()).toEqual([...hf.tensors.keys()].sort());
      await expectSameFunction(gguf, hf, { heads: 9, kvHeads: 3, headDim: 64 });
      await Promise.all([gguf.dispose(), hf.dispose()]);
    },
  );

  const qwen = modelPath("qwen/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf");
  test.skipIf(isMissing(qwen))("Qwen2.5-Coder's GGUF likewise, its head untied there", async () => {
    const gguf = await openGgufCheckpoint([await nodeFile(qwen)], noTokenizer);
    const hf = await openHfFolder(nodeFolder(modelPath("qwen/hf")));
    expect(gguf.config).toMatchObject({
      model_type: "qwen2",
      tie_word_embeddings: false,
      rope_theta: 1e6,
      rms_norm_eps: 1e-6,
    });
    expect([...gguf.tensors.keys()].filter((name) => name !== "lm_head.weight").sort()).toEqual(
      [...hf.tensors.keys()].sort(),
    );
    await expectSameFunction(gguf, hf, { heads: 14, kvHeads: 2, headDim: 64 });
    await Promise.all([gguf.dispose(), hf.dispose()]);
  });
});

/**
 * prepare.py rescales channels and moves the inverse into the layer before: gains times columns, and o times v, are
 * what stays the same. float16 rounds each factor to 2^-11.
 */
async function expectSameFunction(
  gguf: Checkpoint,
  hf: Checkpoint,
  { heads, kvHeads, headDim }: { heads: number; kvHeads: number; headDim: number },
): Promise<void> {
  const relative = 4 * 2 ** -11;
  for (const layer of [0, Number(gguf.config.num_hidden_layers) - 1]) {
    const at = `model.layers.${layer}`;
    const read = async (checkpoint: Checkpoint, name: string) =>
      (await checkpoint.readTensor(`${at}.${name}.weight`)).data;
    for (const projection of ["q_proj", "k_proj"]) {
      const [gain, weight] = [await read(gguf, "input_layernorm"), await read(gguf, `self_attn.${projection}`)];
      const [hfGain, hfWeight] = [await read(hf, "input_layernorm"), await read(hf, `self_attn.${projection}`)];
      expectClose(
        weight.map((w, i) => w * gain[i % gain.length]),
        hfWeight.map((w, i) => w * hfGain[i % gain.length]),
        relative,
      );
    }
    // one column of o times the row of v that feeds it, for a channel of every query head
    const shared = heads / kvHeads;
    const [o, v] = [await read(gguf, "self_attn.o_proj"), await read(gguf, "self_attn.v_proj")];
    const [hfO, hfV] = [await read(hf, "self_attn.o_proj"), await read(hf, "self_attn.v_proj")];
    const [gain, hfGain] = [await read(gguf, "input_layernorm"), await read(hf, "input_layernorm")];
    const width = heads * headDim;
    for (let head = 0; head < heads; head++) {
      const channel = head * headDim + 5;
      const source = Math.floor(head / shared) * headDim + 5;
      const product = (out: Float32Array, value: Float32Array, norm: Float32Array) =>
        Float32Array.from(
          { length: gain.length },
          (_, i) => out[7 * width + channel] * value[source * gain.length + i] * norm[i],
        );
      expectClose(product(o, v, gain), product(hfO, hfV, hfGain), relative);
    }
  }
}

function expectClose(ours: Float32Array, theirs: Float32Array, relative: number): void {
  const scale = ours.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
  for (let i = 0; i < ours.length; i++) {
    // float16's smallest steps matter for the smallest weights
    if (Math.abs(ours[i] - theirs[i]) > relative * Math.abs(ours[i]) + 1e-4 * scale) {
      expect(theirs[i], `element ${i}`).toBeCloseTo(ours[i], 6);
    }
  }
}
