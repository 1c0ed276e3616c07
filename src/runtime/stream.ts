/** A queue of pieces between what makes them and the one who iterates. */

export class Stream<T> implements AsyncIterable<T> {
  private readonly queue: T[] = [];
  private ended = false;
  private error: unknown;
  private wake: (() => void) | undefined;

  /** @param onStop called once when the reader leaves before the end. */
  constructor(private readonly onStop: () => void = () => {}) {}

  push(value: T): void {
    if (this.ended) return;
    this.queue.push(value);
    this.wake?.();
  }

  end(): void {
    this.ended = true;
    this.wake?.();
  }

  fail(error: unknown): void {
    if (this.ended) return;
    this.error = error;
    this.end();
  }

  async *[Symbol.asyncIterator](): AsyncGenerator<T> {
    try {
      for (;;) {
        const value = this.queue.shift();
        if (value !== undefined) yield value;
        else if (this.ended) break;
        else await new Promise<void>((resolve) => (this.wake = resolve));
      }
      if (this.error !== undefined) throw this.error;
    } finally {
      if (!this.ended) {
        this.ended = true;
        this.onStop();
      }
    }
  }
}
