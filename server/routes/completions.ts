/** POST /v1/completions */
import { Hono } from "hono";
import type { Engine, Usage } from "../../src/runtime/engine.ts";
import { requireContext } from "../answer.ts";
import { type CompletionPart, complete } from "../complete.ts";
import {
  body,
  errorEvent,
  hold,
  holding,
  requestFacts,
  responseHead,
  type ServerContext,
  streamOptions,
} from "../context.ts";
import { type FimPrompt, fimPrompt } from "../fim.ts";
import { merge } from "../merge.ts";
import { type ResponseHead, usageOut, withoutUsage } from "../openai/chat-response.ts";
import {
  type CompletionRequest,
  completionOptions,
  joinLogprobs,
  parseCompletionRequest,
} from "../openai/completions.ts";
import { badValue, refuse } from "../openai/errors.ts";
import { type Prompt, toPrompts } from "../openai/prompts.ts";
import { type SseEvent, sseResponse } from "../sse.ts";

/** One request's choices, prompts times n. */
const MAX_CHOICES = 2048;

export function completions(context: ServerContext): Hono {
  return new Hono().post("/v1/completions", async (c) => {
    const request = parseCompletionRequest(await body(c, context));
    const n = request.n ?? 1;
    const count = promptCount(request) * n;
    if (count > MAX_CHOICES) throw badValue("prompt", `Prompts times n are ${count}; the most is ${MAX_CHOICES}.`);
    const held = await hold(c, context, request.model, count);
    const { engine } = held.lease;
    let runs: AsyncGenerator<CompletionPart>[];
    try {
      const options = { ...completionOptions(request, engine.info.vocabSize), signal: held.signal };
      const echo = request.echo ?? false;
      runs = promptsOf(request, engine).flatMap(({ prompt, fill = (asked) => asked }) =>
        Array.from({ length: n }, (_, index) => {
          const seed = options.seed === undefined ? {} : { seed: options.seed + index };
          return complete(engine, prompt, fill({ ...options, ...seed }), echo);
        }),
      );
    } catch (error) {
      held.end();
      throw error;
    }
    const parts = holding(held, merge(runs, engine.info.maxBatch));
    const head = responseHead("cmpl-", held.lease.id);
    const facts = requestFacts(c);
    const counted = (usages: readonly Usage[]): Usage => {
      const usage = totalUsage(usages, n);
      Object.assign(facts, usage);
      return usage;
    };
    if (!request.stream) return c.json(await whole(parts, head, count, counted));
    const includeUsage = request.stream_options?.include_usage ?? false;
    return sseResponse(chunks(parts, head, includeUsage, counted), streamOptions(c, context, held, errorEvent));
  });
}

function promptCount({ prompt }: CompletionRequest): number {
  return typeof prompt === "string" || typeof prompt[0] === "number" ? 1 : prompt.length;
}

interface Start {
  readonly prompt: Prompt;
  /** What filling a gap needs. */
  readonly fill?: FimPrompt["options"];
}

function promptsOf(request: CompletionRequest, engine: Engine): Start[] {
  const { tokenizer, info } = engine;
  const prompts = toPrompts(request.prompt, tokenizer, info.vocabSize, "prompt");
  const starts = request.suffix
    ? prompts.map((prompt) => around(prompt, request, engine))
    : prompts.map((prompt) => ({ prompt }));
  for (const { prompt } of starts) {
    if (prompt.ids.length === 0)
      throw badValue("prompt", "The prompt is empty, and this model has no token to begin with.");
    requireContext(engine, prompt.ids, "prompt");
  }
  return starts;
}

function around(prompt: Prompt, { suffix = "", echo }: CompletionRequest, { tokenizer }: Engine): Start {
  if (echo) throw badValue("echo", "'echo' and 'suffix' do not go together.");
  const fim = fimPrompt(tokenizer, prompt.text, suffix);
  if (!fim) {
    const message = "'suffix' needs a model with fill-in-the-middle tokens, and this one has none.";
    throw refuse("suffix", message, "unsupported_value");
  }
  return { prompt: fim.prompt, fill: fim.options };
}

/** Each prompt counts once, each of its n answers counts. */
function totalUsage(usages: readonly Usage[], n: number): Usage {
  const sum = (key: keyof Usage): number => usages.reduce((total, usage) => total + usage[key], 0);
  return {
    promptTokens: sum("promptTokens") / n,
    cachedTokens: Math.min(sum("cachedTokens"), sum("promptTokens") / n),
    completionTokens: sum("completionTokens"),
  };
}

type Parts = AsyncIterable<{ index: number; item: CompletionPart }>;

async function whole(parts: Parts, head: ResponseHead, count: number, counted: (usages: readonly Usage[]) => Usage) {
  const lists: CompletionPart[][] = Array.from({ length: count }, () => []);
  for await (const { index, item } of parts) lists[index].push(item);
  const usages = lists.flatMap((list) => list.flatMap(({ usage }) => usage ?? []));
  return {
    ...head,
    object: "text_completion",
    choices: lists.map((list, index) => {
      const logprobs = list.flatMap((part) => part.logprobs ?? []);
      return {
        index,
        text: list.map(({ text }) => text).join(""),
        logprobs: logprobs.length > 0 ? joinLogprobs(logprobs) : null,
        finish_reason: list.at(-1)?.finish ?? "stop",
      };
    }),
    usage: usageOut(counted(usages)),
  };
}

async function* chunks(
  parts: Parts,
  head: ResponseHead,
  includeUsage: boolean,
  counted: (usages: readonly Usage[]) => Usage,
): AsyncGenerator<SseEvent> {
  const usages: Usage[] = [];
  for await (const { index, item } of parts) {
    if (item.usage) usages.push(item.usage);
    const choice = { index, text: item.text, logprobs: item.logprobs ?? null, finish_reason: item.finish ?? null };
    const made = { ...head, object: "text_completion", choices: [choice] };
    yield { data: JSON.stringify(includeUsage ? withoutUsage(made) : made) };
  }
  const usage = counted(usages);
  if (includeUsage) {
    yield { data: JSON.stringify({ ...head, object: "text_completion", choices: [], usage: usageOut(usage) }) };
  }
  yield { data: "[DONE]" };
}
