/**
 * onnxruntime-genai, run by a Python that has it, on the weights of a model folder: a folder beside with its
 * configuration and a graph that always gives the last token's logits (it does not know num_logits_to_keep).
 */
import { spawn } from "node:child_process";
import { copyFile, mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { basename, dirname, join, resolve } from "node:path";
import { createInterface } from "node:readline";
import { dataFiles } from "../../src/export/open-graph.ts";
import { attentionNodes } from "../../src/kv/attention-nodes.ts";
import { decodeModel, encodeModel, type ValueInfoProto } from "../../src/onnx/proto.ts";
import { repoPath } from "../helpers.ts";
import type { Measured, Runner } from "./runners.ts";

const FLOAT = 1;
const INT64 = 7;
const KEEP = "num_logits_to_keep";

export interface GenaiOptions {
  /** A Python interpreter with onnxruntime_genai. */
  readonly python: string;
  readonly threads: number;
  /** Bytes of weights, and of keys and values a token. */
  readonly weightBytes: number;
  readonly kvBytesPerToken: number;
}

/** @param graph inside the folder, "onnx/model_q4.onnx" */
export async function genai(folder: string, graph: string, options: GenaiOptions): Promise<Runner> {
  const made = await genaiFolder(folder, graph, options.threads);
  const child = spawn(options.python, [repoPath("test", "bench", "genai.py"), made], {
    stdio: ["pipe", "pipe", "inherit"],
  });
  const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]();
  const next = async (): Promise<unknown> => {
    const { value, done } = await lines.next();
    if (done) throw new Error(`${options.python}: onnxruntime-genai ended without an answer.`);
    return JSON.parse(value);
  };
  const { version } = (await next()) as { version: string };
  return {
    name: `onnxruntime-genai ${version}, same weights`,
    bytesPerToken: (tokens) => options.weightBytes + tokens * options.kvBytesPerToken,
    async run(ids, tokens) {
      child.stdin.write(`${JSON.stringify({ ids, tokens })}\n`);
      return (await next()) as Measured;
    },
    async dispose() {
      child.stdin.end();
      await new Promise((ended) => child.once("exit", ended));
      await rm(made, { recursive: true });
    },
  };
}

/** (batch, 1, vocabulary): what tells genai that a prompt gives one row. */
function ofLastToken(logits: ValueInfoProto): ValueInfoProto {
  const { elemType = FLOAT, shape } = logits.type?.tensorType ?? {};
  const dim = (shape?.dim ?? []).map((size, i) => (i === 1 ? { dimValue: 1n } : size));
  return { ...logits, type: { tensorType: { elemType, shape: { dim } } } };
}

async function genaiFolder(folder: string, graph: string, threads: number): Promise<string> {
  const made = await mkdtemp(join(tmpdir(), "nibble-genai-"));
  const model = decodeModel(await readFile(join(folder, graph)));
  const layers = attentionNodes(model, "genai");
  const one = { name: KEEP, dataType: INT64, dims: [], rawData: new Uint8Array(BigInt64Array.of(1n).buffer) };
  const input = model.graph.input.filter(({ name }) => name !== KEEP);
  const initializer = [...model.graph.initializer, one];
  const output = model.graph.output.map((value) => (value.name === "logits" ? ofLastToken(value) : value));
  const graphs = { ...model.graph, input, initializer, output };
  await writeFile(join(made, "model.onnx"), encodeModel({ ...model, graph: graphs }));
  for (const name of dataFiles(model)) {
    // a copy: ONNX Runtime takes no link to weights outside of the graph's folder
    await copyFile(resolve(folder, dirname(graph), name), join(made, basename(name)));
  }
  const config = JSON.parse(await readFile(join(folder, "config.json"), "utf8"));
  const [{ heads, kvHeads, headDim }] = layers;
  const tokens = { bos_token_id: config.bos_token_id ?? 0, eos_token_id: config.eos_token_id, pad_token_id: 0 };
  const decoder = {
    session_options: { intra_op_num_threads: threads, provider_options: [] },
    filename: "model.onnx",
    head_size: headDim,
    hidden_size: config.hidden_size,
    num_attention_heads: heads,
    num_key_value_heads: kvHeads,
    num_hidden_layers: layers.length,
    inputs: {
      input_ids: "input_ids",
      attention_mask: "attention_mask",
      past_key_names: "past_key_values.%d.key",
      past_value_names: "past_key_values.%d.value",
    },
    outputs: { logits: "logits", present_key_names: "present.%d.key", present_value_names: "present.%d.value" },
  };
  const context_length = config.max_position_embeddings;
  const search = { max_length: context_length, past_present_share_buffer: true };
  const whole = { model: { type: "llama", vocab_size: config.vocab_size, context_length, ...tokens, decoder }, search };
  await writeFile(join(made, "genai_config.json"), JSON.stringify(whole, null, 2));
  return made;
}
