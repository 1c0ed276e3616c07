/**
 * A LoRA adapter (Hu et al. 2021, arXiv 2106.09685) in PEFT's format, merged as the weights are read:
 *   W (out, in)  the base weight        A (r, in), B (out, r)  the adapter
 *   W' = W + scaling · B·A, scaling = alpha / r (alpha / sqrt(r) for rsLoRA, arXiv 2312.03732)
 *   DoRA (arXiv 2402.09353): every row of W' is then given the length m (out)
 */
import { NibbleError } from "../errors.ts";
import { type ByteSource, type FolderSource, readText } from "../files.ts";
import type { FloatTensor } from "../tensor/dtypes.ts";
import type { Checkpoint, TensorInfo } from "./checkpoint.ts";
import { floatReaders, readSideFiles, type StoredTensor } from "./hf-folder.ts";
import { parseJsonObject } from "./json.ts";
import { type LoraConfig, readLoraConfig } from "./lora-config.ts";
import { sourceFile } from "./read-floats.ts";
import { readSafetensorsHeader } from "./safetensors.ts";
import { textName } from "./text-part.ts";

const WEIGHTS = "adapter_model.safetensors";

/** What happens to one tensor of the base; `a`, `b`, `magnitude`, `whole` are names in the adapter's file. */
interface Change {
  a?: string;
  b?: string;
  magnitude?: string;
  /** The tensor as it was trained (modules_to_save, biases). */
  whole?: string;
  /** The module's path, for rank and alpha patterns. */
  readonly module: string;
  readonly isEmbedding: boolean;
}

/** `base` with the adapter of `folder` merged in; errors: `not_found`, `bad_weights`, `bad_config`, `unsupported`. */
export async function withAdapter(base: Checkpoint, folder: FolderSource): Promise<Checkpoint> {
  const files = await folder.list();
  if (!files.includes("adapter_config.json")) {
    throw new NibbleError("not_found", `${folder.name} has no adapter_config.json, so it is no LoRA adapter of PEFT.`);
  }
  if (!files.includes(WEIGHTS)) {
    const pickled = files.includes("adapter_model.bin");
    throw new NibbleError(
      pickled ? "unsupported" : "not_found",
      pickled
        ? `${folder.name} has adapter_model.bin, a pickle, which can run code when it is opened; save it as safetensors.`
        : `${folder.name} has no ${WEIGHTS}.`,
    );
  }
  const where = `${folder.name}/adapter_config.json`;
  const config = readLoraConfig(parseJsonObject(await readText(folder, "adapter_config.json"), where), folder.name);
  const source = await folder.open(WEIGHTS);
  try {
    return await merged(base, folder, files, config, source);
  } catch (error) {
    await source.close?.();
    throw error;
  }
}

async function merged(
  base: Checkpoint,
  folder: FolderSource,
  files: readonly string[],
  config: LoraConfig,
  source: ByteSource,
): Promise<Checkpoint> {
  const header = await readSafetensorsHeader(source);
  const stored = new Map<string, StoredTensor>();
  for (const [name, tensor] of header.tensors) stored.set(name, { ...tensor, source });
  const adapter = floatReaders(`${folder.name}/${WEIGHTS}`, stored);
  const tying = untie(base, readChanges(adapter.tensors, folder.name), config);
  const { changes, aliases } = tying;
  const tensors = changedTensors(base, adapter.tensors, changes, aliases, config, folder.name);

  const rows = async (name: string, start: number, end: number): Promise<FloatTensor> => {
    const change = changes.get(name);
    if (change?.whole) return adapter.readRows!(change.whole, start, end);
    const origin = aliases.get(name) ?? name;
    const whole = base.readRows ? undefined : await base.readTensor(origin);
    const shape = [end - start, ...tensors.get(name)!.shape.slice(1)];
    const length = shape.slice(1).reduce((product, dim) => product * dim, 1);
    const part = whole
      ? { shape, data: whole.data.slice(start * length, end * length) }
      : await base.readRows!(origin, start, end);
    if (change?.a) await addTo(part, change, start, adapter, config);
    return part;
  };
  const require = (name: string): TensorInfo => {
    const info = tensors.get(name);
    if (info) return info;
    throw new NibbleError("not_found", `${base.name} has no tensor "${name}".`, { param: name });
  };
  const adapterFiles = await readSideFiles(folder, files);
  const configSource = await folder.open("adapter_config.json"); // lora_alpha changes the weights too
  return {
    ...base,
    name: `${base.name} + ${folder.name}`,
    config: tying.config(base.config, tensors),
    tensors,
    readTensor: async (name) => {
      const { shape } = require(name);
      const change = changes.get(name);
      if (!change && !aliases.has(name)) return base.readTensor(name);
      return rows(name, 0, shape[0]);
    },
    readRows: async (name, start, end) => {
      require(name);
      return rows(name, start, end);
    },
    sideFiles: new Map([...base.sideFiles, ...adapterFiles]),
    sources: [
      ...base.sources,
      sourceFile("adapter/adapter_config.json", configSource),
      sourceFile(`adapter/${WEIGHTS}`, source),
    ],
    notes: [
      ...base.notes,
      `${folder.name} is merged: ${changes.size} tensors changed.`,
      ...tying.notes,
      ...(adapterFiles.size > 0 ? [`${[...adapterFiles.keys()].join(", ")} are the adapter's.`] : []),
    ],
    dispose: async () => {
      await source.close?.();
      await configSource.close?.();
      await base.dispose();
    },
  };
}

/** Which tensor of the base each tensor of the adapter belongs to. */
function readChanges(tensors: ReadonlyMap<string, TensorInfo>, where: string): Map<string, Change> {
  const changes = new Map<string, Change>();
  const change = (target: string, module: string, isEmbedding: boolean): Change => {
    const found = changes.get(target) ?? { module, isEmbedding };
    changes.set(target, found);
    return found;
  };
  for (const stored of tensors.keys()) {
    // "base_model.model." is PEFT's wrapping; "default" the adapter's name in very old files
    const name = stored
      .replace(/^base_model\.model\./, "")
      .replace(/\.default(?=\.|$)/, "")
      .replace(".modules_to_save", "")
      .replace(".base_layer", "");
    const lora = /^(.+)\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(?:\.weight)?$/.exec(name);
    if (lora) {
      const [, module, part] = lora;
      const at = change(`${module}.weight`, module, part.startsWith("embedding"));
      if (part.endsWith("A")) at.a = stored;
      else if (part.endsWith("B")) at.b = stored;
      else at.magnitude = stored;
    } else if (/\.(weight|bias)$/.test(name) && !/\.(lora_\w+|token_adapter)\./.test(name)) {
      change(name, name.replace(/\.\w+$/, ""), false).whole = stored;
    } else {
      throw new NibbleError(
        "unsupported",
        `${where}: tensor "${stored}" is not one that Nibble knows how to merge (LoRA's A and B, DoRA's magnitudes, ` +
          "whole weights and biases).",
        { param: stored },
      );
    }
  }
  return changes;
}

interface Untied {
  /** By the base's names. */
  readonly changes: ReadonlyMap<string, Change>;
  /** New name -> the base's tensor that it begins as. */
  readonly aliases: ReadonlyMap<string, string>;
  readonly notes: readonly string[];
  config(base: Checkpoint["config"], tensors: ReadonlyMap<string, TensorInfo>): Checkpoint["config"];
}

const EMBEDDING = /(^|\.)(embed_tokens|wte|embed_in)\.weight$/;
const HEAD = /^(lm_head|embed_out)\.weight$/;

/**
 * Finds every target in the base. Where embedding and head are one matrix and the adapter changes only one of them,
 * they become two, as they are while PEFT computes.
 */
function untie(base: Checkpoint, wanted: ReadonlyMap<string, Change>, config: LoraConfig): Untied {
  const embedding = [...base.tensors.keys()].find((name) => EMBEDDING.test(name));
  const hasHead = [...base.tensors.keys()].some((name) => HEAD.test(name));
  const changes = new Map<string, Change>();
  const aliases = new Map<string, string>();
  for (const [name, change] of wanted) {
    const target = [name, `transformer.${name}`, name.replace(/^transformer\./, ""), textName(name) ?? name].find(
      (spelling) => base.tensors.has(spelling),
    );
    if (target) changes.set(target, change);
    else if (HEAD.test(name) && embedding && !hasHead) {
      changes.set(name, change);
      aliases.set(name, embedding);
    } else {
      throw new NibbleError(
        "bad_weights",
        `The adapter changes "${name}", which ${base.name} does not have; was it made for another model?`,
        { param: name },
      );
    }
  }
  const touchesEmbedding = embedding !== undefined && changes.has(embedding);
  if (touchesEmbedding && !hasHead && aliases.size === 0 && !config.keepsTying)
    aliases.set("lm_head.weight", embedding);
  return {
    changes,
    aliases,
    notes: aliases.size > 0 ? ["The adapter changes embedding and head apart, so they are untied."] : [],
    config: (json, tensors) => ({
      ...json,
      ...(aliases.size > 0 ? { tie_word_embeddings: false } : {}),
      // trained with added tokens: the embedding in the adapter has more rows
      ...(touchesEmbedding ? { vocab_size: tensors.get(embedding)!.shape[0] } : {}),
    }),
  };
}

/** The base's tensors with the shapes that the changes give them, every change checked against its target. */
function changedTensors(
  base: Checkpoint,
  adapter: ReadonlyMap<string, TensorInfo>,
  changes: ReadonlyMap<string, Change>,
  aliases: ReadonlyMap<string, string>,
  config: LoraConfig,
  where: string,
): Map<string, TensorInfo> {
  const tensors = new Map(base.tensors);
  for (const [name, origin] of aliases) tensors.set(name, { ...base.tensors.get(origin)!, name });
  for (const [name, change] of changes) {
    const { shape } = tensors.get(name)!;
    const bad = (found: string) =>
      new NibbleError("bad_weights", `${where}: for "${name}" [${shape}], ${found}.`, { param: name });
    if (change.whole) {
      const info = adapter.get(change.whole)!;
      const fits = info.shape.length === shape.length && info.shape.slice(1).every((dim, i) => dim === shape[i + 1]);
      if (!fits || (info.shape[0] !== shape[0] && !EMBEDDING.test(name) && !HEAD.test(name))) {
        throw bad(`the adapter's own weight is [${info.shape}]`);
      }
      if (change.a || change.b) throw bad("the adapter has both a whole weight and a low-rank one");
      tensors.set(name, { ...info, name });
      continue;
    }
    if (!change.a || !change.b) throw bad(`the adapter has ${change.a ? "A but not B" : "B but not A"}`);
    if (shape.length !== 2) throw bad("which is no matrix, a low-rank change makes no sense");
    const [outputs, inputs] = change.isEmbedding || config.fanInFanOut ? [shape[1], shape[0]] : shape;
    const [a, b] = [adapter.get(change.a)!.shape, adapter.get(change.b)!.shape];
    const rank = config.rank(change.module);
    if (a.length !== 2 || b.length !== 2 || a[0] !== rank || b[1] !== rank || a[1] !== inputs || b[0] !== outputs) {
      throw bad(`A [${a}] and B [${b}] of rank ${rank} do not make that shape`);
    }
    if ((change.magnitude !== undefined) !== config.useDora)
      throw bad("use_dora and the magnitudes contradict each other");
    if (config.useDora && (change.isEmbedding || config.fanInFanOut)) {
      throw new NibbleError("unsupported", `${where}: DoRA on embeddings or Conv1D ("${name}") is not merged.`, {
        param: name,
      });
    }
  }
  return tensors;
}

/** Rows from `start` on of W, in place: += scaling · (B·A), then DoRA's lengths. */
async function addTo(
  part: FloatTensor,
  change: Change,
  start: number,
  adapter: Pick<Checkpoint, "readTensor">,
  config: LoraConfig,
): Promise<void> {
  const { data: w, shape } = part;
  const [rows, cols] = shape;
  const a = await adapter.readTensor(change.a!);
  const b = await adapter.readTensor(change.b!);
  const rank = a.shape[0];
  const scaling = config.scaling(change.module);
  const turned = change.isEmbedding || config.fanInFanOut; // W is (in, out): W'[row, col] += B[col] · A[, row]
  const delta = new Float64Array(cols);
  for (let row = 0; row < rows; row++) {
    delta.fill(0);
    for (let k = 0; k < rank; k++) {
      if (turned) {
        const factor = a.data[k * a.shape[1] + start + row];
        for (let col = 0; col < cols; col++) delta[col] += factor * b.data[col * rank + k];
      } else {
        const factor = b.data[(start + row) * rank + k];
        for (let col = 0; col < cols; col++) delta[col] += factor * a.data[k * cols + col];
      }
    }
    for (let col = 0; col < cols; col++) w[row * cols + col] += scaling * delta[col];
  }
  if (!change.magnitude) return;
  const magnitude = (await adapter.readTensor(change.magnitude)).data;
  for (let row = 0; row < rows; row++) {
    const values = w.subarray(row * cols, (row + 1) * cols);
    const length = Math.sqrt(values.reduce((sum, x) => sum + x * x, 0));
    for (let col = 0; col < cols; col++) values[col] *= magnitude[start + row] / length;
  }
}
