/** The client of http-overhead.ts, a process of its own as clients are: it reads, and notes when tokens arrive. */
import { connect } from "node:net";

/** Milliseconds from the request to its first token and to its last. */
export interface Arrivals {
  readonly firstMs: number;
  readonly lastMs: number;
}

/** Over a bare socket: what a client makes of its answer is no cost of the server's. */
function ask({ url, body }: { url: string; body: string }): Promise<Arrivals> {
  const { hostname, port, host, pathname } = new URL(url);
  return new Promise((resolve, reject) => {
    const socket = connect({ host: hostname, port: Number(port), noDelay: true });
    let start = 0;
    let firstMs: number | undefined;
    let lastMs = 0;
    socket.setEncoding("utf8");
    socket.on("connect", () => {
      start = performance.now();
      const length = Buffer.byteLength(body);
      socket.write(`POST ${pathname} HTTP/1.1\r\nHost: ${host}\r\nContent-Length: ${length}\r\n\r\n${body}`);
    });
    socket.on("data", (text: string) => {
      if (text.includes('"content":"')) {
        lastMs = performance.now() - start;
        firstMs ??= lastMs;
      }
      if (text.includes("[DONE]")) socket.end();
    });
    socket.on("close", () => {
      if (firstMs === undefined) reject(new Error("no token came"));
      else resolve({ firstMs, lastMs });
    });
    socket.on("error", reject);
  });
}

process.on("message", async (message: { url: string; body: string }) => {
  process.send?.(await ask(message));
});
