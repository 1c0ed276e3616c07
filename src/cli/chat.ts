/** `nibble chat`: an interactive conversation, or one answer with -p or from standard input. */
import { createInterface } from "node:readline";
import { text as readStream } from "node:stream/consumers";
import { Command } from "commander";
import { NibbleError } from "../errors.ts";
import type { Engine, GenerateOptions, Piece, Usage } from "../runtime/engine.ts";
import type { ChatMessage } from "../tokenizer/tokenizer.ts";
import { openEngine } from "./load.ts";
import { anyNumber, type LoadFlags, wholeNumber, withLoadFlags } from "./options.ts";
import { type CommandContext, runCommand } from "./run.ts";

interface ChatFlags extends LoadFlags {
  readonly prompt?: string;
  readonly system?: string;
  readonly raw?: boolean;
  readonly maxTokens?: number;
  readonly temperature?: number;
  readonly topK?: number;
  readonly topP?: number;
  readonly minP?: number;
  readonly repetitionPenalty?: number;
  readonly presencePenalty?: number;
  readonly frequencyPenalty?: number;
  readonly seed?: number;
  readonly stop?: readonly string[];
}

const HELP = `/reset            forget the conversation
/system <text>    set the system prompt and forget the conversation
/help             this list
/exit             leave (also Ctrl-D)
Ctrl-C stops an answer, and leaves when nothing is being said.`;

export const chat = withLoadFlags(
  new Command("chat")
    .description("talk to an exported model: interactively, or one answer with -p or from standard input")
    .argument("<dir>", "an exported folder")
    .option("-p, --prompt <text>", "answer this and end; - reads standard input")
    .option("--system <text>", "system prompt")
    .option("--raw", "continue the text as it stands, without the chat template")
    .option("--max-tokens <n>", "longest answer", wholeNumber)
    .option("--temperature <t>", "0 always takes the likeliest token", anyNumber)
    .option("--top-k <k>", "choose among the k likeliest tokens", anyNumber)
    .option("--top-p <p>", "choose among the likeliest tokens that make up this probability", anyNumber)
    .option("--min-p <p>", "drop tokens below this share of the likeliest one's probability", anyNumber)
    .option("--repetition-penalty <x>", "above 1 makes tokens that occurred less likely", anyNumber)
    .option("--presence-penalty <x>", "subtracted once from tokens that were said", anyNumber)
    .option("--frequency-penalty <x>", "subtracted for each time a token was said", anyNumber)
    .option("--seed <n>", "the same seed gives the same answer", anyNumber)
    .option("--stop <text...>", "end before any of these"),
).action((dir: string, flags: ChatFlags) =>
  runCommand(flags, async (context) => {
    const prompt = await oneShotPrompt(flags);
    if (prompt === undefined && flags.json) {
      throw new NibbleError("bad_option", "--json answers one prompt: give it with -p or on standard input.");
    }
    // int8 weights take 0.9 s to make (SmolLM2), more than a conversation's prompts save by them: 0.3 ms a token
    const { promptProducts = "stored" } = flags;
    const engine = await openEngine(dir, { ...flags, promptProducts }, context);
    try {
      const conversation = new Conversation(engine, flags, context);
      if (prompt === undefined) await interact(conversation, context);
      else await answerOnce(conversation, prompt, flags, context);
    } finally {
      await engine.dispose();
    }
  }),
);

async function oneShotPrompt(flags: ChatFlags): Promise<string | undefined> {
  if (flags.prompt !== undefined && flags.prompt !== "-") return flags.prompt;
  if (flags.prompt === "-" || !process.stdin.isTTY) return (await readStream(process.stdin)).replace(/\n$/, "");
  return undefined;
}

/** The messages so far, and how the next answer is made from them. */
class Conversation {
  private messages: ChatMessage[] = [];
  /** Without a template there is no conversation: each text is continued by itself. */
  readonly raw: boolean;

  constructor(
    private readonly engine: Engine,
    private readonly flags: ChatFlags,
    { output }: CommandContext,
  ) {
    this.raw = Boolean(flags.raw) || engine.tokenizer.chatTemplate === undefined;
    if (this.raw && !flags.raw) output.note("This model has no chat template: it continues your text.");
    if (this.raw && flags.system !== undefined) {
      throw new NibbleError("bad_option", "--system needs a chat template, and there is none here.", {
        param: "system",
      });
    }
    this.reset(flags.system);
  }

  reset(system = this.messages.find((message) => message.role === "system")?.content as string | undefined): void {
    this.messages = system ? [{ role: "system", content: system }] : [];
  }

  async *answer(text: string, signal: AbortSignal): AsyncGenerator<Piece> {
    const options = { ...generateOptions(this.flags), signal };
    if (this.raw) {
      yield* this.engine.generate(this.engine.tokenizer.encode(text, { addSpecialTokens: true }), options);
      return;
    }
    const messages = [...this.messages, { role: "user", content: text }];
    let said = "";
    for await (const piece of this.engine.chat(messages, options)) {
      said += piece.text;
      yield piece;
    }
    this.messages = [...messages, { role: "assistant", content: said }];
  }
}

function generateOptions(flags: ChatFlags): GenerateOptions {
  const { maxTokens, temperature, topK, topP, minP, seed, stop } = flags;
  const { repetitionPenalty, presencePenalty, frequencyPenalty } = flags;
  const all = {
    maxTokens,
    temperature,
    topK,
    topP,
    minP,
    seed,
    stop,
    repetitionPenalty,
    presencePenalty,
    frequencyPenalty,
  };
  // an absent flag leaves the model's own default, which an explicit undefined would not
  return Object.fromEntries(Object.entries(all).filter(([, value]) => value !== undefined));
}

interface Answer {
  readonly text: string;
  readonly last: Piece | undefined;
  readonly stopped: boolean;
}

async function collect(
  conversation: Conversation,
  prompt: string,
  signal: AbortSignal,
  show: (text: string) => void,
): Promise<Answer> {
  let text = "";
  let last: Piece | undefined;
  for await (const piece of conversation.answer(prompt, signal)) {
    text += piece.text;
    show(piece.text);
    last = piece;
  }
  return { text, last, stopped: signal.aborted || last?.finish === "aborted" };
}

async function answerOnce(
  conversation: Conversation,
  prompt: string,
  flags: ChatFlags,
  { output, signal }: CommandContext,
): Promise<void> {
  const show = flags.json ? () => {} : (text: string) => process.stdout.write(text);
  const { text, last } = await collect(conversation, prompt, signal, show);
  signal.throwIfAborted();
  if (flags.json) {
    const { finish, usage, timings } = last ?? {};
    output.result("", { text, finish, usage, timings, tokensPerSecond: last && decodeRate(last) });
  } else {
    process.stdout.write("\n");
    if (last) output.note(speedLine(last));
  }
}

/** Tokens after the first one, which prefill makes, per second of decoding. */
function decodeRate({ usage, timings }: Piece): number | undefined {
  if (!usage || !timings || timings.decodeMs <= 0 || usage.completionTokens < 2) return undefined;
  return ((usage.completionTokens - 1) * 1000) / timings.decodeMs;
}

function speedLine(last: Piece): string {
  const { completionTokens, promptTokens, cachedTokens } = last.usage ?? ({} as Partial<Usage>);
  const rate = decodeRate(last);
  const parts = [`${completionTokens ?? 0} tokens`];
  if (rate !== undefined) parts.push(`${rate.toFixed(1)} tokens/s`);
  if (last.timings && promptTokens !== undefined) {
    parts.push(
      `prompt ${promptTokens} tokens (${cachedTokens ?? 0} cached) in ${last.timings.prefillMs.toFixed(0)} ms`,
    );
  }
  return `[${parts.join(" · ")}]`;
}

async function interact(conversation: Conversation, { output, onInterrupt }: CommandContext): Promise<void> {
  const lines = createInterface({ input: process.stdin, output: process.stdout, prompt: "> " });
  let answering: AbortController | undefined;
  const interrupt = () => {
    if (answering) answering.abort();
    else lines.close();
  };
  lines.on("SIGINT", interrupt); // the terminal's Ctrl-C, which readline takes for itself
  onInterrupt(interrupt);
  output.note("/help lists commands.");
  lines.prompt();
  for await (const line of lines) {
    const [word, ...rest] = line.trim().split(/\s+/);
    if (word === "/exit" || word === "/quit") break;
    if (word === "/help") output.note(HELP);
    else if (word === "/reset") conversation.reset();
    else if (word === "/system") conversation.reset(rest.join(" "));
    else if (word.startsWith("/")) output.note(`${word}: no such command; /help lists them.`);
    else if (word !== "") {
      answering = new AbortController();
      try {
        const { last, stopped } = await collect(conversation, line, answering.signal, (text) =>
          process.stdout.write(text),
        );
        process.stdout.write("\n");
        output.note(stopped ? "[stopped]" : last ? speedLine(last) : "");
      } catch (error) {
        if (!(error instanceof NibbleError)) throw error;
        output.note(`\n${error.message}`); // a prompt too long, an engine that came back: the conversation goes on
      } finally {
        answering = undefined;
      }
    }
    lines.prompt();
  }
  lines.close();
}
