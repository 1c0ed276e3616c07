/**
 * Compare's third answer: stock @huggingface/transformers with the runtime that it brings, in a worker of its own, on the
 * very files that lie in this browser's storage. Loaded only where somebody asks for it.
 */
import { NibbleError } from "../src/errors.ts";
import { type Port, serve } from "../src/web/rpc.ts";
import { ModelStore } from "../src/web/store.ts";
import type { PeerAnswer, PeerMethods, PeerRequest } from "./protocol.ts";

/** The part of the library that is used here. */
interface Transformers {
  readonly env: {
    allowRemoteModels: boolean;
    allowLocalModels: boolean;
    localModelPath: string;
    useBrowserCache: boolean;
    fetch: (url: string | URL) => Promise<Response>;
    readonly backends: { readonly onnx: { readonly wasm: { wasmPaths: unknown; numThreads: number } } };
  };
  readonly AutoTokenizer: { from_pretrained(id: string): Promise<PeerTokenizer> };
  readonly AutoModelForCausalLM: {
    from_pretrained(id: string, options: object): Promise<PeerModel>;
  };
  readonly BaseStreamer: new () => object;
}

interface PeerTokenizer {
  readonly chat_template?: unknown;
  (text: string): object;
  apply_chat_template(messages: object[], options: object): object;
  decode(ids: readonly number[], options: object): string;
}

interface PeerModel {
  readonly generation_config?: { readonly eos_token_id?: number | readonly number[] };
  generate(request: object): Promise<unknown>;
}

/** Graph names as transformers.js calls them. */
const DTYPES: Readonly<Record<string, string>> = {
  model: "fp32",
  model_fp16: "fp16",
  model_q4: "q4",
  model_q4f16: "q4f16",
  model_quantized: "q8",
};

/** A folder that exists nowhere: requests below it are answered from storage. */
const STORED = "/nibble-stored/";

async function load({ peersUrl, threads }: PeerRequest): Promise<Transformers> {
  let library: Transformers;
  try {
    library = (await import(/* @vite-ignore */ `${peersUrl}transformers.min.js`)) as Transformers;
  } catch (cause) {
    const message =
      "This copy of the page comes without transformers.js: build the page from a clone to compare with it.";
    throw new NibbleError("not_found", message, { cause });
  }
  const { env } = library;
  Object.assign(env, { allowRemoteModels: false, allowLocalModels: true, useBrowserCache: false });
  env.localModelPath = STORED;
  const runtime = `${peersUrl}ort-wasm-simd-threaded.asyncify`;
  env.backends.onnx.wasm.wasmPaths = { mjs: `${runtime}.mjs`, wasm: `${runtime}.wasm` };
  env.backends.onnx.wasm.numThreads = threads;
  return library;
}

async function answer(request: PeerRequest, emit: (text: string) => void): Promise<PeerAnswer> {
  const { id, graph, prompt, maxTokens } = request;
  const dtype = DTYPES[graph.replace(/^onnx\/|\.onnx$/g, "")];
  if (!dtype) throw new NibbleError("unsupported", `transformers.js knows no graph of the name ${graph}.`);
  const { env, AutoTokenizer, AutoModelForCausalLM, BaseStreamer } = await load(request);
  const folder = await (await ModelStore.open()).folder(id);
  env.fetch = async (url) => {
    const path = decodeURIComponent(String(url)).split(`${STORED}${id}/`)[1];
    if (path === undefined || !(await folder.has(path))) return new Response(null, { status: 404 });
    const blob = await folder.blob(path);
    return new Response(blob, { headers: { "Content-Length": String(blob.size) } });
  };

  const before = performance.now();
  const tokenizer = await AutoTokenizer.from_pretrained(id);
  const model = await AutoModelForCausalLM.from_pretrained(id, { device: "wasm", dtype });
  const loadMs = performance.now() - before;

  const ids: number[] = [];
  const texts: string[] = [];
  const times: number[] = [];
  const ends = [model.generation_config?.eos_token_id ?? []].flat() as number[];
  class Listener extends BaseStreamer {
    private prompt = true;
    put(value: readonly (readonly bigint[])[]): void {
      if (this.prompt) {
        this.prompt = false; // the first call brings what was asked
        return;
      }
      const token = Number(value[0][0]);
      if (ends.includes(token)) return;
      times.push(performance.now());
      ids.push(token);
      texts.push(tokenizer.decode(ids, { skip_special_tokens: true }));
      emit(texts.at(-1)!);
    }
    end(): void {}
  }
  const messages = [{ role: "user", content: prompt }];
  const inputs = tokenizer.chat_template
    ? tokenizer.apply_chat_template(messages, { add_generation_prompt: true, return_dict: true })
    : tokenizer(prompt);
  const started = performance.now();
  const greedy = { max_new_tokens: maxTokens, do_sample: false, repetition_penalty: 1 };
  await model.generate({ ...inputs, ...greedy, streamer: new Listener() });
  const [first = performance.now()] = times;
  return { ids, texts, loadMs, firstTokenMs: first - started, decodeMs: (times.at(-1) ?? first) - first };
}

serve<PeerMethods>(globalThis as unknown as Port, {
  answer: (request, { emit }) => answer(request, emit),
});
