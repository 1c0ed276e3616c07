/** `nibble serve`: exported models behind an OpenAI-compatible API, and the chat page. */
import { readFile, stat } from "node:fs/promises";
import { basename, join, resolve } from "node:path";
import { Command } from "commander";
import { formatLogJson } from "../../server/log.ts";
import { closeOnSignals, DEFAULT_HOST, DEFAULT_PORT, formatLog, serve } from "../../server/main.ts";
import type { ModelSource } from "../../server/models.ts";
import { NibbleError } from "../errors.ts";
import { MANIFEST } from "../export/model-folder.ts";
import { sha256Hex } from "../hash.ts";
import { formatBytes } from "../node/memory.ts";
import { hasPage } from "../node/page.ts";
import { expectedMemory, openEngine } from "./load.ts";
import { byteSize, type LoadFlags, portNumber, wholeNumber, withLoadFlags } from "./options.ts";
import { type CommandContext, runCommand } from "./run.ts";

interface ServeFlags extends LoadFlags {
  readonly port: number;
  readonly host: string;
  readonly apiKey: readonly string[];
  readonly apiKeyFile?: string;
  readonly corsOrigin: readonly string[];
  readonly allowedHost: readonly string[];
  readonly queue?: number;
  readonly idleUnload?: number;
  readonly memory?: number;
  readonly logJson?: boolean;
}

/** Read where no flag gives keys, so that none has to stand in a process list. */
const KEYS_VARIABLE = "NIBBLE_API_KEY";

const isLoopback = (host: string): boolean => /^(127\.|localhost$|::1$)/.test(host);

const repeated = (value: string, previous: readonly string[]): readonly string[] => [...previous, value];

export const serveCommand = withLoadFlags(
  new Command("serve")
    .description("serve exported models: OpenAI-compatible API and chat page")
    .argument("<dir...>", "exported folders; the first one answers where a request names none")
    .option("--port <n>", "0 takes a free one", portNumber, DEFAULT_PORT)
    .option("--host <address>", "0.0.0.0 lets other machines in", DEFAULT_HOST)
    .option("--api-key <key>", `require this key; may be repeated (or ${KEYS_VARIABLE}, comma-separated)`, repeated, [])
    .option("--api-key-file <file>", "require one of the keys in this file, one a line")
    .option("--cors-origin <origin>", "let pages of this origin call; may be repeated; * is any", repeated, [])
    .option("--allowed-host <name>", "answer to this Host name too; may be repeated; * is any", repeated, [])
    .option("--queue <n>", "requests that may wait before others get 503", wholeNumber)
    .option("--idle-unload <seconds>", "unload a model that nobody asked for this long", wholeNumber)
    .option("--memory <size>", "loaded models together, as 4GB; idle ones make room", byteSize)
    .option("--log-json", "log requests as JSON lines"),
).action((dirs: readonly string[], flags: ServeFlags) =>
  runCommand(flags, async (context) => {
    const { output, onInterrupt } = context;
    const keys = await apiKeys(flags);
    if (keys.length === 0 && !isLoopback(flags.host))
      output.note(`${flags.host} lets others in, and no key is asked for: --api-key or --api-key-file sets one.`);
    const format = flags.logJson ? formatLogJson : formatLog;
    const server = await serve({
      models: await modelSources(dirs, flags, context),
      port: flags.port,
      host: flags.host,
      apiKeys: keys,
      corsOrigins: flags.corsOrigin,
      allowedHosts: flags.allowedHost,
      queueLimit: flags.queue,
      idleMs: flags.idleUnload === undefined ? undefined : flags.idleUnload * 1000,
      memoryBytes: flags.memory,
      log: (record) => output.note(format(record)),
      onEvent: (message, error) => output.note(error === undefined ? message : `${message}: ${error}`),
    });
    onInterrupt(() => {}); // closeOnSignals has its own use for Ctrl-C
    closeOnSignals(server, (text) => output.note(text));
    const page = hasPage() ? server.url : undefined;
    const lines = [
      page ? `Chat page: ${page}` : "No chat page here (npm run build:page makes it).",
      `API:       ${server.url}/v1`,
    ];
    output.result(lines.join("\n"), { url: server.url, api: `${server.url}/v1`, page });
    await server.closed;
  }),
);

/** One folder that cannot be read takes no other down: it is said here, and said again to who asks for that model. */
async function modelSources(
  dirs: readonly string[],
  flags: ServeFlags,
  context: CommandContext,
): Promise<ModelSource[]> {
  const found = await Promise.allSettled(dirs.map((dir) => modelSource(dir, flags, context)));
  const failed = found.find((result) => result.status === "rejected");
  if (failed && found.every(({ status }) => status === "rejected")) throw failed.reason;
  return found.map((result, index) => {
    if (result.status === "fulfilled") return result.value;
    const dir = dirs[index];
    context.output.note(
      `${dir} cannot be served: ${result.reason instanceof Error ? result.reason.message : result.reason}`,
    );
    // read again when it is asked for: the folder may have been mended meanwhile
    const load = async ({ maxWaiting }: { maxWaiting: number }) => openEngine(dir, flags, context, maxWaiting);
    return { id: basename(resolve(dir)), created: 0, sizeBytes: 0, load };
  });
}

async function modelSource(dir: string, flags: ServeFlags, context: CommandContext): Promise<ModelSource> {
  const info = await stat(join(dir, MANIFEST))
    .catch(() => stat(join(dir, "config.json")))
    .catch(() => undefined);
  if (!info) {
    throw new NibbleError("not_found", `${dir} is no exported model: it has neither ${MANIFEST} nor config.json.`);
  }
  const memory = await expectedMemory(dir, flags);
  context.output.note(`${dir}: ${formatBytes(memory.totalBytes)} when loaded`);
  return {
    id: basename(resolve(dir)),
    created: Math.floor(info.mtimeMs / 1000),
    sizeBytes: memory.totalBytes,
    digest: await readFile(join(dir, MANIFEST)).then(sha256Hex, () => undefined),
    folder: resolve(dir),
    load: ({ maxWaiting }) => openEngine(dir, flags, context, maxWaiting),
  };
}

async function apiKeys({ apiKey, apiKeyFile }: ServeFlags): Promise<readonly string[]> {
  const file = apiKeyFile === undefined ? "" : await keyFile(apiKeyFile);
  const keys = [...apiKey, ...file.split("\n"), ...(process.env[KEYS_VARIABLE] ?? "").split(",")];
  return keys.map((key) => key.trim()).filter((key) => key !== "");
}

/** A file without a key would leave the door open that it was named to close. */
async function keyFile(path: string): Promise<string> {
  const text = await readFile(path, "utf8").catch((cause) => {
    throw new NibbleError("not_found", `--api-key-file ${path} cannot be read: ${cause.code ?? cause.message}.`, {
      cause,
    });
  });
  if (text.trim() !== "") return text;
  throw new NibbleError("bad_option", `--api-key-file ${path} holds no key: write one a line.`, {
    param: "apiKeyFile",
  });
}
