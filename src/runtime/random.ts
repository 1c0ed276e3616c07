/**
 * xoshiro128** 1.1 (Blackman and Vigna 2018, arXiv 1805.01407), its state filled by SplitMix32: the same seed gives
 * the same answer in Node and in a page.
 */
export class Random {
  private a: number;
  private b: number;
  private c: number;
  private d: number;

  /** Without a seed: 64 bits from the system's generator. */
  constructor(seed?: number) {
    const [low, high] = seed === undefined ? crypto.getRandomValues(new Uint32Array(2)) : seedWords(seed);
    let state = low;
    const splitMix = (): number => {
      state = (state + 0x9e3779b9) | 0;
      let z = state ^ (state >>> 16);
      z = Math.imul(z, 0x21f0aaad);
      z = Math.imul(z ^ (z >>> 15), 0x735a2d97);
      return z ^ (z >>> 15);
    };
    this.a = splitMix();
    this.b = splitMix() ^ high;
    this.c = splitMix();
    this.d = splitMix() | 1; // an all-zero state never leaves zero
  }

  private next32(): number {
    const x = Math.imul(this.b, 5);
    const result = Math.imul((x << 7) | (x >>> 25), 9);
    const t = this.b << 9;
    this.c ^= this.a;
    this.d ^= this.b;
    this.b ^= this.c;
    this.a ^= this.d;
    this.c ^= t;
    this.d = (this.d << 11) | (this.d >>> 21);
    return result >>> 0;
  }

  /** Uniform in [0, 1) with 53 random bits. */
  uniform(): number {
    return ((this.next32() >>> 5) * 2 ** 26 + (this.next32() >>> 6)) / 2 ** 53;
  }
}

function seedWords(seed: number): [number, number] {
  return [seed | 0, Math.floor(seed / 2 ** 32) | 0];
}
