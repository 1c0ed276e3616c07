#!/usr/bin/env python3
"""more-types.gguf: blocks of the tensor types that tensors.gguf does not hold, and what the reference package makes of them.

    pip install numpy gguf safetensors && ./make-more-types.py
"""
import importlib.metadata as installed
import pathlib
import gguf, numpy as np
from safetensors.numpy import save_file

here = pathlib.Path(__file__).resolve().parent
rng = np.random.default_rng(20261123)
writer = gguf.GGUFWriter(here / "more-types.gguf", "test")
expected = {}
for name in ["TQ1_0", "TQ2_0", "MXFP4"]:
    kind = gguf.GGMLQuantizationType[name]
    source = (rng.standard_normal((4, 512)) * 0.1).astype(np.float32)
    data = gguf.quantize(source, kind)
    writer.add_tensor(name, data, raw_dtype=kind)
    expected[name] = gguf.dequantize(data, kind).astype(np.float32)
# MXFP4's exponents at their ends: 2^-127 has no normal float32, 254 is the largest that is no NaN
edges = np.zeros((1, 17 * 3), np.uint8)
edges[0, [0, 17, 34]] = [0, 1, 254]
edges[0, 1:17] = edges[0, 18:34] = np.arange(16) * 17
edges[0, 35:51] = 0x11
kind = gguf.GGMLQuantizationType.MXFP4
writer.add_tensor("MXFP4.edges", edges, raw_dtype=kind)
expected["MXFP4.edges"] = gguf.dequantize(edges, kind).astype(np.float32)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
save_file(expected, here / "more-types.expected.safetensors")
print({name: installed.version(name) for name in ["gguf", "numpy", "safetensors"]})
