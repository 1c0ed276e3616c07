/** The engine in OpenAI's shape: `chat.completions.create`, whole or streamed, without HTTP. */
import type { GenerateOptions, Piece } from "../runtime/engine.ts";
import type { ChatMessage } from "../tokenizer/tokenizer.ts";
import type { EngineWorker } from "./client.ts";

export interface ChatCompletionRequest {
  readonly messages: readonly ChatMessage[];
  readonly stream?: boolean;
  readonly temperature?: number;
  readonly top_p?: number;
  readonly max_completion_tokens?: number;
  /** The older name of `max_completion_tokens`. */
  readonly max_tokens?: number;
  readonly stop?: string | readonly string[];
  readonly seed?: number;
  readonly presence_penalty?: number;
  readonly frequency_penalty?: number;
  readonly logit_bias?: Readonly<Record<number, number>>;
  readonly stream_options?: { readonly include_usage?: boolean };
}

type Finish = "stop" | "length";

export interface CompletionUsage {
  readonly prompt_tokens: number;
  readonly completion_tokens: number;
  readonly total_tokens: number;
  readonly prompt_tokens_details: { readonly cached_tokens: number };
}

export interface ChatCompletion {
  readonly id: string;
  readonly object: "chat.completion";
  readonly created: number;
  readonly model: string;
  readonly choices: readonly [
    {
      readonly index: 0;
      readonly message: { readonly role: "assistant"; readonly content: string };
      readonly finish_reason: Finish;
    },
  ];
  readonly usage: CompletionUsage;
}

export interface ChatCompletionChunk {
  readonly id: string;
  readonly object: "chat.completion.chunk";
  readonly created: number;
  readonly model: string;
  /** Empty on the usage chunk. */
  readonly choices: readonly {
    readonly index: 0;
    readonly delta: { readonly role?: "assistant"; readonly content?: string | null };
    readonly finish_reason: Finish | null;
  }[];
  readonly usage?: CompletionUsage | null;
}

export interface ChatCompletions {
  create(
    request: ChatCompletionRequest & { readonly stream: true },
    options?: { signal?: AbortSignal },
  ): Promise<AsyncIterable<ChatCompletionChunk>>;
  create(
    request: ChatCompletionRequest & { readonly stream?: false },
    options?: { signal?: AbortSignal },
  ): Promise<ChatCompletion>;
}

/** OpenAI's request in the engine's terms. */
export function toGenerateOptions(request: ChatCompletionRequest, signal?: AbortSignal): GenerateOptions {
  const { stop } = request;
  const options: GenerateOptions = {
    temperature: request.temperature,
    topP: request.top_p,
    maxTokens: request.max_completion_tokens ?? request.max_tokens,
    stop: typeof stop === "string" ? [stop] : stop,
    seed: request.seed,
    presencePenalty: request.presence_penalty,
    frequencyPenalty: request.frequency_penalty,
    logitBias: request.logit_bias,
    signal,
  };
  // Fields that were not given must not hide the model's own defaults.
  return Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined));
}

function toUsage(piece: Piece | undefined): CompletionUsage {
  const { promptTokens = 0, completionTokens = 0, cachedTokens = 0 } = piece?.usage ?? {};
  return {
    prompt_tokens: promptTokens,
    completion_tokens: completionTokens,
    total_tokens: promptTokens + completionTokens,
    prompt_tokens_details: { cached_tokens: cachedTokens },
  };
}

function toFinish(piece: Piece | undefined): Finish {
  return piece?.finish === "length" ? "length" : "stop";
}

/** `chat.completions` of an engine. */
export function chatCompletions(worker: EngineWorker): ChatCompletions {
  const head = () => ({
    id: `chatcmpl-${crypto.randomUUID()}`,
    created: Math.floor(Date.now() / 1000),
    model: worker.model?.info.id ?? "",
  });
  const ask = (request: ChatCompletionRequest, signal?: AbortSignal) =>
    worker.generate({ kind: "chat", messages: request.messages }, toGenerateOptions(request, signal));

  async function whole(request: ChatCompletionRequest, signal?: AbortSignal): Promise<ChatCompletion> {
    let content = "";
    let last: Piece | undefined;
    for await (const piece of ask(request, signal)) {
      content += piece.text;
      last = piece;
    }
    const message = { role: "assistant", content } as const;
    return {
      ...head(),
      object: "chat.completion",
      choices: [{ index: 0, message, finish_reason: toFinish(last) }],
      usage: toUsage(last),
    };
  }

  async function* chunks(request: ChatCompletionRequest, signal?: AbortSignal): AsyncGenerator<ChatCompletionChunk> {
    const common = { ...head(), object: "chat.completion.chunk" } as const;
    const chunk = (delta: ChatCompletionChunk["choices"][0]["delta"], finish: Finish | null = null) => ({
      ...common,
      choices: [{ index: 0 as const, delta, finish_reason: finish }],
    });
    yield chunk({ role: "assistant", content: null });
    let last: Piece | undefined;
    for await (const piece of ask(request, signal)) {
      if (piece.text) yield chunk({ content: piece.text });
      last = piece;
    }
    yield chunk({}, toFinish(last));
    if (request.stream_options?.include_usage) yield { ...common, choices: [], usage: toUsage(last) };
  }

  return {
    async create(request: ChatCompletionRequest, { signal }: { signal?: AbortSignal } = {}) {
      return request.stream ? chunks(request, signal) : whole(request, signal);
    },
  } as ChatCompletions;
}
