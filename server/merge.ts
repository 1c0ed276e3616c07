/** Several async iterables as one, each item with the number of its source, in the order they come. */
export async function* merge<T>(sources: readonly AsyncIterable<T>[]): AsyncGenerator<{ index: number; item: T }> {
  const iterators = sources.map((source) => source[Symbol.asyncIterator]());
  type Step = { index: number; result: IteratorResult<T> };
  const step = async (index: number): Promise<Step> => ({ index, result: await iterators[index].next() });
  const pending = new Map<number, Promise<Step>>(iterators.map((_, index) => [index, step(index)]));
  try {
    while (pending.size > 0) {
      const { index, result } = await Promise.race(pending.values());
      if (result.done) pending.delete(index);
      else {
        pending.set(index, step(index));
        yield { index, item: result.value };
      }
    }
  } finally {
    for (const promise of pending.values()) promise.catch(() => undefined); // the first error is the one that counts
    for (const iterator of iterators) iterator.return?.().catch(() => undefined);
  }
}
