/** The client of http-overhead.ts, a process of its own as clients are: sends a request, times each token's arrival. */
import { Agent, request } from "node:http";

/** Milliseconds from the request to its first token and to its last. */
export interface Arrivals {
  readonly firstMs: number;
  readonly lastMs: number;
}

const agent = new Agent({ keepAlive: true });

function ask({ url, body }: { url: string; body: string }): Promise<Arrivals> {
  return new Promise((resolve, reject) => {
    const start = performance.now();
    let firstMs: number | undefined;
    let lastMs = 0;
    const sent = request(url, { method: "POST", agent, headers: { "Content-Type": "application/json" } }, (answer) => {
      answer.setEncoding("utf8");
      answer.on("data", (text: string) => {
        if (!text.includes('"content":"')) return;
        lastMs = performance.now() - start;
        firstMs ??= lastMs;
      });
      answer.on("end", () =>
        firstMs === undefined ? reject(new Error("no token came")) : resolve({ firstMs, lastMs }),
      );
      answer.on("error", reject);
    });
    sent.on("error", reject);
    sent.end(body);
  });
}

process.on("message", (message: { url: string; body: string }) => {
  ask(message).then(
    (arrivals) => process.send?.(arrivals),
    (error) => {
      console.error(error);
      process.exit(1);
    },
  );
});
