/**
 * What HTTP costs: tokens per second and time to first token through a streamed chat completion, to one client in a
 * process of its own, against the engine in this process; rounds interleaved so that a busy machine slows both alike.
 *
 *   npx tsx test/bench/http-overhead.ts FOLDER [rounds = 16] [tokens = 128]
 */
import { fork } from "node:child_process";
import { once } from "node:events";
import { setTimeout as pause } from "node:timers/promises";
import { serve } from "../../server/main.ts";
import { loadEngine } from "../../src/node/engine.ts";
import { atRest } from "./at-rest.ts";
import type { Arrivals } from "./http-client.ts";

/** Both begin with the threads of the runtime asleep, as a request finds them. */
const REST_MS = 50;

const [folder, rounds = "16", tokens = "128"] = process.argv.slice(2);
const maxTokens = Number(tokens);
const content = "Write a long story about a dog.";
const engine = await loadEngine(folder);
const model = { id: "m", created: 0, sizeBytes: 0, load: async () => engine };
const server = await serve({ models: [model], port: 0 });
const client = fork(new URL("./http-client.ts", import.meta.url));
client.on("exit", (code) => {
  throw new Error(`the client ended with ${code}`); // nothing would come any more
});

interface Timing {
  readonly firstMs: number;
  readonly tokensPerSecond: number;
}

/** Of the milliseconds at which the first and the last token arrived. */
function timing(firstMs: number, lastMs: number): Timing {
  return { firstMs, tokensPerSecond: ((maxTokens - 1) / (lastMs - firstMs)) * 1000 };
}

async function inProcess(): Promise<Timing> {
  const start = performance.now();
  const arrivals: number[] = [];
  const options = { maxTokens, temperature: 0, ignoreEos: true };
  const { tokenizer } = engine;
  const messages = [{ role: "user", content }];
  const prompt = tokenizer.chatTemplate
    ? tokenizer.encode(tokenizer.applyChatTemplate(messages), { addSpecialTokens: false })
    : tokenizer.encode(content);
  for await (const { text } of engine.generate(prompt, options)) if (text) arrivals.push(performance.now());
  return timing(arrivals[0] - start, arrivals[arrivals.length - 1] - start);
}

function throughHttp(): Promise<Timing> {
  const messages = [{ role: "user", content }];
  const body = { messages, max_tokens: maxTokens, temperature: 0, ignore_eos: true, stream: true };
  client.send({ url: `${server.url}/v1/chat/completions`, body: JSON.stringify(body) });
  return once(client, "message").then(([{ firstMs, lastMs }]: Arrivals[]) => timing(firstMs, lastMs));
}

const median = (values: readonly number[]): number => [...values].sort((a, b) => a - b)[values.length >> 1];

await inProcess();
await throughHttp();
await atRest();
const engineTimes: Timing[] = [];
const httpTimes: Timing[] = [];
for (let round = 0; round < Number(rounds); round++) {
  const both = [async () => engineTimes.push(await inProcess()), async () => httpTimes.push(await throughHttp())];
  for (const run of round % 2 === 0 ? both : both.reverse()) {
    await pause(REST_MS);
    await run();
  }
}
const ratios = httpTimes.map(({ tokensPerSecond }, round) => tokensPerSecond / engineTimes[round].tokensPerSecond);
const speed = (times: readonly Timing[]): number => median(times.map(({ tokensPerSecond }) => tokensPerSecond));
const first = (times: readonly Timing[]): number => median(times.map(({ firstMs }) => firstMs));
console.log(
  `${engine.info.id} (${engine.info.file}, ${engine.info.binding}), ${rounds} rounds of ${maxTokens} tokens, medians:\n` +
    `engine ${speed(engineTimes).toFixed(1)} tokens/s, first after ${first(engineTimes).toFixed(1)} ms\n` +
    `HTTP   ${speed(httpTimes).toFixed(1)} tokens/s, first after ${first(httpTimes).toFixed(1)} ms\n` +
    `HTTP / engine of one round ${(100 * median(ratios)).toFixed(1)} %, ` +
    `added to the first token ${(first(httpTimes) - first(engineTimes)).toFixed(2)} ms`,
);
client.removeAllListeners("exit").kill();
await server.close();
process.exit(0);
