/** Ollama's /api: chat, generate, embed, and what its clients ask before they use a model. */
import type { Context } from "hono";
import { Hono } from "hono";
import type { Engine, Timings } from "../../src/runtime/engine.ts";
import { type AnswerEvent, type ChatJob, describeToken, type FinalUsage, requireContext } from "../answer.ts";
import { complete } from "../complete.ts";
import { body, type Hold, hold, holding, requestFacts, type ServerContext, streamOptions } from "../context.ts";
import { embed } from "../embed.ts";
import { fimPrompt } from "../fim.ts";
import { type RunningAnswers, startAnswers } from "../generate.ts";
import type { ModelRegistry, ModelStatus } from "../models.ts";
import {
  chatJob,
  generateJob,
  ollamaChat,
  ollamaEmbed,
  ollamaEmbeddings,
  ollamaGenerate,
  ollamaOptions,
  ollamaShow,
  refuseImages,
} from "../ollama/requests.ts";
import { parsedArguments } from "../openai/chat-response.ts";
import { shorten } from "../openai/embeddings.ts";
import { ApiError, refuse, toHttpError } from "../openai/errors.ts";
import { toPrompts } from "../openai/prompts.ts";
import { eventStream } from "../sse.ts";

/** The API version whose shapes these are; clients compare it before they use a feature. */
const OLLAMA_VERSION = "0.12.0";
const NS_PER_MS = 1e6;

export function ollama(context: ServerContext): Hono {
  const { registry } = context;
  const listed = (status: ModelStatus) => describe(status, registry.idleMs);
  return new Hono()
    .get("/api/version", (c) => c.json({ version: OLLAMA_VERSION }))
    .get("/api/tags", (c) => c.json({ models: registry.list().map(listed) }))
    .get("/api/ps", (c) =>
      c.json({
        models: registry
          .list()
          .filter(({ engine }) => engine)
          .map(listed),
      }),
    )
    .post("/api/show", async (c) => {
      const request = ollamaShow.parse(await body(c, context));
      const lease = await registry.use(request.model ?? request.name);
      try {
        return c.json(show(lease.engine, created(registry, lease.id)));
      } finally {
        lease.release();
      }
    })
    .post("/api/chat", async (c) => {
      const request = ollamaChat.parse(await body(c, context));
      if (!request.messages?.length) return c.json(await loaded(context, request, "message"));
      return answerChat(c, context, request.model, request.stream ?? true, "message", (engine) =>
        chatJob(request, engine),
      );
    })
    .post("/api/generate", async (c) => {
      const request = ollamaGenerate.parse(await body(c, context));
      if (!request.prompt) return c.json(await loaded(context, request, "response")); // loads the model, says no more
      if (request.raw || request.suffix) return plainCompletion(c, context, request);
      return answerChat(c, context, request.model, request.stream ?? true, "response", () => generateJob(request));
    })
    .post("/api/embed", async (c) => {
      const request = ollamaEmbed.parse(await body(c, context));
      const start = performance.now();
      const { model, vectors, promptTokens } = await embed(c, context, request.model, request.input);
      const embeddings = vectors.map((vector) => Array.from(shorten(vector, request.dimensions ?? undefined)));
      const took = Math.round((performance.now() - start) * NS_PER_MS);
      return c.json({ model, embeddings, total_duration: took, load_duration: 0, prompt_eval_count: promptTokens });
    })
    .post("/api/embeddings", async (c) => {
      const request = ollamaEmbeddings.parse(await body(c, context));
      const { vectors } = await embed(c, context, request.model, request.prompt);
      return c.json({ embedding: Array.from(vectors[0]) });
    })
    .on("POST", ["/api/pull", "/api/push", "/api/create", "/api/copy"], notOffered)
    .delete("/api/delete", notOffered);
}

function notOffered(c: Context): never {
  const message = `${c.req.path} is not offered: models are made by nibble quantize and named when the server starts.`;
  throw new ApiError(400, "unsupported_value", message, { code: "unsupported" });
}

/** How Ollama says "never". */
const NEVER_UNLOADED = new Date("2318-01-01T00:00:00Z");

function describe({ id, created, sizeBytes, digest = "", engine, lastUsed }: ModelStatus, idleMs: number) {
  return {
    name: id,
    model: id,
    modified_at: new Date(created * 1000).toISOString(),
    size: sizeBytes,
    size_vram: 0,
    digest,
    expires_at: (engine && idleMs === 0 ? NEVER_UNLOADED : new Date(lastUsed + idleMs)).toISOString(),
    details: details(engine),
  };
}

function details(engine: Engine | undefined) {
  const family = engine?.info.modelType ?? "";
  return {
    parent_model: "",
    format: "onnx",
    family,
    families: family === "" ? [] : [family],
    parameter_size: "",
    quantization_level: engine ? weightFormat(engine.info.file) : "",
  };
}

/** "q4" of onnx/model_q4.kv-int8.onnx; transformers.js' names, where no suffix is float32. */
function weightFormat(file: string): string {
  const [, dtype = "fp32"] = /(?:_([a-z0-9]+))?(?:\.[\w-]+)?\.onnx$/.exec(file) ?? [];
  return dtype;
}

const created = (registry: ModelRegistry, id: string): number =>
  registry.list().find((status) => status.id === id)?.created ?? 0;

function show(engine: Engine, createdAt: number) {
  const { info, tokenizer } = engine;
  const template = tokenizer.chatTemplate ?? "";
  const capabilities = ["completion", "embedding"];
  if (template.includes("tools")) capabilities.push("tools");
  if (template.includes("</think>")) capabilities.push("thinking");
  if (fimPrompt(tokenizer, "", "")) capabilities.push("insert");
  return {
    license: "",
    modelfile: "",
    parameters: "",
    template,
    details: details(engine),
    model_info: {
      "general.architecture": info.modelType,
      [`${info.modelType}.context_length`]: info.contextLength,
      [`${info.modelType}.vocab_size`]: info.vocabSize,
    },
    capabilities,
    modified_at: new Date(createdAt * 1000).toISOString(),
  };
}

/** Nothing to answer loads the model, or with `keep_alive: 0` unloads it where nobody uses it. */
async function loaded(
  { registry }: ServerContext,
  { model, keep_alive }: Pick<KeptAlive, "model" | "keep_alive">,
  field: Field,
) {
  const leave = keep_alive === 0 || /^0+[a-z]*$/.test(String(keep_alive));
  const known = registry.find(model);
  if (leave && known) await registry.unload(known.id);
  else (await registry.use(model)).release();
  return {
    model: known?.id ?? model,
    created_at: new Date().toISOString(),
    ...(field === "message" ? { message: { role: "assistant", content: "" } } : { response: "" }),
    done: true,
    done_reason: leave ? "unload" : "load",
  };
}

type KeptAlive = ReturnType<typeof ollamaChat.parse>;
type Field = "message" | "response";

async function answerChat(
  c: Context,
  context: ServerContext,
  model: string,
  stream: boolean,
  field: Field,
  makeJob: (engine: Engine) => ChatJob,
): Promise<Response> {
  const start = performance.now();
  const running = await startAnswers(c, context, model, 1, makeJob);
  return respond(c, context, stream, answerLines(running, field, start), running.held);
}

/** Lines of JSON, or the one object that they add up to. */
async function respond(
  c: Context,
  context: ServerContext,
  stream: boolean,
  lines: AsyncGenerator<Line>,
  held: Hold,
): Promise<Response> {
  if (!stream) return c.json(await joined(lines));
  const text = async function* (): AsyncGenerator<string> {
    for await (const line of lines) yield `${JSON.stringify(line)}\n`;
  };
  const describeError = (error: unknown) => `${JSON.stringify({ error: toHttpError(error).body.error.message })}\n`;
  const options = streamOptions(c, context, held, describeError);
  const piecewise = await eventStream(text(), { ...options, keepAlive: "" }); // lines of JSON have no comments
  return c.body(piecewise, 200, { "Content-Type": "application/x-ndjson" });
}

interface Call {
  readonly function: { readonly name: string; readonly arguments: unknown };
}
interface Line {
  readonly model: string;
  readonly created_at: string;
  message?: { role: "assistant"; content: string; thinking?: string; tool_calls?: Call[] };
  response?: string;
  thinking?: string;
  readonly done: boolean;
  logprobs?: unknown[];
}

async function* answerLines(
  { held, engine, events }: RunningAnswers,
  field: Field,
  start: number,
): AsyncGenerator<Line> {
  const model = held.lease.id;
  const line = (content: string, extra: object = {}, done = false): Line => {
    const text =
      field === "message"
        ? { message: { role: "assistant" as const, content, ...extra } }
        : { response: content, ...extra };
    return { model, created_at: new Date().toISOString(), ...text, done };
  };
  let call: { name: string; text: string } | undefined;
  const finishedCall = (): Line[] => {
    if (!call) return [];
    const { name, text } = call;
    call = undefined;
    return [line("", { tool_calls: [{ function: { name, arguments: parsedArguments(text) } }] })];
  };
  for await (const { item } of events) {
    if (item.kind !== "arguments") yield* finishedCall();
    if (item.kind === "text") {
      const logprobs = item.logprobs?.map((token) => {
        const { token: text, logprob, bytes } = describeToken(engine.tokenizer, token);
        const top = token.top.map((other) => describeToken(engine.tokenizer, other));
        return { token: text, logprob, bytes, top_logprobs: top };
      });
      yield { ...line(item.text), ...(logprobs ? { logprobs } : {}) };
    } else if (item.kind === "reasoning") yield line("", { thinking: item.text });
    else if (item.kind === "tool_call") call = { name: item.name, text: "" };
    else if (item.kind === "arguments" && call) call.text += item.text;
    else if (item.kind === "finish") yield { ...line("", {}, true), ...lastFields(item, start) };
  }
}

type End = Pick<Extract<AnswerEvent, { kind: "finish" }>, "timings"> & {
  reason: string;
  usage: Omit<FinalUsage, "reasoningTokens">;
};

function lastFields({ reason, usage, timings }: End, start: number) {
  const nanoseconds = (ms: number): number => Math.round(ms * NS_PER_MS);
  const { prefillMs, decodeMs }: Timings = timings ?? { prefillMs: 0, decodeMs: 0 };
  return {
    done_reason: reason === "length" ? "length" : "stop",
    total_duration: nanoseconds(performance.now() - start),
    load_duration: 0,
    prompt_eval_count: usage.promptTokens,
    prompt_eval_duration: nanoseconds(prefillMs),
    eval_count: usage.completionTokens,
    eval_duration: nanoseconds(decodeMs),
  };
}

async function joined(lines: AsyncIterable<Line>): Promise<Line> {
  let last: Line | undefined;
  let content = "";
  let thinking = "";
  const calls: Call[] = [];
  const logprobs: unknown[] = [];
  for await (const line of lines) {
    content += line.message?.content ?? line.response ?? "";
    thinking += line.message?.thinking ?? line.thinking ?? "";
    calls.push(...(line.message?.tool_calls ?? []));
    logprobs.push(...(line.logprobs ?? []));
    last = line;
  }
  if (!last) throw new Error("the answer ended without its last line");
  const thoughts = thinking === "" ? {} : { thinking };
  const whole = logprobs.length > 0 ? { ...last, logprobs } : last;
  if (last.message) {
    const message = {
      role: "assistant" as const,
      content,
      ...thoughts,
      ...(calls.length > 0 ? { tool_calls: calls } : {}),
    };
    return { ...whole, message };
  }
  return { ...whole, response: content, ...thoughts };
}

/** `raw`: the prompt as it stands; `suffix`: the text between. */
async function plainCompletion(
  c: Context,
  context: ServerContext,
  request: ReturnType<typeof ollamaGenerate.parse>,
): Promise<Response> {
  refuseImages(request.images, "images");
  const start = performance.now();
  const held = await hold(c, context, request.model, 1);
  const { engine, id: model } = held.lease;
  try {
    const text = request.prompt ?? "";
    const fim = request.suffix ? fimPrompt(engine.tokenizer, text, request.suffix) : undefined;
    if (request.suffix && !fim) throw refuse("suffix", `${model} does not support insert`, "unsupported_value");
    const [plain] = toPrompts(text, engine.tokenizer, engine.info.vocabSize, "prompt");
    const { prompt } = fim ?? { prompt: plain };
    requireContext(engine, prompt.ids, "prompt");
    const asked = { ...ollamaOptions(request), signal: held.signal };
    const parts = complete(engine, prompt, fim?.options(asked) ?? asked, false);
    const lines = async function* (): AsyncGenerator<Line> {
      for await (const { text: response, finish, usage, timings } of holding(held, parts)) {
        const line = { model, created_at: new Date().toISOString(), response, done: finish !== undefined };
        if (usage) Object.assign(requestFacts(c), usage);
        yield usage ? { ...line, ...lastFields({ reason: finish ?? "stop", usage, timings }, start) } : line;
      }
    };
    return respond(c, context, request.stream ?? true, lines(), held);
  } catch (error) {
    held.end();
    throw error;
  }
}
