/**
 * Makes this folder from the layer of `shared/golden/quant` (given as argument): the weight as it is, the activations as
 * their second moment in float64 (they alone would be 2 MB), the expected losses. Run: npx tsx test/golden/quant/make.ts FOLDER
 */
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { f16ToF32 } from "../../../src/tensor/dtypes.ts";
import { secondMoment } from "../../quant/random.ts";

const [folder] = process.argv.slice(2);
const file = readFileSync(join(folder, "layer.safetensors"));
const headerBytes = Number(file.readBigUInt64LE(0));
const header = JSON.parse(file.subarray(8, 8 + headerBytes).toString());
const tensor = (name: string) => {
  const [start, end] = header[name].data_offsets;
  return new Uint8Array(file.subarray(8 + headerBytes + start, 8 + headerBytes + end));
};
const [tokens, cols] = header.activations.shape;
const activations = f16ToF32(new Uint16Array(tensor("activations").buffer));
const here = import.meta.dirname;
writeFileSync(join(here, "weight.f32"), tensor("weight"));
writeFileSync(join(here, "second-moment.f64"), new Uint8Array(secondMoment(activations, tokens, cols).buffer));
for (const [name, as] of [
  ["rtn_asym_g32.codes", "rtn_asym_g32.codes.u8"],
  ["rtn_sym_m8_g32.codes", "rtn_sym_m8_g32.codes.u8"],
  ["rtn_sym_g32.codes", "rtn_sym_g32.codes.u8"],
])
  writeFileSync(join(here, as), tensor(name));
writeFileSync(join(here, "golden.json"), readFileSync(join(folder, "golden.json")));
const { numpy } = JSON.parse(readFileSync(join(folder, "golden.json"), "utf8"));
console.log(`node ${process.version}; losses by numpy ${numpy}`);
