import { describe, expect, test } from "vitest";
import { openHfFolder } from "../../src/checkpoint/hf-folder.ts";
import { type TensorToWrite, writeSafetensors } from "../../src/checkpoint/safetensors.ts";
import { memoryFolder, memorySink } from "../../src/memory-files.ts";
import { loadTokenizer } from "../../src/tokenizer/hf-tokenizer.ts";

const text = (value: unknown) => new TextEncoder().encode(typeof value === "string" ? value : JSON.stringify(value));

/** A float32 tensor holding 0, 1, 2, ... from `first` on. */
function counting(name: string, shape: number[], first = 0): TensorToWrite {
  const count = shape.reduce((product, dim) => product * dim, 1);
  return {
    name,
    dtype: "f32",
    shape,
    bytes: () => new Uint8Array(Float32Array.from({ length: count }, (_, i) => first + i).buffer),
  };
}

async function safetensors(...tensors: TensorToWrite[]): Promise<Uint8Array> {
  const sink = memorySink("m");
  await writeSafetensors(await sink.create("x"), tensors);
  return sink.files.get("x")!;
}

const open = (files: Record<string, Uint8Array>) => openHfFolder(memoryFolder("model", new Map(Object.entries(files))));
const config = text({ model_type: "llama" });

describe("weights", () => {
  test("a tensor and a few of its rows", async () => {
    const model = await open({ "config.json": config, "model.safetensors": await safetensors(counting("w", [4, 3])) });
    expect(model.tensors.get("w")).toEqual({ name: "w", storedAs: "f32", shape: [4, 3] });
    expect([...(await model.readTensor("w")).data]).toEqual([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]);
    const rows = await model.readRows!("w", 1, 3);
    expect(rows.shape).toEqual([2, 3]);
    expect([...rows.data]).toEqual([3, 4, 5, 6, 7, 8]);
  });

  test("shards, by the index and without one", async () => {
    const files = {
      "config.json": config,
      "model-00001-of-00002.safetensors": await safetensors(counting("a", [2])),
      "model-00002-of-00002.safetensors": await safetensors(counting("b", [2], 5)),
    };
    const weight_map = { a: "model-00001-of-00002.safetensors", b: "model-00002-of-00002.safetensors" };
    for (const model of [
      await open(files),
      await open({ ...files, "model.safetensors.index.json": text({ weight_map }) }),
    ]) {
      expect([...(await model.readTensor("b")).data]).toEqual([5, 6]);
      expect(model.sources.map(({ name }) => name)).toEqual(["config.json", ...Object.values(weight_map)]);
    }
  });

  test("a missing shard is named, with an index and without", async () => {
    const files = {
      "config.json": config,
      "model-00001-of-00002.safetensors": await safetensors(counting("a", [2])),
    };
    const weight_map = { a: "model-00001-of-00002.safetensors", b: "model-00002-of-00002.safetensors" };
    await expect(open({ ...files, "model.safetensors.index.json": text({ weight_map }) })).rejects.toMatchObject({
      code: "not_found",
      message: expect.stringContaining("model-00002-of-00002.safetensors"),
    });
    await expect(open(files)).rejects.toMatchObject({
      code: "not_found",
      message: expect.stringContaining("1 of 2 shards"),
    });
  });

  test("an index that names a tensor its shard has not is refused", async () => {
    const files = {
      "config.json": config,
      "model.safetensors.index.json": text({ weight_map: { a: "x.safetensors", b: "x.safetensors" } }),
      "x.safetensors": await safetensors(counting("a", [2])),
    };
    await expect(open(files)).rejects.toMatchObject({ code: "bad_file", message: expect.stringContaining('"b"') });
  });

  test.each([Number.NaN, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY])(
    "%d among the weights is refused when read",
    async (value) => {
      const bytes = () => new Uint8Array(Float32Array.of(1, value, 2).buffer);
      const weights = await safetensors({ name: "w", dtype: "f32", shape: [3], bytes });
      const model = await open({ "config.json": config, "model.safetensors": weights });
      await expect(model.readTensor("w")).rejects.toMatchObject({ code: "bad_weights", param: "w" });
    },
  );

  test("an unknown tensor is not_found", async () => {
    const model = await open({ "config.json": config, "model.safetensors": await safetensors(counting("w", [1])) });
    await expect(model.readTensor("v")).rejects.toMatchObject({ code: "not_found", param: "v" });
  });

  test("hashes are SHA-256 of the files", async () => {
    const weights = await safetensors(counting("w", [1]));
    const model = await open({ "config.json": config, "model.safetensors": weights });
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", weights.slice()));
    expect(await model.sources[1].sha256()).toBe(
      Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join(""),
    );
  });
});

describe("what is no checkpoint says what it is", () => {
  test.each<[string, Record<string, Uint8Array>, string, RegExp]>([
    ["an empty folder", {}, "not_found", /empty/],
    ["an adapter", { "adapter_config.json": text({}) }, "not_found", /--adapter/],
    ["no weights", { "config.json": config }, "not_found", /no model\.safetensors/],
    ["pickles", { "config.json": config, "pytorch_model.bin": text("") }, "unsupported", /pickle/],
    ["an export", { "config.json": config, "onnx/model_q4.onnx": text("") }, "unsupported", /chat, serve/],
    [
      "Mistral's layout",
      { "config.json": config, "consolidated.safetensors": text("") },
      "unsupported",
      /consolidated/,
    ],
    ["config.json with no JSON", { "config.json": text("{") }, "bad_file", /config\.json is no JSON/],
    ["config.json with an array", { "config.json": text([]) }, "bad_file", /object/],
    [
      "quantized weights",
      { "config.json": text({ model_type: "llama", quantization_config: { quant_method: "gptq" } }) },
      "unsupported",
      /gptq/,
    ],
  ])("%s", async (_, files, code, message) => {
    await expect(open(files)).rejects.toMatchObject({ code, message: expect.stringMatching(message) });
  });

  test("no model_type", async () => {
    const files = { "config.json": text({}), "model.safetensors": await safetensors() };
    await expect(open(files)).rejects.toMatchObject({ code: "bad_config", param: "model_type" });
  });
});

test("tokenizer, template and licence travel along, other files do not", async () => {
  const model = await open({
    "config.json": config,
    "model.safetensors": await safetensors(),
    "tokenizer.json": text({ a: 1 }),
    "chat_template.jinja": text("{{ messages }}"),
    LICENSE: text("Apache"),
    "README.md": text("hi"),
    "onnx/tokenizer.json": text({}),
  });
  expect([...model.sideFiles.keys()]).toEqual(["LICENSE", "chat_template.jinja", "tokenizer.json"]);
  expect(new TextDecoder().decode(model.sideFiles.get("chat_template.jinja"))).toBe("{{ messages }}");
});

/** What was filled in: the keys that this test did not give. */
function filledIn(config: Readonly<Record<string, unknown>>): Record<string, unknown> {
  return Object.fromEntries(Object.entries(config).filter(([key]) => /^(vocab|num|max|rms)/.test(key)));
}

test("a tokenizer that is only there as tokenizer.model is said, and refused where one is needed", async () => {
  const files = { "config.json": config, "model.safetensors": await safetensors(), "tokenizer.model": text("spm") };
  const model = await open(files);
  expect(model.notes[0]).toMatch(/only there as tokenizer\.model/);
  expect(() => loadTokenizer(model.sideFiles)).toThrow(/tokenizer\.model alone will not do: AutoTokenizer/);
});

describe("the text model of a multimodal checkpoint", () => {
  const nested = {
    model_type: "gemma3",
    text_config: { model_type: "gemma3_text", num_hidden_layers: 1 },
    eos_token_id: [1, 106],
  };
  const spellings: [string, string[]][] = [
    [
      "language_model.model.",
      [
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.0.mlp.up_proj.weight",
        "language_model.model.norm.weight",
        "language_model.lm_head.weight",
      ],
    ],
    [
      "model.language_model.",
      [
        "model.language_model.embed_tokens.weight",
        "model.language_model.layers.0.mlp.up_proj.weight",
        "model.language_model.norm.weight",
        "lm_head.weight",
      ],
    ],
    [
      "model.text_model.",
      [
        "model.text_model.embed_tokens.weight",
        "model.text_model.layers.0.mlp.up_proj.weight",
        "model.text_model.norm.weight",
        "lm_head.weight",
      ],
    ],
    [
      "text_model.model.",
      [
        "text_model.model.embed_tokens.weight",
        "text_model.model.layers.0.mlp.up_proj.weight",
        "text_model.model.norm.weight",
        "text_model.lm_head.weight",
      ],
    ],
    [
      "model.",
      ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"],
    ],
  ];
  test.each(spellings)("under %s", async (_, names) => {
    const vision = [
      "visual.layers.0.mlp.up_proj.weight",
      "model.vision_tower.encoder.layers.0.x.weight",
      "multi_modal_projector.linear_1.weight",
    ];
    const weights = await safetensors(...[...names, ...vision].map((name, i) => counting(name, [1, 1], i)));
    const model = await open({ "config.json": text(nested), "model.safetensors": weights });
    const wanted = [
      "model.embed_tokens.weight",
      "model.layers.0.mlp.up_proj.weight",
      "model.norm.weight",
      "lm_head.weight",
    ];
    expect([...model.tensors.keys()].sort()).toEqual([...wanted].sort());
    expect([...(await model.readTensor("lm_head.weight")).data]).toEqual([3]);
    expect(model.config).toMatchObject({
      model_type: "gemma3_text",
      num_hidden_layers: 1,
      eos_token_id: [1, 106],
      tie_word_embeddings: false,
    });
    expect(model.notes[0]).toMatch(/gemma3_text.*3 other tensors/);
  });

  test("Qwen2-VL's flat config is qwen2 on text, its rotary sections without effect", async () => {
    const flat = {
      model_type: "qwen2_vl",
      hidden_size: 4,
      rope_scaling: { type: "mrope", mrope_section: [1, 1, 0] },
      vision_config: { depth: 2 },
      vision_start_token_id: 7,
      image_token_id: 8,
    };
    const names = ["model.embed_tokens.weight", "visual.blocks.0.norm1.weight"];
    const weights = await safetensors(...names.map((name) => counting(name, [3, 4])));
    const model = await open({ "config.json": text(flat), "model.safetensors": weights });
    expect([...model.tensors.keys()]).toEqual(["model.embed_tokens.weight"]);
    expect(model.config).toEqual({
      ...filledIn(model.config),
      model_type: "qwen2",
      hidden_size: 4,
      rope_scaling: { rope_type: "default" },
      rope_parameters: undefined,
      tie_word_embeddings: true,
    });
  });

  test("defaults of its class are filled in, and a missing head means a tied one", async () => {
    const weights = await safetensors(counting("language_model.model.embed_tokens.weight", [5, 6]));
    const model = await open({ "config.json": text(nested), "model.safetensors": weights });
    expect(model.config).toMatchObject({
      num_attention_heads: 8,
      head_dim: 256,
      vocab_size: 5,
      hidden_size: 6,
      tie_word_embeddings: true,
    });
  });
});
