/** An engine at the other end of a port, as the routes in a service worker need it. Its tokenizer is on this side. */
import { NibbleError } from "../errors.ts";
import type { Engine, EngineInfo, EngineStats, GenerateOptions, Piece } from "../runtime/engine.ts";
import type { ChatMessage, ChatTemplateOptions, Tokenizer } from "../tokenizer/tokenizer.ts";
import { tokenizerOf } from "./engine.ts";
import type { EngineMethods } from "./protocol.ts";
import { Client, type Port } from "./rpc.ts";

/** Milliseconds between looks at whether the page with the engine is still there, while it answers. */
const WATCH_MS = 1000;

/**
 * Asks the other side what it has; `timeoutMs` without an answer is an `engine` error: its page is gone. A port says
 * nothing when the page behind it is closed, so `isThere` is asked while answers run, which end with that error too.
 */
export async function remoteEngine(port: Port, timeoutMs: number, isThere: () => Promise<boolean>): Promise<Engine> {
  const client = new Client<EngineMethods>(port);
  const timer = setTimeout(() => {
    client.fail(new NibbleError("engine", `The page with the engine gave no answer in ${timeoutMs} ms.`));
  }, timeoutMs);
  try {
    const [info, files] = await Promise.all([client.call("info", undefined), client.call("tokenizerFiles", undefined)]);
    return new RemoteEngine(client, info, tokenizerOf(files), isThere);
  } finally {
    clearTimeout(timer);
  }
}

class RemoteEngine implements Engine {
  private readonly counts = { running: 0, waiting: 0, generatedTokens: 0, promptTokens: 0, cachedTokens: 0 };

  constructor(
    private readonly client: Client<EngineMethods>,
    readonly info: EngineInfo,
    readonly tokenizer: Tokenizer,
    private readonly isThere: () => Promise<boolean>,
  ) {}

  chat(messages: readonly ChatMessage[], options: GenerateOptions & ChatTemplateOptions = {}): AsyncIterable<Piece> {
    const text = this.tokenizer.applyChatTemplate(messages, options);
    return this.generate(this.tokenizer.encode(text, { addSpecialTokens: false }), options);
  }

  async *generate(prompt: readonly number[], options: GenerateOptions = {}): AsyncGenerator<Piece> {
    const { signal, ...rest } = options;
    this.counts.running++;
    const watch = setInterval(() => void this.failIfGone(), WATCH_MS);
    try {
      const request = { prompt: { kind: "ids", ids: prompt }, options: rest } as const;
      for await (const piece of this.client.stream("generate", request, signal)) {
        this.counts.generatedTokens += piece.tokens.length;
        yield piece;
      }
    } finally {
      clearInterval(watch);
      this.counts.running--;
    }
  }

  private async failIfGone(): Promise<void> {
    if (await this.isThere()) return;
    this.client.fail(new NibbleError("engine", "The page with the engine was closed while it answered."));
  }

  embed(prompts: readonly (readonly number[])[]): Promise<Float32Array[]> {
    return this.client.call("embed", prompts);
  }

  /** Of what came through this side. */
  stats(): EngineStats {
    return { ...this.counts };
  }

  /** The engine belongs to the other side. */
  async dispose(): Promise<void> {}
}
