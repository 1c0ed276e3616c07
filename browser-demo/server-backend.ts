/** "Run on the server": the OpenAI-shaped routes of the host this page came from, where it has them. */
import { NibbleError } from "../src/errors.ts";
import type { Piece } from "../src/runtime/engine.ts";
import type { ChatMessage } from "../src/tokenizer/tokenizer.ts";
import { FOR_THE_HOST } from "./service-worker-link.ts";
import type { Settings } from "./settings.ts";

const TO_HOST = { [FOR_THE_HOST]: "server" };

export interface ServedModel {
  readonly id: string;
  /** Undefined while the server has it unloaded. */
  readonly contextLength: number | undefined;
  /** It has no chat template: it goes on from a text. */
  readonly base: boolean;
}

export interface ServerInfo {
  readonly models: readonly ServedModel[];
}

interface Props {
  readonly model_alias: string | null;
  readonly chat_template: string;
  readonly models: readonly { readonly id: string; readonly context_length?: number }[];
}

const route = (path: string) => new URL(`v1/${path}`, document.baseURI).href;

/** The host's models, or undefined where it is a static one. */
export async function findServer(): Promise<ServerInfo | undefined> {
  try {
    const response = await fetch(route("models"), { headers: TO_HOST });
    if (!response.ok || !response.headers.get("content-type")?.includes("json")) return undefined;
    const { data } = (await response.json()) as { data: readonly { id: string }[] };
    const props = await serverProps();
    const models = data.map(({ id }) => ({
      id,
      contextLength: props?.models.find((one) => one.id === id)?.context_length,
      base: props?.model_alias === id && props.chat_template === "",
    }));
    return { models };
  } catch {
    return undefined; // offline, or a static host
  }
}

/** What Nibble's and llama.cpp's servers tell about themselves; undefined from others. */
async function serverProps(): Promise<Props | undefined> {
  try {
    const response = await fetch(new URL("props", document.baseURI), { headers: TO_HOST });
    const props = (await response.json()) as Partial<Props>;
    return Array.isArray(props.models) ? (props as Props) : undefined;
  } catch {
    return undefined;
  }
}

interface Chunk {
  readonly choices: readonly {
    readonly delta: { readonly content?: string | null };
    readonly finish_reason?: string | null;
  }[];
  readonly usage?: {
    readonly prompt_tokens: number;
    readonly completion_tokens: number;
    readonly prompt_tokens_details?: { readonly cached_tokens?: number };
  } | null;
  readonly error?: { readonly message: string };
}

/** Pieces of an answer from the server, in the engine's own terms. */
export async function* answerFromServer(
  model: string,
  messages: readonly ChatMessage[],
  settings: Settings,
  signal: AbortSignal,
): AsyncGenerator<Piece> {
  const body = {
    model,
    messages,
    stream: true,
    stream_options: { include_usage: true },
    temperature: settings.temperature,
    top_p: settings.topP,
    top_k: settings.topK,
    min_p: settings.minP,
    repetition_penalty: settings.repetitionPenalty,
    max_completion_tokens: settings.maxTokens,
    ...(settings.seed === "" ? {} : { seed: Number(settings.seed) }),
  };
  const response = await fetch(route("chat/completions"), {
    method: "POST",
    headers: { "Content-Type": "application/json", ...TO_HOST },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) {
    const { error } = (await response.json().catch(() => ({}))) as Chunk;
    throw new NibbleError(
      "network",
      `The server answered ${response.status}: ${error?.message ?? response.statusText}`,
    );
  }
  for await (const data of events(response.body!)) {
    if (data === "[DONE]") return;
    const { choices, usage, error } = JSON.parse(data) as Chunk;
    if (error) throw new NibbleError("network", error.message);
    const text = choices[0]?.delta.content ?? "";
    const counted = usage && {
      promptTokens: usage.prompt_tokens,
      completionTokens: usage.completion_tokens,
      cachedTokens: usage.prompt_tokens_details?.cached_tokens ?? 0,
    };
    yield { text, tokens: [], usage: counted ?? undefined };
  }
}

/** The data of server-sent events. */
async function* events(body: ReadableStream<Uint8Array>): AsyncGenerator<string> {
  const reader = body.pipeThrough(new TextDecoderStream() as ReadableWritablePair<string, Uint8Array>).getReader();
  let rest = "";
  for (let chunk = await reader.read(); !chunk.done; chunk = await reader.read()) {
    const lines = (rest + chunk.value).split(/\r?\n/);
    rest = lines.pop()!;
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}
