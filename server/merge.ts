/**
 * Several async iterables as one, each item with the number of its source, in the order they come. At most `atOnce` of
 * them run side by side: one request takes no more places than the engine decodes together.
 */
export async function* merge<T>(
  sources: readonly AsyncIterable<T>[],
  atOnce = sources.length,
): AsyncGenerator<{ index: number; item: T }> {
  if (sources.length === 1) {
    for await (const item of sources[0]) yield { index: 0, item }; // most requests
    return;
  }
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
