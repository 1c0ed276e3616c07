/** Async iterables put together and changed: every token of every answer passes here, so a single one costs little. */

/** Each item changed, by what does not throw. Not a generator: that would cost each item several promises instead of one. */
export function mapped<A, B>(items: AsyncIterable<A>, change: (item: A) => B): AsyncIterableIterator<B> {
  const iterator = items[Symbol.asyncIterator]();
  const changed = (result: IteratorResult<A>): IteratorResult<B> =>
    result.done ? result : { value: change(result.value), done: false };
  const end = { value: undefined, done: true } as const;
  return {
    [Symbol.asyncIterator]() {
      return this;
    },
    next: () => iterator.next().then(changed),
    return: async () => {
      await iterator.return?.();
      return end;
    },
  };
}

/**
 * Several async iterables as one, each item with the number of its source, in the order they come. At most `atOnce` of
 * them run side by side: one request takes no more places than the engine decodes together.
 */
export function merge<T>(
  sources: readonly AsyncIterable<T>[],
  atOnce = sources.length,
): AsyncIterableIterator<{ index: number; item: T }> {
  if (sources.length === 1) return mapped(sources[0], (item) => ({ index: 0, item })); // most requests
  return mergeMany(sources, atOnce);
}

async function* mergeMany<T>(
  sources: readonly AsyncIterable<T>[],
  atOnce: number,
): AsyncGenerator<{ index: number; item: T }> {
  type Step = { index: number; result: IteratorResult<T> };
  const iterators: AsyncIterator<T>[] = [];
  const step = async (index: number): Promise<Step> => ({ index, result: await iterators[index].next() });
  const pending = new Map<number, Promise<Step>>();
  const startNext = (): void => {
    const index = iterators.length;
    if (index >= sources.length) return;
    iterators.push(sources[index][Symbol.asyncIterator]());
    pending.set(index, step(index));
  };
  for (let i = 0; i < Math.max(1, atOnce); i++) startNext();
  try {
    while (pending.size > 0) {
      const { index, result } = await Promise.race(pending.values());
      if (result.done) {
        pending.delete(index);
        startNext();
      } else {
        pending.set(index, step(index));
        yield { index, item: result.value };
      }
    }
  } finally {
    for (const promise of pending.values()) promise.catch(() => undefined); // the first error is the one that counts
    for (const iterator of iterators) iterator.return?.().catch(() => undefined);
  }
}
