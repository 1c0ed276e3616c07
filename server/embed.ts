/** Token ids to vectors, within a place in the queue; shared by OpenAI's and Ollama's routes. */
import type { Context } from "hono";
import { requireContext } from "./answer.ts";
import { hold, requestFacts, type ServerContext } from "./context.ts";
import { badValue } from "./openai/errors.ts";
import { type PromptInput, toPrompts } from "./openai/prompts.ts";

export interface Embedded {
  readonly model: string;
  readonly vectors: readonly Float32Array[];
  readonly promptTokens: number;
}

export async function embed(
  c: Context,
  context: ServerContext,
  model: string | undefined,
  input: PromptInput,
): Promise<Embedded> {
  const held = await hold(c, context, model, 1);
  try {
    const { engine, id } = held.lease;
    const prompts = toPrompts(input, engine.tokenizer, engine.info.vocabSize, "input").map(({ ids }) => ids);
    for (const ids of prompts) {
      if (ids.length === 0) throw badValue("input", "'input' has an empty text.");
      requireContext(engine, ids, "input");
    }
    const vectors = await engine.embed(prompts);
    const promptTokens = prompts.reduce((sum, ids) => sum + ids.length, 0);
    Object.assign(requestFacts(c), { promptTokens });
    return { model: id, vectors, promptTokens };
  } catch (error) {
    held.lease.report(error);
    throw error;
  } finally {
    held.end();
  }
}
