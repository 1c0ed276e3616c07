/**
 * Keys and values of prompt prefixes, kept in blocks of tokens and found again by a hash of everything up to the
 * block's end. Bounded in bytes; the block that was not used for longest goes first.
 */
export interface PrefixStore<Part extends ArrayBufferView> {
  readTokens(row: number, start: number, count: number): Part[];
  writeTokens(row: number, start: number, count: number, parts: readonly Part[]): void;
}

/** Tokens per block: small enough that little of a shared prefix is lost, large enough that copies are runs. */
export const BLOCK_TOKENS = 32;

/** Keys and values of BLOCK_TOKENS tokens, and what they belong to. */
export interface Block<Part> {
  readonly tokens: readonly number[];
  readonly parent: string;
  readonly parts: readonly Part[];
  readonly sizeBytes: number;
}

/** Where blocks outlive the process. */
export interface BlockStore<Part> {
  /** Undefined where there is none, or where what is there is damaged. */
  read(key: string): Block<Part> | undefined;
  write(key: string, block: Block<Part>): void;
}

export class PrefixCache<Part extends ArrayBufferView> {
  /** In order of use, oldest first. */
  private readonly blocks = new Map<string, Block<Part>>();
  private sizeBytes = 0;

  constructor(
    private readonly store: PrefixStore<Part>,
    private readonly maxBytes: number,
    private readonly disk?: BlockStore<Part>,
  ) {}

  get bytes(): number {
    return this.sizeBytes;
  }

  /** Fills a row with the longest known prefix of `tokens`; returns how many tokens that are, never all of them. */
  restore(row: number, tokens: readonly number[], reserve: (tokens: number) => void): number {
    const chain = this.chain(tokens);
    // the model has to see at least the last token: its logits are not kept
    while (chain.length * BLOCK_TOKENS >= tokens.length) chain.pop();
    if (chain.length > 0) reserve(chain.length * BLOCK_TOKENS);
    for (const [i, { block }] of chain.entries()) {
      this.store.writeTokens(row, i * BLOCK_TOKENS, BLOCK_TOKENS, block.parts);
    }
    for (const { key, block } of chain.reverse()) this.touch(key, block); // the first block is needed most
    this.makeRoom();
    return chain.length * BLOCK_TOKENS;
  }

  /** Keeps every whole block of the first `count` tokens of a row. */
  keep(row: number, tokens: readonly number[], count: number): void {
    if (this.maxBytes <= 0) return;
    count = Math.min(count, tokens.length);
    const known = this.chain(tokens.slice(0, count));
    const after = { start: known.length * BLOCK_TOKENS, parent: known.at(-1)?.key };
    for (const { start, key, parent, tokens: slice } of blocksOf(tokens, count, after)) {
      const parts = this.store.readTokens(row, start, BLOCK_TOKENS);
      const sizeBytes = parts.reduce((sum, part) => sum + part.byteLength, 0);
      const old = this.blocks.get(key); // another text with the same hash: the newer one stays
      if (old) this.remove(key, old);
      const block = { tokens: slice, parent, parts, sizeBytes };
      this.blocks.set(key, block);
      this.sizeBytes += sizeBytes;
      this.disk?.write(key, block);
    }
    for (const { key, block } of known.reverse()) this.touch(key, block);
    this.makeRoom();
  }

  private makeRoom(): void {
    for (const [key, block] of this.blocks) {
      if (this.sizeBytes <= this.maxBytes) break;
      this.remove(key, block);
    }
  }

  clear(): void {
    this.blocks.clear();
    this.sizeBytes = 0;
  }

  private chain(tokens: readonly number[]): { key: string; block: Block<Part> }[] {
    const found: { key: string; block: Block<Part> }[] = [];
    for (const place of blocksOf(tokens, tokens.length)) {
      const { key } = place;
      const block = this.blocks.get(key) ?? this.load(key);
      if (!block || !belongsTo(block, place)) break;
      found.push({ key, block });
    }
    return found;
  }

  private load(key: string): Block<Part> | undefined {
    const block = this.disk?.read(key);
    if (!block) return undefined;
    this.blocks.set(key, block);
    this.sizeBytes += block.sizeBytes;
    return block;
  }

  private touch(key: string, block: Block<Part>): void {
    this.blocks.delete(key);
    this.blocks.set(key, block);
  }

  private remove(key: string, block: Block<Part>): void {
    this.blocks.delete(key);
    this.sizeBytes -= block.sizeBytes;
  }
}

/** A whole block of a text. */
interface BlockPlace {
  /** Of its first token. */
  readonly start: number;
  readonly key: string;
  /** Key of the block before it, "" of the first one. */
  readonly parent: string;
  readonly tokens: readonly number[];
}

/** The whole blocks of a text's first `count` tokens, in order; those from `after` on, where its parent is known. */
export function* blocksOf(
  tokens: readonly number[],
  count: number,
  after: { readonly start: number; readonly parent: string | undefined } = { start: 0, parent: undefined },
): Generator<BlockPlace> {
  let { start, parent = "" } = after;
  for (; start + BLOCK_TOKENS <= count; start += BLOCK_TOKENS) {
    const slice = tokens.slice(start, start + BLOCK_TOKENS);
    const key = blockKey(parent, slice);
    yield { start, key, parent, tokens: slice };
    parent = key;
  }
}

/** Whether what was found under a place's key is of that text: a hash may be shared, tokens may not. */
export function belongsTo(block: Block<unknown>, { parent, tokens }: BlockPlace): boolean {
  return block.parent === parent && block.tokens.every((token, i) => token === tokens[i]);
}

/** Two FNV-1a hashes of 32 bits over the parent's key and the block's tokens. */
function blockKey(parent: string, tokens: readonly number[]): string {
  let a = 0x811c9dc5;
  let b = 0x9747b28c;
  const add = (value: number) => {
    a = Math.imul(a ^ value, 0x01000193);
    b = Math.imul(b ^ value, 0x85ebca6b) ^ (b >>> 13);
  };
  for (let i = 0; i < parent.length; i++) add(parent.charCodeAt(i));
  for (const token of tokens) add(token);
  return `${(a >>> 0).toString(36)}-${(b >>> 0).toString(36)}`;
}
