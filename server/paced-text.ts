/**
 * The pieces of a streamed answer, one asked for when the one before is sent, with the clock of a connection: comments
 * while a piece takes long, an end where the client reads no more. A body (sse.ts) or a socket (node/send-text.ts) sends it.
 */
export interface TextStreamOptions {
  readonly keepAliveMs: number;
  /** Sent where nothing else is; "" sends nothing. */
  readonly keepAlive: string;
  readonly onError: (error: unknown) => string;
  readonly onCancel: () => void;
  readonly onEnd: () => void;
  /** A client that reads nothing for this long is taken as gone, and its place given to others. */
  readonly stallMs?: number;
}

/** What sends the pieces. */
export interface TextSink {
  /** Takes a comment while `next` is waited for. */
  comment(text: string): void;
  /** The client read nothing for too long: there is no more to send. */
  stalled(error: Error): void;
}

/** Longer than a laptop's network takes to come back. */
const DEFAULT_STALL_MS = 120_000;
/** Looks at the clock in each such time: a comment comes at most a quarter of it late. */
const CLOCK_TICKS = 4;

export class PacedText {
  private readonly iterator: AsyncIterator<string>;
  private first: Promise<IteratorResult<string>> | undefined;
  private late = false;
  private sink: TextSink | undefined;
  private clock: ReturnType<typeof setInterval> | undefined;
  private ticks = 0;
  private waitsFor: "piece" | "reader" = "reader";
  private ended = false;

  private constructor(
    pieces: AsyncIterable<string>,
    private readonly options: TextStreamOptions,
  ) {
    this.iterator = pieces[Symbol.asyncIterator]();
  }

  /** Begun when the first piece is there or takes longer than the keep-alive interval; throws what fails before. */
  static async begin(pieces: AsyncIterable<string>, options: TextStreamOptions): Promise<PacedText> {
    const paced = new PacedText(pieces, options);
    paced.first = paced.iterator.next();
    try {
      paced.late = !(await within(paced.first, options.keepAliveMs));
    } catch (error) {
      options.onEnd();
      throw error;
    }
    paced.startClock();
    return paced;
  }

  /** Where comments and the end of a client that does not read are told; called before `next`. */
  sendTo(sink: TextSink): void {
    this.sink = sink;
  }

  /** One timer for all pieces, which counts: a token every few milliseconds would set and clear two each. */
  private startClock(): void {
    const { keepAlive, keepAliveMs, stallMs = DEFAULT_STALL_MS } = this.options;
    const tickMs = Math.min(keepAliveMs, stallMs) / CLOCK_TICKS;
    this.clock = setInterval(() => {
      const waitedMs = ++this.ticks * tickMs;
      if (this.waitsFor === "piece" && waitedMs >= keepAliveMs) {
        this.ticks = 0;
        if (keepAlive !== "") this.sink?.comment(keepAlive);
      }
      if (this.waitsFor === "reader" && waitedMs >= stallMs) {
        this.leave();
        this.sink?.stalled(new Error("The client stopped reading."));
      }
    }, tickMs);
  }

  /** The next piece, undefined when none is left; a failure comes as a last piece that describes it. */
  async next(): Promise<string | undefined> {
    if (this.ended) return undefined;
    if (this.late) {
      this.late = false;
      if (this.options.keepAlive !== "") return this.options.keepAlive;
    }
    this.ticks = 0;
    this.waitsFor = "piece";
    const next = this.first ?? this.iterator.next();
    this.first = undefined;
    const { piece, last } = await next.then(
      ({ value, done }) => (done ? { piece: undefined, last: true } : { piece: value, last: false }),
      (error) => ({ piece: this.ended ? undefined : this.options.onError(error), last: true }),
    );
    if (this.ended) return undefined; // the client left meanwhile
    this.ticks = 0;
    this.waitsFor = "reader";
    if (last) this.end();
    return piece;
  }

  /** The client is gone. */
  leave(): void {
    if (this.ended) return;
    this.options.onCancel();
    this.end();
    this.iterator.return?.().catch(() => undefined); // it is told to stop; what it throws has no reader
  }

  private end(): void {
    this.ended = true;
    clearInterval(this.clock);
    this.options.onEnd();
  }
}

/** Whether it resolves in time; throws what it rejects with until then. */
async function within(promise: Promise<unknown>, ms: number): Promise<boolean> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const late = new Promise<boolean>((resolve) => {
    timer = setTimeout(resolve, ms, false);
  });
  try {
    return await Promise.race([promise.then(() => true), late]);
  } finally {
    clearTimeout(timer);
  }
}
