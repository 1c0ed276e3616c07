/**
 * Where the bytes of initializers lie: small ones in the .onnx file, large ones in `<file>.onnx_data` (then `_data_1`,
 * ...), as transformers.js and ONNX Runtime expect. Several graphs can share one set of data files.
 */
import { NibbleError } from "../errors.ts";
import type { ByteSink, FolderSink } from "../files.ts";
import { elementCode, type Graph, type Initializer, modelHeader, toGraphProto } from "./graph.ts";
import { encodeModel, type TensorProto } from "./proto.ts";

/** Below this, bytes are in the graph itself: shape inference needs small constants there. */
const INLINE_BYTES = 1024;
/** Browsers hand out buffers of at most 2 GiB; chunks stay below it. */
export const MAX_CHUNK_BYTES = 2_000_000_000;
/** ONNX Runtime maps external tensors from disk; 64 keeps every vector load aligned. */
const ALIGNMENT = 64;

interface Place {
  /** A file beside the graph. */
  readonly location: string;
  readonly offset: number;
  readonly sizeBytes: number;
}

/** Writes initializers to data files as they come and remembers where each is. */
export class ExternalData {
  private readonly places = new Map<string, Place>();
  private sink: ByteSink | undefined;
  private chunk = -1;
  private offset = 0;

  /** @param folder where the data files go, "onnx"; @param file their base name, "model_q4.onnx_data". */
  constructor(
    private readonly out: FolderSink,
    private readonly folder: string,
    private readonly file: string,
    private readonly maxChunkBytes = MAX_CHUNK_BYTES,
  ) {}

  /** How many data files there are so far. */
  get chunks(): number {
    return this.chunk + 1;
  }

  private async append({ name, sizeBytes, data }: Initializer): Promise<void> {
    const start = Math.ceil(this.offset / ALIGNMENT) * ALIGNMENT;
    if (this.chunk < 0 || (this.offset > 0 && start + sizeBytes > this.maxChunkBytes)) {
      await this.sink?.close();
      this.chunk += 1;
      this.offset = 0;
      this.sink = await this.out.create(`${this.folder}/${this.location}`);
    } else if (start > this.offset) {
      await this.sink!.write(new Uint8Array(start - this.offset));
      this.offset = start;
    }
    const bytes = typeof data === "function" ? await data() : data;
    if (bytes.byteLength !== sizeBytes) {
      throw new NibbleError(
        "bad_weights",
        `${name}: expected ${sizeBytes} bytes, its source gave ${bytes.byteLength}.`,
      );
    }
    this.places.set(name, { location: this.location, offset: this.offset, sizeBytes });
    await this.sink!.write(bytes);
    this.offset += sizeBytes;
  }

  private get location(): string {
    return this.chunk === 0 ? this.file : `${this.file}_${this.chunk}`;
  }

  /** Writes what of the graph's large initializers is not there yet, then the graph beside it as `path`. */
  async writeGraph(graph: Graph, path: string, onInitializer?: (initializer: Initializer) => void): Promise<void> {
    const inline = new Map<string, Uint8Array>();
    for (const initializer of graph.initializers.values()) {
      if (initializer.sizeBytes < INLINE_BYTES) {
        const { data } = initializer;
        inline.set(initializer.name, typeof data === "function" ? await data() : data);
      } else if (!this.places.has(initializer.name)) {
        await this.append(initializer);
      }
      onInitializer?.(initializer);
    }
    const proto = toGraphProto(graph, (initializer) => {
      const bytes = inline.get(initializer.name);
      return bytes ? inlineTensor(initializer, bytes) : externalTensor(initializer, this.places.get(initializer.name)!);
    });
    const sink = await this.out.create(path);
    await sink.write(encodeModel({ ...modelHeader, graph: proto }));
    await sink.close();
  }

  async close(): Promise<void> {
    await this.sink?.close();
    this.sink = undefined;
  }
}

/** What writing a graph would take, by the rules above, without reading a tensor. */
export function writtenSize(graph: Graph): { readonly graphBytes: number; readonly dataBytes: number } {
  let offset = 0;
  const proto = toGraphProto(graph, (initializer) => {
    const { sizeBytes } = initializer;
    if (sizeBytes < INLINE_BYTES) return inlineTensor(initializer, new Uint8Array(sizeBytes));
    const start = Math.ceil(offset / ALIGNMENT) * ALIGNMENT;
    offset = start + sizeBytes;
    return externalTensor(initializer, { location: "model_q4.onnx_data", offset: start, sizeBytes });
  });
  return { graphBytes: encodeModel({ ...modelHeader, graph: proto }).byteLength, dataBytes: offset };
}

/** The graph with all its bytes inside, for sessions made in memory. */
export async function toBytes(graph: Graph): Promise<Uint8Array> {
  const bytes = new Map<string, Uint8Array>();
  for (const { name, data } of graph.initializers.values()) {
    bytes.set(name, typeof data === "function" ? await data() : data);
  }
  const proto = toGraphProto(graph, (initializer) => inlineTensor(initializer, bytes.get(initializer.name)!));
  return encodeModel({ ...modelHeader, graph: proto });
}

function tensorHead({ name, type, shape }: Initializer): TensorProto {
  return { name, dataType: elementCode(type), dims: shape.map(BigInt) };
}

function inlineTensor(initializer: Initializer, rawData: Uint8Array): TensorProto {
  return { ...tensorHead(initializer), rawData };
}

function externalTensor(initializer: Initializer, place: Place): TensorProto {
  return storedAt(tensorHead(initializer), place);
}

/** A tensor whose bytes lie in a file beside the graph (TensorProto.external_data). */
export function storedAt(head: TensorProto, { location, offset, sizeBytes }: Place): TensorProto {
  const externalData = [
    { key: "location", value: location },
    { key: "offset", value: String(offset) },
    { key: "length", value: String(sizeBytes) },
  ];
  return { ...head, dataLocation: 1, externalData };
}
