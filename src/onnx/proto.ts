/**
 * The part of onnx.proto (ONNX IR version 10) that Nibble reads and writes, as a schema for @bufbuild/protobuf, which
 * does the encoding by reflection: no generated code and no eval, so it runs under a strict CSP.
 */
import { create, createFileRegistry, type DescMessage, fromBinary, toBinary } from "@bufbuild/protobuf";
import {
  FileDescriptorProtoSchema,
  FieldDescriptorProto_Label as Label,
  FieldDescriptorProto_Type as Type,
} from "@bufbuild/protobuf/wkt";
import { NibbleError } from "../errors.ts";

type FieldKind = "int32" | "int64" | "uint64" | "float" | "double" | "string" | "bytes" | (string & {});
/** name: [number, kind, "repeated" | "packed"]; a kind that is no scalar names a message of this schema. */
type Fields = Readonly<Record<string, readonly [number, FieldKind, ("repeated" | "packed")?]>>;

const schema: Readonly<Record<string, Fields>> = {
  ModelProto: {
    ir_version: [1, "int64"],
    producer_name: [2, "string"],
    producer_version: [3, "string"],
    graph: [7, "GraphProto"],
    opset_import: [8, "OperatorSetIdProto", "repeated"],
    metadata_props: [14, "StringStringEntryProto", "repeated"],
  },
  OperatorSetIdProto: { domain: [1, "string"], version: [2, "int64"] },
  GraphProto: {
    node: [1, "NodeProto", "repeated"],
    name: [2, "string"],
    initializer: [5, "TensorProto", "repeated"],
    input: [11, "ValueInfoProto", "repeated"],
    output: [12, "ValueInfoProto", "repeated"],
  },
  NodeProto: {
    input: [1, "string", "repeated"],
    output: [2, "string", "repeated"],
    name: [3, "string"],
    op_type: [4, "string"],
    attribute: [5, "AttributeProto", "repeated"],
    domain: [7, "string"],
  },
  AttributeProto: {
    name: [1, "string"],
    f: [2, "float"],
    i: [3, "int64"],
    s: [4, "bytes"],
    t: [5, "TensorProto"],
    g: [6, "GraphProto"],
    floats: [7, "float", "repeated"],
    ints: [8, "int64", "repeated"],
    strings: [9, "bytes", "repeated"],
    type: [20, "int32"],
  },
  ValueInfoProto: { name: [1, "string"], type: [2, "TypeProto"] },
  TypeProto: { tensor_type: [1, "TensorTypeProto"] },
  TensorTypeProto: { elem_type: [1, "int32"], shape: [2, "TensorShapeProto"] },
  TensorShapeProto: { dim: [1, "DimensionProto", "repeated"] },
  DimensionProto: { dim_value: [1, "int64"], dim_param: [2, "string"] },
  TensorProto: {
    dims: [1, "int64", "repeated"],
    data_type: [2, "int32"],
    float_data: [4, "float", "packed"],
    int32_data: [5, "int32", "packed"],
    int64_data: [7, "int64", "packed"],
    name: [8, "string"],
    raw_data: [9, "bytes"],
    external_data: [13, "StringStringEntryProto", "repeated"],
    data_location: [14, "int32"],
  },
  StringStringEntryProto: { key: [1, "string"], value: [2, "string"] },
};

const scalarTypes: Readonly<Record<string, Type>> = {
  int32: Type.INT32,
  int64: Type.INT64,
  uint64: Type.UINT64,
  float: Type.FLOAT,
  double: Type.DOUBLE,
  string: Type.STRING,
  bytes: Type.BYTES,
};

/** proto2, because ONNX's optional fields have presence: an attribute `i` of 0 must be written. */
const file = create(FileDescriptorProtoSchema, {
  name: "onnx.proto",
  package: "onnx",
  syntax: "proto2",
  messageType: Object.entries(schema).map(([name, fields]) => ({
    name,
    field: Object.entries(fields).map(([fieldName, [number, kind, repeat]]) => ({
      name: fieldName,
      jsonName: fieldName,
      number,
      label: repeat ? Label.REPEATED : Label.OPTIONAL,
      type: scalarTypes[kind] ?? Type.MESSAGE,
      typeName: scalarTypes[kind] ? undefined : `.onnx.${kind}`,
      options: repeat === "packed" ? { packed: true } : undefined,
    })),
  })),
});
const modelDesc = createFileRegistry(file, () => undefined).getMessage("onnx.ModelProto") as DescMessage;

export interface TensorProto {
  dims?: bigint[];
  dataType?: number;
  floatData?: number[];
  int32Data?: number[];
  int64Data?: bigint[];
  name?: string;
  rawData?: Uint8Array;
  externalData?: { key: string; value: string }[];
  /** 1 = the bytes are in another file. */
  dataLocation?: number;
}

export interface AttributeProto {
  name: string;
  /** 1 float, 2 int, 3 string, 4 tensor, 5 graph, 6 floats, 7 ints, 8 strings */
  type: number;
  f?: number;
  i?: bigint;
  s?: Uint8Array;
  t?: TensorProto;
  g?: GraphProto;
  floats?: number[];
  ints?: bigint[];
  strings?: Uint8Array[];
}

export interface NodeProto {
  input: string[];
  output: string[];
  name?: string;
  opType: string;
  domain?: string;
  attribute: AttributeProto[];
}

export interface ValueInfoProto {
  name: string;
  type?: { tensorType?: { elemType: number; shape?: { dim: { dimValue?: bigint; dimParam?: string }[] } } };
}

export interface GraphProto {
  name?: string;
  node: NodeProto[];
  initializer: TensorProto[];
  input: ValueInfoProto[];
  output: ValueInfoProto[];
}

export interface ModelProto {
  irVersion: bigint;
  producerName?: string;
  producerVersion?: string;
  graph: GraphProto;
  opsetImport: { domain: string; version: bigint }[];
  metadataProps?: { key: string; value: string }[];
}

/** A model as the bytes of an .onnx file (at most 2 GiB: protobuf's own limit). */
export function encodeModel(model: ModelProto): Uint8Array {
  return toBinary(modelDesc, create(modelDesc, model as never));
}

/**
 * The bytes of an .onnx file as a model of plain objects; fields outside the schema are ignored. Error `bad_file`, which
 * says `name`, for bytes that are no model or only the beginning of one.
 */
export function decodeModel(bytes: Uint8Array, name = "The graph"): ModelProto {
  try {
    return plain(fromBinary(modelDesc, bytes)) as ModelProto;
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message : String(cause);
    const message = `${name} is no whole ONNX file (${reason}; ${bytes.length} bytes): copy or export it again.`;
    throw new NibbleError("bad_file", message, { cause });
  }
}

/** Messages without their type tags, so that parts of one can be put into another and encoded again. */
function plain(value: unknown): unknown {
  if (Array.isArray(value)) return value.map(plain);
  if (typeof value !== "object" || value === null || value instanceof Uint8Array) return value;
  const entries = Object.entries(value).filter(([key]) => !key.startsWith("$"));
  return Object.fromEntries(entries.map(([key, field]) => [key, plain(field)]));
}
