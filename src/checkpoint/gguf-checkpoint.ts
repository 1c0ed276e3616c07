/**
 * A GGUF as a checkpoint: Hugging Face names, a config.json made from the metadata, and the conversion's rearrangements
 * undone. Tensors are dequantized when somebody reads them, a piece of rows at a time.
 */
import { NibbleError } from "../errors.ts";
import type { ByteSource } from "../files.ts";
import { elementCount, type FloatTensor } from "../tensor/dtypes.ts";
import type { Checkpoint, TensorInfo } from "./checkpoint.ts";
import { typeInfo } from "./ggml-types.ts";
import { type Gguf, type GgufTensor, type GgufValue, readGguf } from "./gguf.ts";
import { GGUF_ARCHITECTURES, type GgufArchitecture, type Rearranged } from "./gguf-architectures.ts";
import { type GgufModel, type HeadCounts, headCounts } from "./gguf-config.ts";
import { GgufMetadata } from "./gguf-metadata.ts";
import { checkFinite, checkRows, sourceFile } from "./read-floats.ts";

/** Stored bytes read and dequantized at once. */
const PIECE_BYTES = 4 * 2 ** 20;

/** tokenizer.json, tokenizer_config.json and generation_config.json from the metadata alone. */
export type TokenizerFiles = (metadata: ReadonlyMap<string, GgufValue>) => Map<string, Uint8Array>;

interface SourcedTensor extends GgufTensor {
  readonly source: ByteSource;
}

/** A Hugging Face tensor: rows of one of the file's tensors, and what was done to them. */
interface Part {
  readonly from: SourcedTensor;
  readonly firstRow: number;
  readonly shape: readonly number[];
  readonly rearranged: Rearranged | undefined;
  /** Heads that the rows belong to, for "rotary" and "qkvBlocks". */
  readonly heads: number;
}

/** Opens a GGUF, or all parts of a split one in their order; errors: `bad_file`, `bad_config`, `unsupported`. */
export async function openGgufCheckpoint(
  sources: readonly ByteSource[],
  tokenizerFiles: TokenizerFiles,
  name = sources[0].name,
): Promise<Checkpoint> {
  const parts: Gguf[] = [];
  for (const source of sources) parts.push(await readGguf(source));
  const tensors = joinParts(parts, sources);
  const [{ metadata: all }] = parts;
  const metadata = new GgufMetadata(all, name);
  const architecture = architectureOf(metadata);
  if (!tensors.has("token_embd.weight")) {
    throw new NibbleError("bad_weights", `${name} has no tensor token_embd.weight.`, { param: "token_embd.weight" });
  }
  if (metadata.int("block_count") > tensors.size) {
    throw metadata.error(
      "block_count",
      `is ${metadata.int("block_count")}, but there are only ${tensors.size} tensors`,
    );
  }
  const model: GgufModel = { metadata, tensors, ropeFactors: await readRopeFactors(tensors) };
  const config = { architectures: [architecture.className], ...architecture.config(model) };
  const map = nameTensors(architecture, tensors, headCounts(model), metadata);
  metadata.finish();
  const sideFiles = readTokenizer(tokenizerFiles, all, name);

  const infos = new Map<string, TensorInfo>();
  for (const [hf, { from, shape }] of map) infos.set(hf, { name: hf, storedAs: from.type, shape });
  const partOf = (tensor: string): Part => {
    const part = map.get(tensor);
    if (part) return part;
    throw new NibbleError("not_found", `${name} has no tensor "${tensor}".`, { param: tensor });
  };
  const readTensor = async (tensor: string): Promise<FloatTensor> => {
    const part = partOf(tensor);
    const data = await readRows(part.from, part.firstRow, rowCount(part.from, part.shape));
    checkFinite(data, name, tensor);
    return { shape: part.shape, data: restore(part, data) };
  };
  return {
    name,
    config,
    tensors: infos,
    readTensor,
    async readRows(tensor, start, end) {
      const part = partOf(tensor);
      checkRows(part.shape, start, end, name, tensor);
      const shape = [end - start, ...part.shape.slice(1)];
      const perIndex = rowCount(part.from, part.shape) / part.shape[0];
      if (part.rearranged === undefined && Number.isInteger(perIndex)) {
        const data = await readRows(part.from, part.firstRow + start * perIndex, (end - start) * perIndex);
        checkFinite(data, name, tensor);
        return { shape, data };
      }
      const size = elementCount(part.shape.slice(1));
      return { shape, data: (await readTensor(tensor)).data.slice(start * size, end * size) };
    },
    sideFiles,
    sources: sources.map((source) => sourceFile(source.name.replace(/^.*[/\\]/, ""), source)),
    notes: notesOf(metadata, tensors),
    dispose: async () => {
      await Promise.all(sources.map((source) => source.close?.()));
    },
  };
}

/** The tokenizer's own errors do not know the file. */
function readTokenizer(
  tokenizerFiles: TokenizerFiles,
  metadata: ReadonlyMap<string, GgufValue>,
  name: string,
): Map<string, Uint8Array> {
  try {
    return tokenizerFiles(metadata);
  } catch (error) {
    if (!(error instanceof NibbleError)) throw error;
    throw new NibbleError(error.code, `${name}: ${error.message}`, { cause: error, param: error.param });
  }
}

function joinParts(parts: readonly Gguf[], sources: readonly ByteSource[]): Map<string, SourcedTensor> {
  const count = parts[0].metadata.get("split.count") ?? 1;
  if (typeof count === "number" && count > 1 && count !== parts.length) {
    throw new NibbleError("not_found", `${sources[0].name} is one of ${count} parts, but ${parts.length} are there.`);
  }
  const tensors = new Map<string, SourcedTensor>();
  parts.forEach((part, i) => {
    for (const [name, tensor] of part.tensors) {
      if (tensors.has(name)) throw new NibbleError("bad_file", `${sources[i].name}: "${name}" is in another part too.`);
      tensors.set(name, { ...tensor, source: sources[i] });
    }
  });
  return tensors;
}

function architectureOf({ architecture, where }: GgufMetadata): GgufArchitecture {
  if (Object.hasOwn(GGUF_ARCHITECTURES, architecture)) return GGUF_ARCHITECTURES[architecture];
  throw new NibbleError(
    "unsupported",
    `${where}: general.architecture is "${architecture}"; Nibble reads ${Object.keys(GGUF_ARCHITECTURES).join(", ")}.`,
    { param: "general.architecture" },
  );
}

/** An image encoder and its projector, in files that hold everything. */
const IMAGE_TENSOR = /^(v|mm)\./;

function notesOf(metadata: GgufMetadata, tensors: ReadonlyMap<string, GgufTensor>): string[] {
  const notes: string[] = [];
  const images = [...tensors.keys()].filter((name) => IMAGE_TENSOR.test(name)).length;
  if (images > 0)
    notes.push(`${metadata.where} is multimodal: its text model is taken, ${images} tensors are left out.`);
  const bytes = new Map<string, number>();
  for (const { type, sizeBytes } of tensors.values()) bytes.set(type, (bytes.get(type) ?? 0) + sizeBytes);
  const types = [...bytes].sort((a, b) => b[1] - a[1]).map(([type]) => type);
  const lossy = types.filter((type) => /\d/.test(type) && !/^(B?F|I)\d/.test(type));
  if (lossy.length > 0) {
    notes.push(`${metadata.where} is quantized already (${lossy.join(", ")}); its weights are dequantized first.`);
  }
  return notes;
}

const ROPE_FACTORS = ["rope_freqs", "rope_factors_long", "rope_factors_short"];

async function readRopeFactors(tensors: ReadonlyMap<string, SourcedTensor>): Promise<Map<string, number[]>> {
  const factors = new Map<string, number[]>();
  for (const name of ROPE_FACTORS) {
    const tensor = tensors.get(`${name}.weight`);
    if (!tensor) continue;
    const values = await readRows(tensor, 0, rowCount(tensor, tensor.shape));
    checkFinite(values, tensor.source.name, tensor.name);
    factors.set(name, [...values]);
  }
  return factors;
}

/** Every tensor of the file under its Hugging Face name; one that no rule takes is an error. */
function nameTensors(
  architecture: GgufArchitecture,
  tensors: ReadonlyMap<string, SourcedTensor>,
  heads: HeadCounts,
  metadata: GgufMetadata,
): Map<string, Part> {
  const named = new Map<string, Part>();
  for (const tensor of tensors.values()) {
    const match = /^(?:blk\.(\d+)\.)?(.+)\.(weight|bias)$/.exec(tensor.name);
    const [, block, stem, suffix] = match ?? [];
    if (block === undefined && architecture.ropeFactors?.includes(stem)) continue; // config() has read them
    if (IMAGE_TENSOR.test(tensor.name)) continue; // notesOf() says so
    if (stem === "attn_rot_embd") continue; // inverse frequencies of very old files
    const parts = stem === undefined ? [] : partsOf(architecture, tensor, stem, block, suffix, heads);
    if (parts.length === 0) {
      throw new NibbleError(
        "unsupported",
        `${metadata.where}: tensor "${tensor.name}" is not one that Nibble knows for ${metadata.architecture}.`,
        { param: tensor.name },
      );
    }
    if (!typeInfo(tensor.type).dequantize) {
      throw new NibbleError(
        "unsupported",
        `${metadata.where}: tensor "${tensor.name}" is ${tensor.type}, a type that Nibble does not read; ` +
          "take a file of another type (Q4_K_M, Q8_0, F16, ...).",
        { param: tensor.name },
      );
    }
    for (const [name, part] of parts) named.set(name, part);
  }
  return named;
}

function partsOf(
  architecture: GgufArchitecture,
  from: SourcedTensor,
  stem: string,
  block: string | undefined,
  suffix: string,
  heads: HeadCounts,
): [string, Part][] {
  const part = (name: string, of: string, shape: readonly number[] = from.shape, firstRow = 0): [string, Part] => {
    const rearranged =
      suffix === "bias" && architecture.rearranged?.[of] === "transposed" ? undefined : architecture.rearranged?.[of];
    const headCount = of === "attn_k" ? heads.kvHeads : heads.heads;
    return [name, { from, firstRow, shape, rearranged, heads: headCount }];
  };
  if (block === undefined) {
    const name = architecture.outer[stem];
    return name ? [part(`${name}.${suffix}`, stem)] : [];
  }
  const at = `${architecture.blocks}.${block}`;
  const name = architecture.block[stem];
  if (name) return [part(`${at}.${name}.${suffix}`, stem, hfShape(architecture, stem, suffix, from.shape))];

  if (stem === "attn_qkv" && architecture.block.attn_q) {
    const q = heads.heads * heads.headDim;
    const kv = heads.kvHeads * heads.headDim;
    const cut = (of: "attn_q" | "attn_k" | "attn_v", first: number, rows: number) =>
      part(`${at}.${architecture.block[of]}.${suffix}`, of, [rows, ...from.shape.slice(1)], first);
    return [cut("attn_q", 0, q), cut("attn_k", q, kv), cut("attn_v", q + kv, kv)];
  }
  return expertParts(architecture, from, stem, at, suffix, part);
}

/** All experts in one tensor (experts, out, in), gate and up together in it, or one tensor each (old files). */
function expertParts(
  { experts }: GgufArchitecture,
  { shape }: SourcedTensor,
  stem: string,
  at: string,
  suffix: string,
  part: (name: string, of: string, shape: readonly number[], firstRow: number) => [string, Part],
): [string, Part][] {
  const match = /^ffn_(gate_up|gate|up|down)(_exps|\.\d+)$/.exec(stem);
  if (!match || !experts) return [];
  const which = match[1] === "gate_up" ? (["gate", "up"] as const) : [match[1] as "gate" | "up" | "down"];
  if (match[2] !== "_exps") {
    return which.map((w) => part(`${at}.${experts.at}${match[2]}.${experts[w]}.${suffix}`, stem, shape, 0));
  }
  const [count, out, ...rest] = shape;
  const rows = out / which.length;
  return Array.from({ length: count }, (_, expert) =>
    which.map((w, i) =>
      part(`${at}.${experts.at}.${expert}.${experts[w]}.${suffix}`, stem, [rows, ...rest], expert * out + i * rows),
    ),
  ).flat();
}

function hfShape(
  { rearranged }: GgufArchitecture,
  stem: string,
  suffix: string,
  shape: readonly number[],
): readonly number[] {
  if (suffix === "weight" && rearranged?.[stem] === "transposed") return [...shape].reverse();
  if (suffix === "weight" && rearranged?.[stem] === "squeezed") return [shape[0], 1, ...shape.slice(1)];
  if (stem === "ffn_gate_inp_shexp" && shape.length === 1) return [1, shape[0]]; // qwen2_moe's gate is a matrix of one row
  return shape;
}

/** A vector's rows are its elements (vectors are never block-quantized). */
function rowLengthOf({ shape }: GgufTensor): number {
  return shape.length === 1 ? 1 : (shape.at(-1) ?? 1);
}

/** Rows of `from` that a tensor of this shape takes. */
function rowCount(from: GgufTensor, shape: readonly number[]): number {
  return elementCount(shape) / rowLengthOf(from);
}

async function readRows(tensor: SourcedTensor, firstRow: number, rows: number): Promise<Float32Array> {
  const { blockSize, blockBytes, dequantize } = typeInfo(tensor.type);
  const rowLength = rowLengthOf(tensor);
  const total = (rows * rowLength) / blockSize;
  const first = (firstRow * rowLength) / blockSize;
  const values = new Float32Array(rows * rowLength);
  const pieceBlocks = Math.floor(PIECE_BYTES / blockBytes);
  for (let block = 0; block < total; block += pieceBlocks) {
    const count = Math.min(pieceBlocks, total - block);
    const bytes = await tensor.source.read(tensor.offset + (first + block) * blockBytes, count * blockBytes);
    dequantize!(bytes, count, values.subarray(block * blockSize, (block + count) * blockSize));
  }
  return values;
}

/** Undoes the conversion. */
function restore({ rearranged, shape, heads }: Part, data: Float32Array): Float32Array {
  switch (rearranged) {
    case "plusOne":
      return data.map((value) => value - 1);
    case "transposed":
      return transpose(data, shape);
    case "rotary":
      return moveRows(data, shape[0], (row) => rotaryRow(row, shape[0] / heads));
    case "qkvBlocks":
      return moveRows(data, shape[0], (row) => qkvRow(row, shape[0] / 3, heads));
    default:
      return data;
  }
}

/** (out, in) to (in, out); a piece of the row length is in cache, which is enough here. */
function transpose(data: Float32Array, [inputs, outputs]: readonly number[]): Float32Array {
  const turned = new Float32Array(data.length);
  for (let out = 0; out < outputs; out++) {
    for (let i = 0; i < inputs; i++) turned[i * outputs + out] = data[out * inputs + i];
  }
  return turned;
}

/** Row r of the result is row source(r) of the data. */
function moveRows(data: Float32Array, rows: number, source: (row: number) => number): Float32Array {
  const moved = new Float32Array(data.length);
  const length = data.length / rows;
  for (let row = 0; row < rows; row++) {
    const from = source(row) * length;
    moved.set(data.subarray(from, from + length), row * length);
  }
  return moved;
}

/** Within a head, Hugging Face's row half * (headDim / 2) + i lies in the GGUF at 2 * i + half. */
function rotaryRow(row: number, headDim: number): number {
  const within = row % headDim;
  const half = within < headDim / 2 ? 0 : 1;
  return row - within + 2 * (within - half * (headDim / 2)) + half;
}

/** Hugging Face's row (head, q|k|v, i) lies in the GGUF at (q|k|v, head, i). */
function qkvRow(row: number, width: number, heads: number): number {
  const headDim = width / heads;
  const head = Math.floor(row / (3 * headDim));
  const which = Math.floor(row / headDim) % 3;
  return which * width + head * headDim + (row % headDim);
}
