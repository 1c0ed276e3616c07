/**
 * The text of a streamed answer written to its socket, one write for the pieces of a moment. Node's `response.write` makes
 * four writes of a chunk (length, line end, text, line end), and a body of bytes has each piece encoded and promised twice:
 * together about as much time as the rest of what HTTP costs a token. And each write wakes the client, on this machine in
 * most cases, where the engine's threads want all cores.
 */
import type { ServerResponse } from "node:http";
import type { Socket } from "node:net";
import type { PacedText } from "../paced-text.ts";

/** The socket, where pieces may be written to it: its turn has come, and the client knows chunks. */
export function chunkSocket({ socket, req }: ServerResponse): Socket | undefined {
  return socket && req.httpVersion === "1.1" && req.method !== "HEAD" ? socket : undefined;
}

/** Pieces that follow each other faster than a screen changes are written together. */
const TOGETHER_MS = 15;
/** The latest, where no piece follows; above TOGETHER_MS, so that in a fast stream pieces send those before them. */
const LATEST_MS = 20;
/** Of the beginning (its role, first words), written as they come. */
const PIECES_AT_ONCE = 3;
const MAX_HELD_CHARACTERS = 4096;

/** Sends the head and, as fast as the client reads, the text; a client that goes away ends the text's source. */
export function sendText(head: Response, text: PacedText, outgoing: ServerResponse, socket: Socket): void {
  let ready: (() => void) | undefined;
  const goOn = (): void => ready?.();
  let held = "";
  let writtenAt = 0;
  let timer: ReturnType<typeof setTimeout> | undefined;
  const write = (): void => {
    clearTimeout(timer);
    timer = undefined;
    socket.write(chunk(held));
    held = "";
  };
  const close = (): void => {
    clearTimeout(timer);
    held = "";
    text.leave();
    goOn();
  };
  const send = async (): Promise<void> => {
    let count = 0;
    for (let piece = await text.next(); piece !== undefined; piece = await text.next()) {
      held += piece;
      const waits = ++count > PIECES_AT_ONCE && held.length < MAX_HELD_CHARACTERS;
      if (waits && performance.now() - writtenAt < TOGETHER_MS) timer ??= setTimeout(write, LATEST_MS);
      else {
        write();
        writtenAt = performance.now(); // not by the timer: pieces that come a little later would all wait for it
      }
      if (!socket.writableNeedDrain) continue;
      await new Promise<void>((resolve) => {
        ready = resolve;
      });
    }
    clearTimeout(timer);
    if (held !== "") write();
    socket.off("drain", goOn);
    outgoing.off("close", close);
    outgoing.end();
  };
  text.sendTo({ comment: (comment) => socket.write(chunk(comment)), stalled: () => outgoing.destroy() });
  outgoing.once("close", close);
  socket.on("drain", goOn);
  outgoing.writeHead(head.status, { ...Object.fromEntries(head.headers), "transfer-encoding": "chunked" });
  outgoing.flushHeaders();
  void send();
}

/** A chunk of RFC 9112, section 7.1; an empty one would end the body. */
function chunk(text: string): string {
  return text === "" ? "" : `${Buffer.byteLength(text).toString(16)}\r\n${text}\r\n`;
}
