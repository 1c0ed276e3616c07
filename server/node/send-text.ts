/**
 * The text of a streamed answer written to its socket, one write a piece. Node's `response.write` makes four of a chunk
 * (length, line end, text, line end), and a body of bytes has each piece encoded and promised twice: together about as
 * much time as the rest of what HTTP costs a token.
 */
import type { ServerResponse } from "node:http";
import type { Socket } from "node:net";
import type { PacedText } from "../paced-text.ts";

/** The socket, where pieces may be written to it: its turn has come, and the client knows chunks. */
export function chunkSocket({ socket, req }: ServerResponse): Socket | undefined {
  return socket && req.httpVersion === "1.1" && req.method !== "HEAD" ? socket : undefined;
}

/** Sends the head and, as fast as the client reads, the text; a client that goes away ends the text's source. */
export function sendText(head: Response, text: PacedText, outgoing: ServerResponse, socket: Socket): void {
  let ready: (() => void) | undefined;
  const goOn = (): void => ready?.();
  const close = (): void => {
    text.leave();
    goOn();
  };
  const send = async (): Promise<void> => {
    for (let piece = await text.next(); piece !== undefined; piece = await text.next()) {
      if (socket.write(chunk(piece))) continue;
      await new Promise<void>((resolve) => {
        ready = resolve;
      });
    }
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
