/** A queue of pieces between what makes them and the one who iterates. */

/** Its own iterator, for one reader who asks for one piece at a time: a generator around it costs each piece some promises. */
export class Stream<T> implements AsyncIterableIterator<T> {
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

  [Symbol.asyncIterator](): this {
    return this;
  }

  next(): Promise<IteratorResult<T>> {
    if (this.queue.length > 0 || this.ended) return this.take();
    return new Promise((resolve) => {
      this.wake = () => {
        this.wake = undefined;
        resolve(this.take());
      };
    });
  }

  /** What is there: a piece, then the error, then the end. */
  private take(): Promise<IteratorResult<T>> {
    const value = this.queue.shift();
    if (value !== undefined) return Promise.resolve({ value, done: false });
    const { error } = this;
    this.error = undefined;
    return error === undefined ? Promise.resolve({ value: undefined, done: true }) : Promise.reject(error);
  }

  return(): Promise<IteratorResult<T>> {
    if (!this.ended) {
      this.end();
      this.onStop();
    }
    this.queue.length = 0;
    this.error = undefined;
    return Promise.resolve({ value: undefined, done: true });
  }
}
