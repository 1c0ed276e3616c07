import { describe, expect, test } from "vitest";
import type { Checkpoint } from "../../src/checkpoint/checkpoint.ts";
import { openHfFolder } from "../../src/checkpoint/hf-folder.ts";
import { withAdapter } from "../../src/checkpoint/lora.ts";
import { writeSafetensors } from "../../src/checkpoint/safetensors.ts";
import { memoryFolder, memorySink } from "../../src/memory-files.ts";

/** Sums of up to 8 float32 products, in another order. */
const TOLERANCE = 1e-6;

type Matrix = readonly number[][];

let seed = 1;
/** Numbers in -1 .. 1, float32 exactly. */
function random(): number {
  seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
  return Math.fround(seed / 2 ** 31 - 1);
}
const matrix = (rows: number, cols: number): Matrix =>
  Array.from({ length: rows }, () => Array.from({ length: cols }, random));

async function safetensors(tensors: Record<string, Matrix | readonly number[]>): Promise<Uint8Array> {
  const sink = memorySink("m");
  const list = Object.entries(tensors).map(([name, value]) => {
    const flat = value.flat() as number[];
    const shape = Array.isArray(value[0]) ? [value.length, value[0].length] : [value.length];
    return { name, dtype: "f32" as const, shape, bytes: () => new Uint8Array(Float32Array.from(flat).buffer) };
  });
  await writeSafetensors(await sink.create("x"), list);
  return sink.files.get("x")!;
}

const text = (value: unknown) => new TextEncoder().encode(JSON.stringify(value));

const W = { q: matrix(6, 4), up: matrix(8, 4), embed: matrix(10, 4) };
const Q = "model.layers.0.self_attn.q_proj";
const UP = "model.layers.0.mlp.up_proj";
const EMBED = "model.embed_tokens";

async function base(extra: Record<string, Matrix | readonly number[]> = {}, config: object = {}): Promise<Checkpoint> {
  const weights = {
    [`${Q}.weight`]: W.q,
    [`${Q}.bias`]: [1, 2, 3, 4, 5, 6],
    [`${UP}.weight`]: W.up,
    [`${EMBED}.weight`]: W.embed,
    ...extra,
  };
  return openHfFolder(
    memoryFolder(
      "base",
      new Map([
        ["config.json", text({ model_type: "llama", vocab_size: 10, tie_word_embeddings: true, ...config })],
        ["model.safetensors", await safetensors(weights)],
      ]),
    ),
  );
}

async function adapted(
  config: object,
  tensors: Record<string, Matrix | readonly number[]>,
  onto?: Checkpoint,
): Promise<Checkpoint> {
  const files = new Map([
    ["adapter_config.json", text({ peft_type: "LORA", r: 2, lora_alpha: 3, ...config })],
    [
      "adapter_model.safetensors",
      await safetensors(
        Object.fromEntries(Object.entries(tensors).map(([name, value]) => [`base_model.model.${name}`, value])),
      ),
    ],
  ]);
  return withAdapter(onto ?? (await base()), memoryFolder("adapter", files));
}

/** W + scaling · B·A, in float64, as PEFT's get_delta_weight states it. */
function merge(w: Matrix, a: Matrix, b: Matrix, scaling: number): number[] {
  return w.flatMap((row, i) => row.map((x, j) => x + scaling * b[i].reduce((sum, bk, k) => sum + bk * a[k][j], 0)));
}
const turn = (m: Matrix): Matrix => m[0].map((_, j) => m.map((row) => row[j]));

async function expectTensor(checkpoint: Checkpoint, name: string, wanted: readonly number[]): Promise<void> {
  const { data, shape } = await checkpoint.readTensor(name);
  expect(data.length).toBe(wanted.length);
  for (let i = 0; i < wanted.length; i++)
    expect(Math.abs(data[i] - wanted[i]), `${name}[${i}]`).toBeLessThan(TOLERANCE);
  const part = await checkpoint.readRows!(name, 1, 3);
  const length = data.length / shape[0];
  expect([...part.data]).toEqual([...data.slice(length, 3 * length)]);
}

const [aQ, bQ] = [matrix(2, 4), matrix(6, 2)];
const loraQ = { [`${Q}.lora_A.weight`]: aQ, [`${Q}.lora_B.weight`]: bQ };

describe("merged weights equal PEFT's arithmetic", () => {
  test("alpha / r", async () => {
    const checkpoint = await adapted({}, loraQ);
    await expectTensor(checkpoint, `${Q}.weight`, merge(W.q, aQ, bQ, 3 / 2));
    await expectTensor(checkpoint, `${UP}.weight`, W.up.flat());
    expect(checkpoint.config).toMatchObject({ tie_word_embeddings: true, vocab_size: 10 });
  });

  test("alpha / sqrt(r) with rsLoRA", async () => {
    await expectTensor(await adapted({ use_rslora: true }, loraQ), `${Q}.weight`, merge(W.q, aQ, bQ, 3 / Math.sqrt(2)));
  });

  test("rank and alpha of single modules", async () => {
    const [a, b] = [matrix(3, 4), matrix(8, 3)];
    const patterns = { rank_pattern: { "mlp.up_proj": 3 }, alpha_pattern: { "layers\\.\\d+\\.mlp\\.up_proj": 12 } };
    const checkpoint = await adapted(patterns, { ...loraQ, [`${UP}.lora_A.weight`]: a, [`${UP}.lora_B.weight`]: b });
    await expectTensor(checkpoint, `${UP}.weight`, merge(W.up, a, b, 12 / 3));
    await expectTensor(checkpoint, `${Q}.weight`, merge(W.q, aQ, bQ, 3 / 2));
  });

  test("fan_in_fan_out: the base weight is (in, out)", async () => {
    const conv = "transformer.h.0.attn.c_attn";
    const w = matrix(4, 6);
    const checkpoint = await adapted(
      { fan_in_fan_out: true },
      { [`${conv}.lora_A.weight`]: aQ, [`${conv}.lora_B.weight`]: bQ },
      await base({ [`${conv}.weight`]: w }),
    );
    await expectTensor(checkpoint, `${conv}.weight`, turn(merge6(turn(w))).flat());
    function merge6(m: Matrix): Matrix {
      const flat = merge(m, aQ, bQ, 3 / 2);
      return m.map((row, i) => flat.slice(i * row.length, (i + 1) * row.length));
    }
  });

  test("DoRA: rows get the trained lengths", async () => {
    const m = [1, 2, 3, 4, 5, 6];
    const checkpoint = await adapted({ use_dora: true }, { ...loraQ, [`${Q}.lora_magnitude_vector`]: m });
    const sum = merge(W.q, aQ, bQ, 3 / 2);
    const wanted = m.flatMap((length, i) => {
      const row = sum.slice(i * 4, i * 4 + 4);
      return row.map((x) => (x * length) / Math.hypot(...row));
    });
    await expectTensor(checkpoint, `${Q}.weight`, wanted);
  });

  test("an embedding's A and B, the head then apart", async () => {
    const [a, b] = [matrix(2, 10), matrix(4, 2)];
    const checkpoint = await adapted({}, { [`${EMBED}.lora_embedding_A`]: a, [`${EMBED}.lora_embedding_B`]: b });
    const wanted = W.embed.map((row, i) => row.map((x, j) => x + (3 / 2) * (a[0][i] * b[j][0] + a[1][i] * b[j][1])));
    await expectTensor(checkpoint, `${EMBED}.weight`, wanted.flat());
    await expectTensor(checkpoint, "lm_head.weight", W.embed.flat());
    expect(checkpoint.config.tie_word_embeddings).toBe(false);
  });

  test("a head of its own where base and embedding are tied", async () => {
    const [a, b] = [matrix(2, 4), matrix(10, 2)];
    const checkpoint = await adapted({}, { "lm_head.lora_A.weight": a, "lm_head.lora_B.weight": b });
    await expectTensor(checkpoint, "lm_head.weight", merge(W.embed, a, b, 3 / 2));
    await expectTensor(checkpoint, `${EMBED}.weight`, W.embed.flat());
    expect(checkpoint.config.tie_word_embeddings).toBe(false);
  });

  test("whole weights (modules_to_save) and biases replace the base's; added tokens widen the vocabulary", async () => {
    const wider = matrix(12, 4);
    const checkpoint = await adapted(
      { bias: "lora_only" },
      {
        ...loraQ,
        [`${Q}.bias`]: [9, 9, 9, 9, 9, 9],
        [`${EMBED}.weight`]: wider,
        "lm_head.weight": wider,
      },
    );
    await expectTensor(checkpoint, `${EMBED}.weight`, wider.flat());
    expect((await checkpoint.readTensor(`${Q}.bias`)).data[0]).toBe(9);
    expect(checkpoint.config).toMatchObject({ vocab_size: 12, tie_word_embeddings: false });
  });
});

describe("what does not fit is refused by name", () => {
  test.each<[string, object, Record<string, Matrix>, string, RegExp]>([
    [
      "another model's module",
      {},
      { "model.layers.7.x.lora_A.weight": aQ, "model.layers.7.x.lora_B.weight": bQ },
      "bad_weights",
      /model\.layers\.7\.x\.weight/,
    ],
    ["another rank", { r: 4 }, loraQ, "bad_weights", /rank 4/],
    ["another width", {}, { [`${UP}.lora_A.weight`]: aQ, [`${UP}.lora_B.weight`]: bQ }, "bad_weights", /B \[6,2\]/],
    ["A without B", {}, { [`${Q}.lora_A.weight`]: aQ }, "bad_weights", /A but not B/],
    ["another method", { peft_type: "IA3" }, loraQ, "unsupported", /IA3/],
    ["a start that changes the base", { init_lora_weights: "pissa_niter_4" }, loraQ, "unsupported", /pissa_niter_4/],
    ["an unknown switch", { use_something: true }, loraQ, "unsupported", /use_something/],
    ["an alpha that is no number", { lora_alpha: "x" }, loraQ, "bad_config", /lora_alpha/],
    ["DoRA without magnitudes", { use_dora: true }, loraQ, "bad_weights", /use_dora/],
    ["a tensor of another kind", {}, { [`${Q}.lora_C`]: aQ }, "unsupported", /lora_C/],
  ])("%s", async (_, config, tensors, code, message) => {
    await expect(adapted(config, tensors)).rejects.toMatchObject({ code, message: expect.stringMatching(message) });
  });

  test("a folder that is no adapter", async () => {
    const open = (files: [string, Uint8Array][]) =>
      base().then((model) => withAdapter(model, memoryFolder("x", new Map(files))));
    await expect(open([])).rejects.toMatchObject({ code: "not_found" });
    const config: [string, Uint8Array] = ["adapter_config.json", text({ peft_type: "LORA", r: 1, lora_alpha: 1 })];
    await expect(open([config])).rejects.toMatchObject({ code: "not_found" });
    await expect(open([config, ["adapter_model.bin", text(1)]])).rejects.toMatchObject({ code: "unsupported" });
  });
});

test("everything that the weights follow from is among the sources", async () => {
  const { sources } = await adapted({}, loraQ);
  const stronger = await adapted({ lora_alpha: 4 }, loraQ);
  expect(sources.map(({ name }) => name)).toContain("adapter/adapter_config.json");
  const hashes = (checkpoint: Pick<Checkpoint, "sources">) =>
    Promise.all(checkpoint.sources.map((source) => source.sha256()));
  expect(await hashes(stronger)).not.toEqual(await hashes({ sources }));
});
