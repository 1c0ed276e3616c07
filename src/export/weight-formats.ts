/** How the quantized matrices of a graph are stored, and the bits that a weight takes by the usual rule and in the file. */
import type { NodeProto, TensorProto } from "../onnx/proto.ts";

export interface WeightFormat {
  /** Of a code, as stored: 3 where a 4-bit product unpacks planes of 2 and 1. */
  readonly bits: number;
  readonly blockSize: number;
  /** Of a scale, as stored. */
  readonly scaleBits: number;
  readonly symmetric: boolean;
  /** Products (MatMulNBits) of this format, and weights in them. */
  readonly products: number;
  readonly weights: number;
  /** Codes, scales, and zero points at the code's width, with a row's factor where there is one; padding left out. */
  readonly nominalBits: number;
  /** Everything that the file stores for them. */
  readonly storedBits: number;
}

const UINT8 = 2;
/** TensorProto.DataType: bits of the types that weights are stored in. */
const BITS: Readonly<Record<number, number>> = { 1: 32, 2: 8, 3: 8, 10: 16, 16: 16, 21: 4, 22: 4 };
/** Masks, shifts and other single numbers that unpacking shares are no weights. */
const SMALLEST_LEAF = 2;

/** Formats by falling number of weights. Only products whose weights are constants count. */
export function weightFormats(
  nodes: readonly NodeProto[],
  initializers: readonly TensorProto[],
): readonly WeightFormat[] {
  const stored = new Map(initializers.map((tensor) => [tensor.name!, tensor]));
  const makers = new Map(nodes.flatMap((node) => node.output.map((name) => [name, node] as const)));
  /** The stored tensors behind a value. */
  const leaves = (name: string, found = new Map<string, TensorProto>()): Map<string, TensorProto> => {
    const tensor = stored.get(name);
    if (tensor && elements(tensor) >= SMALLEST_LEAF) found.set(name, tensor);
    for (const input of makers.get(name)?.input ?? []) if (!found.has(input)) leaves(input, found);
    return found;
  };
  const totals = new Map<
    string,
    { format: Omit<WeightFormat, "nominalBits" | "storedBits">; nominal: number; stored: number }
  >();
  for (const node of nodes) {
    if (node.opType !== "MatMulNBits") continue;
    const [rows, cols, blockSize] = ["N", "K", "block_size"].map((name) => attribute(node, name));
    const [codes, scales, zeros] = node.input.slice(1, 4).map((name) => (name ? [...leaves(name).values()] : []));
    if (!codes.length || !scales.length) continue;
    const weights = rows * cols;
    const groups = rows * Math.ceil(cols / blockSize);
    const bits = Math.round(bitsOf(codes) / (groups * blockSize));
    const areCodes = scales.some(({ dataType }) => dataType === UINT8);
    const factors = areCodes ? scales.filter(({ dataType }) => dataType !== UINT8) : [];
    const scaleBits = Math.round((bitsOf(scales) - bitsOf(factors)) / groups);
    const symmetric = !zeros?.length;
    const key = JSON.stringify([bits, blockSize, scaleBits, symmetric]);
    const before = totals.get(key) ?? {
      format: { bits, blockSize, scaleBits, symmetric, products: 0, weights: 0 },
      nominal: 0,
      stored: 0,
    };
    totals.set(key, {
      format: { ...before.format, products: before.format.products + 1, weights: before.format.weights + weights },
      nominal: before.nominal + weights * bits + groups * (scaleBits + (symmetric ? 0 : bits)) + bitsOf(factors),
      stored: before.stored + bitsOf(codes) + bitsOf(scales) + bitsOf(zeros ?? []),
    });
  }
  return [...totals.values()]
    .map(({ format, nominal, stored: all }) => ({
      ...format,
      nominalBits: nominal / format.weights,
      storedBits: all / format.weights,
    }))
    .sort((a, b) => b.weights - a.weights);
}

/** "4 bits in blocks of 32 with zero points, scales of 8 bits" */
export function describeFormat({ bits, blockSize, scaleBits, symmetric }: WeightFormat): string {
  return `${bits} bits in blocks of ${blockSize}${symmetric ? "" : " with zero points"}, scales of ${scaleBits} bits`;
}

function elements({ dims = [] }: TensorProto): number {
  return dims.reduce((product, size) => product * Number(size), 1);
}

function bitsOf(tensors: readonly TensorProto[]): number {
  return tensors.reduce((sum, tensor) => sum + elements(tensor) * (BITS[tensor.dataType ?? 0] ?? 0), 0);
}

function attribute(node: NodeProto, name: string): number {
  return Number(node.attribute.find((one) => one.name === name)?.i ?? 0);
}
