/**
 * llama2.c's .bin (github.com/karpathy/llama2.c, export.py): seven int32 and then every weight in float32, one kind
 * after the other over all layers. Version 0 has no magic; version 1 begins with "ak42". Rotary pairs are interleaved
 * there and split in halves in Hugging Face's layout, so the rows of q and k are moved.
 */
import { NibbleError } from "../errors.ts";
import type { ByteSource } from "../files.ts";
import { toFloat32 } from "../tensor/dtypes.ts";
import type { Checkpoint, TensorInfo } from "./checkpoint.ts";
import { llama2cTokenizerFiles } from "./llama2c-tokenizer.ts";
import { checkFinite, checkRows, sourceFile } from "./read-floats.ts";

interface Header {
  readonly dim: number;
  readonly hiddenDim: number;
  readonly layers: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly vocabSize: number;
  readonly seqLen: number;
  readonly tied: boolean;
  /** Bytes before the first weight. */
  readonly sizeBytes: number;
  readonly version: 0 | 1;
}

/** Opens a llama2.c model and the tokenizer beside it, if there is one; errors: `bad_file`, `unsupported`. */
export async function openLlama2c(source: ByteSource, tokenizer?: ByteSource): Promise<Checkpoint> {
  const header = await readHeader(source);
  const places = placeWeights(header, source);
  const tensors = new Map<string, TensorInfo>();
  for (const [name, { shape }] of places) tensors.set(name, { name, storedAs: "f32", shape });
  const readTensor: Checkpoint["readTensor"] = async (name) => {
    const place = places.get(name);
    if (!place) throw new NibbleError("not_found", `${source.name} has no tensor "${name}".`, { param: name });
    const { offset, shape, heads } = place;
    const count = shape.reduce((product, dim) => product * dim, 1);
    const data = toFloat32(await source.read(offset, count * 4), "f32");
    checkFinite(data, source.name, name);
    return { shape, data: heads ? splitHalves(data, shape[0], heads) : data };
  };
  return {
    name: source.name,
    config: configOf(header),
    tensors,
    readTensor,
    async readRows(name, start, end) {
      const { shape, data } = await readTensor(name);
      checkRows(shape, start, end, source.name, name);
      const length = data.length / shape[0];
      return { shape: [end - start, ...shape.slice(1)], data: data.slice(start * length, end * length) };
    },
    sideFiles: tokenizer ? await llama2cTokenizerFiles(tokenizer, header.vocabSize, header.seqLen) : new Map(),
    sources: [source, ...(tokenizer ? [tokenizer] : [])].map((file) =>
      sourceFile(file.name.replace(/^.*[/\\]/, ""), file),
    ),
    notes: tokenizer
      ? []
      : [`${source.name} has no tokenizer beside it (tokenizer.bin or tok${header.vocabSize}.bin).`],
    dispose: async () => {
      await Promise.all([source.close?.(), tokenizer?.close?.()]);
    },
  };
}

async function readHeader(source: ByteSource): Promise<Header> {
  const bad = (found: string) => new NibbleError("bad_file", `${source.name} is no llama2.c model: ${found}.`);
  if (source.sizeBytes < 28) throw bad(`it has only ${source.sizeBytes} bytes`);
  const bytes = await source.read(0, Math.min(256, source.sizeBytes));
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (view.getUint16(0, false) === 0x504b) {
    // "PK": PyTorch's zip
    throw new NibbleError(
      "unsupported",
      `${source.name} is a PyTorch pickle, which can run code when it is opened; convert it to safetensors.`,
    );
  }
  const hasMagic = view.getUint32(0, true) === 0x616b3432; // "ak42"
  const version = hasMagic ? view.getInt32(4, true) : 0;
  if (hasMagic && (version !== 1 || bytes.length < 256)) {
    throw new NibbleError("unsupported", `${source.name}: llama2.c version ${version}; Nibble reads versions 0 and 1.`);
  }
  const at = hasMagic ? 8 : 0;
  const [dim, hiddenDim, layers, heads, kvHeads, signedVocab, seqLen] = Array.from({ length: 7 }, (_, i) =>
    view.getInt32(at + 4 * i, true),
  );
  const vocabSize = Math.abs(signedVocab); // version 0 marks an untied head by its sign
  const counts = { dim, hiddenDim, layers, heads, kvHeads, vocabSize, seqLen };
  for (const [name, count] of Object.entries(counts)) {
    if (count < 1) throw bad(`its header says ${name} ${count}`);
  }
  // the smallest layer has two norms of `dim` float32 values: a count beyond that is not worth walking through
  if (layers * dim * 8 > source.sizeBytes) throw bad(`its header says ${layers} layers of ${dim} channels`);
  if (dim % heads || heads % kvHeads || (dim / heads) % 2) {
    throw bad(`${heads} heads and ${kvHeads} kv heads do not go into ${dim} channels`);
  }
  const tied = hasMagic ? view.getUint8(36) === 1 : signedVocab > 0;
  return { ...counts, tied, sizeBytes: hasMagic ? 256 : 28, version: version as 0 | 1 };
}

interface Place {
  readonly offset: number;
  readonly shape: readonly number[];
  /** Heads whose rotary rows are interleaved. */
  readonly heads: number | undefined;
}

function placeWeights(header: Header, source: ByteSource): Map<string, Place> {
  const { dim, hiddenDim, layers, heads, kvHeads, vocabSize, seqLen, tied, version } = header;
  const kvDim = (dim / heads) * kvHeads;
  const places = new Map<string, Place>();
  let offset = header.sizeBytes;
  const put = (name: string, shape: readonly number[], rotary?: number) => {
    places.set(name, { offset, shape, heads: rotary });
    offset += 4 * shape.reduce((product, dim) => product * dim, 1);
  };
  const perLayer = (name: string, shape: readonly number[], rotary?: number) => {
    for (let layer = 0; layer < layers; layer++) put(`model.layers.${layer}.${name}.weight`, shape, rotary);
  };
  const embedding = () => put("model.embed_tokens.weight", [vocabSize, dim]);
  const attentionNorms = () => perLayer("input_layernorm", [dim]);
  const mlpNorms = () => perLayer("post_attention_layernorm", [dim]);
  const attention = () => {
    perLayer("self_attn.q_proj", [dim, dim], heads);
    perLayer("self_attn.k_proj", [kvDim, dim], kvHeads);
    perLayer("self_attn.v_proj", [kvDim, dim]);
    perLayer("self_attn.o_proj", [dim, dim]);
  };
  const mlp = () => {
    perLayer("mlp.gate_proj", [hiddenDim, dim]);
    perLayer("mlp.down_proj", [dim, hiddenDim]);
    perLayer("mlp.up_proj", [hiddenDim, dim]);
  };
  const lastNorm = () => put("model.norm.weight", [dim]);
  if (version === 0) {
    embedding();
    attentionNorms();
    attention();
    mlpNorms();
    mlp();
    lastNorm();
    offset += 4 * seqLen * (dim / heads); // cos and sin tables, which Nibble computes
  } else {
    attentionNorms();
    mlpNorms();
    lastNorm();
    embedding();
    attention();
    mlp();
  }
  if (!tied) put("lm_head.weight", [vocabSize, dim]);
  if (offset === source.sizeBytes) return places;
  throw new NibbleError(
    "bad_file",
    `${source.name} is no llama2.c model, or was cut off: its header asks for ${offset} bytes, it has ${source.sizeBytes}.`,
  );
}

/** Rows of each head from pairs (x0, y0, x1, y1, ...) to halves (x0, x1, ..., y0, y1, ...). */
function splitHalves(data: Float32Array, rows: number, heads: number): Float32Array {
  const moved = new Float32Array(data.length);
  const length = data.length / rows;
  const headDim = rows / heads;
  for (let row = 0; row < rows; row++) {
    const within = row % headDim;
    const to = row - within + (within % 2) * (headDim / 2) + (within >> 1);
    moved.set(data.subarray(row * length, (row + 1) * length), to * length);
  }
  return moved;
}

function configOf({
  dim,
  hiddenDim,
  layers,
  heads,
  kvHeads,
  vocabSize,
  seqLen,
  tied,
}: Header): Record<string, unknown> {
  return {
    architectures: ["LlamaForCausalLM"],
    model_type: "llama",
    torch_dtype: "float32",
    hidden_act: "silu",
    hidden_size: dim,
    intermediate_size: hiddenDim,
    num_hidden_layers: layers,
    num_attention_heads: heads,
    num_key_value_heads: kvHeads,
    head_dim: dim / heads,
    max_position_embeddings: seqLen,
    rms_norm_eps: 1e-5, // run.c's constant, as is the base of its rotary table
    rope_theta: 10000,
    rope_scaling: null,
    tie_word_embeddings: tied,
    vocab_size: vocabSize,
    bos_token_id: 1,
    eos_token_id: 2,
  };
}
