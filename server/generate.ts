/** From a chat job to running answers: the part that every chat-shaped route shares. */
import type { Context } from "hono";
import type { Engine } from "../src/runtime/engine.ts";
import { type AnswerEvent, answer, type ChatJob, type RenderedPrompt, renderPrompt, requireContext } from "./answer.ts";
import { type Hold, hold, holding, requestFacts, type ServerContext } from "./context.ts";
import { requireGrammar } from "./grammar.ts";
import { mapped, merge } from "./merge.ts";
import { planTools } from "./tools.ts";

export interface RunningAnswers {
  readonly held: Hold;
  readonly engine: Engine;
  readonly promptTokens: number;
  /** Events of all answers, each with the number of its choice. */
  readonly events: AsyncGenerator<{ index: number; item: AnswerEvent }>;
}

/** Loads the model, renders the prompt and makes ready `count` answers; nothing runs before `events` is read. */
export async function startAnswers(
  c: Context,
  context: ServerContext,
  model: string | undefined,
  count: number,
  makeJob: (engine: Engine) => ChatJob,
): Promise<RunningAnswers> {
  const held = await hold(c, context, model, count);
  try {
    const { engine } = held.lease;
    const job = makeJob(engine);
    const prompt = toolPrompt(engine, job, renderPrompt(engine.tokenizer, job));
    requireContext(engine, prompt.ids, "messages");
    const answers = Array.from({ length: count }, (_, index) =>
      answer(engine, choice(job, index), prompt, held.signal),
    );
    return {
      held,
      engine,
      promptTokens: prompt.ids.length,
      events: holding(held, mapped(merge(answers, engine.info.maxBatch), counter(c))),
    };
  } catch (error) {
    held.end();
    throw error;
  }
}

/** A forced call begins behind the prompt, in the family's own spelling; a schema that cannot be kept is refused. */
function toolPrompt({ tokenizer }: Engine, { tools }: ChatJob, prompt: RenderedPrompt): RenderedPrompt {
  if (!tools) return prompt;
  const { promptSuffix, grammar } = planTools(tokenizer, prompt.text, tools);
  if (grammar) requireGrammar(grammar, "tools");
  if (promptSuffix === "") return prompt;
  const addSpecialTokens = tokenizer.chatTemplate === undefined; // a template writes its own
  const text = prompt.text + promptSuffix;
  return { text, ids: tokenizer.encode(text, { addSpecialTokens }) };
}

/** Choices of one seeded request differ, and are the same every time. */
function choice(job: ChatJob, index: number): ChatJob {
  const { seed } = job.generate;
  return seed === undefined ? job : { ...job, generate: { ...job.generate, seed: seed + index } };
}

/** Notes what the request's log line says, event by event. */
function counter<T extends { item: AnswerEvent }>(c: Context): (event: T) => T {
  const facts = requestFacts(c);
  const start = performance.now();
  return (event) => {
    facts.timeToFirstTokenMs ??= performance.now() - start;
    if (event.item.kind === "finish") {
      const { promptTokens, cachedTokens, completionTokens } = event.item.usage;
      facts.promptTokens = promptTokens;
      facts.cachedTokens = cachedTokens;
      facts.completionTokens = (facts.completionTokens ?? 0) + completionTokens;
    }
    return event;
  };
}

/** Events of choices run side by side, one list a choice. */
export async function byChoice(
  events: AsyncIterable<{ index: number; item: AnswerEvent }>,
  count: number,
): Promise<AnswerEvent[][]> {
  const lists: AnswerEvent[][] = Array.from({ length: count }, () => []);
  for await (const { index, item } of events) lists[index].push(item);
  return lists;
}
