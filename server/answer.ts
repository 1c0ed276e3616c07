/**
 * One answer to a conversation, as events that every API's converter reads: thoughts, text, tool calls, the end. The
 * prompt is rendered here, so that one too long is refused with both numbers before it costs anything.
 */
import { NibbleError } from "../src/errors.ts";
import type {
  Engine,
  GeneratedToken,
  GenerateOptions,
  Piece,
  Timings,
  TokenLogprob,
  Usage,
} from "../src/runtime/engine.ts";
import type { ChatMessage, ChatTemplateOptions, Tokenizer } from "../src/tokenizer/tokenizer.ts";
import type { ToolCallEvent } from "../src/tokenizer/tool-calls.ts";
import { ApiError, contextLengthError } from "./openai/errors.ts";
import { ReasoningSplitter, thinkingState } from "./reasoning.ts";
import { describeTools, knowsTools } from "./tool-prompt.ts";
import { planTools, type ToolPlan } from "./tools.ts";

/** A chat request of any API, in the engine's terms. */
export interface ChatJob {
  readonly messages: readonly ChatMessage[];
  readonly template: ChatTemplateOptions;
  readonly generate: GenerateOptions;
  readonly tools?: ToolUse;
  /** Thoughts apart from the answer; false leaves them in the text. */
  readonly splitReasoning: boolean;
}

export interface ToolUse {
  readonly definitions: readonly ToolDefinition[];
  /** "auto" lets the model choose; the others force a call. */
  readonly choice: "auto" | "required" | { readonly name: string };
  readonly parallel: boolean;
}

export interface ToolDefinition {
  readonly name: string;
  readonly description?: string;
  /** JSON Schema of the arguments. */
  readonly parameters: Readonly<Record<string, unknown>>;
  readonly strict?: boolean;
}

export interface FinalUsage extends Usage {
  readonly reasoningTokens: number;
}

export type AnswerEvent =
  | {
      readonly kind: "text" | "reasoning";
      readonly text: string;
      readonly tokens: readonly number[];
      readonly logprobs?: readonly GeneratedToken[];
    }
  | { readonly kind: "tool_call"; readonly index: number; readonly id: string; readonly name: string }
  | { readonly kind: "arguments"; readonly index: number; readonly text: string }
  | {
      readonly kind: "finish";
      readonly reason: "stop" | "length" | "tool_calls";
      readonly stopString?: string;
      readonly usage: FinalUsage;
      readonly timings?: Timings;
    };

/** The rendered prompt of a conversation, as text and ids. */
export interface RenderedPrompt {
  readonly text: string;
  readonly ids: readonly number[];
}

export function renderPrompt(
  tokenizer: Tokenizer,
  job: Pick<ChatJob, "messages" | "template" | "tools">,
): RenderedPrompt {
  // a base model follows no instruction: there a grammar forces the call, or none comes
  const untaught = job.tools && tokenizer.chatTemplate !== undefined && !knowsTools(tokenizer.chatTemplate);
  const messages = untaught ? describeTools(job.messages, job.tools?.definitions ?? []) : job.messages;
  if (tokenizer.chatTemplate === undefined) {
    // a base model: it continues the messages' plain text, as a completion would
    const text = messages.map(({ content }) => (typeof content === "string" ? content : "")).join("\n");
    return { text, ids: tokenizer.encode(text) };
  }
  let text: string;
  try {
    text = tokenizer.applyChatTemplate(messages, job.template);
  } catch (error) {
    if (error instanceof NibbleError && error.code !== "engine") throw withParam(error);
    const reason = error instanceof Error ? error.message : String(error);
    throw new ApiError(400, "invalid_value", `The model's chat template refuses these messages: ${reason}`, {
      param: "messages",
    });
  }
  return { text, ids: tokenizer.encode(text, { addSpecialTokens: false }) };
}

function withParam(error: NibbleError): NibbleError {
  return error.param ? error : new NibbleError(error.code, error.message, { cause: error, param: "messages" });
}

export function requireContext(engine: Engine, ids: readonly number[], param: string): void {
  const { contextLength } = engine.info;
  if (ids.length >= contextLength) throw contextLengthError(param, contextLength, ids.length);
}

/** Runs one answer; the last event is `finish`. */
export async function* answer(
  engine: Engine,
  job: ChatJob,
  prompt: RenderedPrompt,
  signal: AbortSignal,
): AsyncGenerator<AnswerEvent> {
  const { tokenizer } = engine;
  const thinking = job.splitReasoning ? thinkingState(tokenizer.chatTemplate, prompt.text) : "never";
  const splitter = new ReasoningSplitter(thinking);
  const plan = job.tools && planTools(tokenizer, prompt.text, job.tools);
  const calls = plan && new CallReader(plan, job.tools?.parallel ?? true);
  const options: GenerateOptions = {
    ...job.generate,
    ...(plan?.keepSpecialTokens ? { keepSpecialTokens: true } : {}),
    ...(plan?.grammar ? { grammar: plan.grammar } : {}),
    signal,
  };
  const held = new HeldTokens(tokenizer, job.generate.keepSpecialTokens ?? false);
  const spaces = new FirstSpace(tokenizer, tokenizer.chatTemplate === undefined);
  let reasoningTokens = 0;
  for await (const piece of engine.generate(prompt.ids, options)) {
    held.add(piece);
    const wasThinking = splitter.thinking;
    const parts = splitter.push(
      spaces.text(plan?.keepSpecialTokens ? withoutEnd(tokenizer, piece) : piece.text, piece),
    );
    if (piece.finish) parts.push(...splitter.end());
    for (const { kind, text } of parts) {
      if (kind === "reasoning" || !calls) yield { kind, text, ...held.take() };
      else yield* calls.read(text, held);
    }
    if (wasThinking || splitter.thinking) reasoningTokens += piece.tokens.length;
    if (piece.finish === "aborted") throw new NibbleError("aborted", "The request was cancelled.");
    if (piece.finish) {
      if (calls) yield* calls.end(held);
      yield {
        kind: "finish",
        reason: piece.finish === "stop" && calls?.any ? "tool_calls" : piece.finish,
        stopString: piece.stopString,
        usage: { ...requireUsage(piece), reasoningTokens },
        timings: piece.timings,
      };
      return;
    }
  }
  throw new NibbleError("engine", `${engine.info.id}: the stream ended without a last piece.`);
}

/** Calls found in the text, with ids; beyond the first where calls may not be parallel they are left out. */
class CallReader {
  private readonly plan: ToolPlan;
  private readonly parallel: boolean;
  any = false;

  constructor(plan: ToolPlan, parallel: boolean) {
    this.plan = plan;
    this.parallel = parallel;
  }

  read(text: string, held: HeldTokens): AnswerEvent[] {
    return this.events(this.plan.parser.push(text), held);
  }

  end(held: HeldTokens): AnswerEvent[] {
    return this.events(this.plan.parser.end(), held);
  }

  private events(found: readonly ToolCallEvent[], held: HeldTokens): AnswerEvent[] {
    return found.flatMap((event): AnswerEvent[] => {
      if (event.kind === "text") {
        const blank = this.any && event.text.trim() === ""; // between calls and behind them
        return blank ? [] : [{ kind: "text", text: event.text, ...held.take() }];
      }
      if (event.kind === "end" || (!this.parallel && event.index > 0)) return [];
      held.take(); // the tokens of a call are no text
      const { index } = event;
      if (event.kind === "arguments") return [{ kind: "arguments", index, text: event.text }];
      this.any = true;
      return [{ kind: "tool_call", index, id: this.plan.makeId(), name: event.name }];
    });
  }
}

export function requireUsage(piece: Piece): Usage {
  if (!piece.usage) throw new NibbleError("engine", "The last piece carries no usage.");
  return piece.usage;
}

/** Where special tokens are shown, the one that ended the answer is too: it is no part of it. */
function withoutEnd(tokenizer: Tokenizer, { text, tokens, finish }: Piece): string {
  const last = tokens.at(-1);
  if (finish !== "stop" || last === undefined || !tokenizer.eosIds.includes(last)) return text;
  const end = new TextDecoder().decode(tokenizer.tokenBytes(last));
  return text.endsWith(end) ? text.slice(0, -end.length) : text;
}

/**
 * SentencePiece tokenizers drop the space before the first word of a text. Where an answer goes on from plain text, that
 * space belongs to it.
 */
export class FirstSpace {
  private open: boolean;

  constructor(
    private readonly tokenizer: Tokenizer,
    continuesText: boolean,
  ) {
    this.open = continuesText;
  }

  text(text: string, { tokens }: Piece): string {
    if (!this.open || tokens.length === 0) return text;
    this.open = false;
    const [first] = this.tokenizer.tokenBytes(tokens[0]);
    return first === 0x20 && !text.startsWith(" ") && text !== "" ? ` ${text}` : text;
  }
}

/** Tokens whose text is still held back, given out with the text that they belong to. */
export class HeldTokens {
  private tokens: number[] = [];
  private logprobs: GeneratedToken[] | undefined;

  constructor(
    private readonly tokenizer: Tokenizer,
    private readonly keepSpecial: boolean,
  ) {}

  add(piece: Piece): void {
    const shown = (id: number) => this.keepSpecial || !this.tokenizer.isSpecial(id);
    this.tokens.push(...piece.tokens.filter(shown));
    if (piece.logprobs) (this.logprobs ??= []).push(...piece.logprobs.filter(({ id }) => shown(id)));
  }

  take(): { tokens: readonly number[]; logprobs?: readonly GeneratedToken[] } {
    const { tokens, logprobs } = this;
    this.tokens = [];
    if (logprobs) this.logprobs = [];
    return logprobs ? { tokens, logprobs } : { tokens };
  }
}

/** A token as OpenAI shows it: text, and the bytes where the text is not whole. */
export function describeToken(
  tokenizer: Tokenizer,
  { id, logprob }: TokenLogprob,
): {
  token: string;
  logprob: number;
  bytes: number[];
} {
  const bytes = tokenizer.tokenBytes(id);
  return { token: new TextDecoder().decode(bytes), logprob: finiteLogprob(logprob), bytes: [...bytes] };
}

/** JSON knows no infinity; OpenAI writes -9999 for a token that cannot come. */
export function finiteLogprob(logprob: number): number {
  return Number.isFinite(logprob) ? Math.min(0, logprob) : -9999;
}
