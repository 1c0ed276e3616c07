"""Quantizes the decoder linears of a Hugging Face folder with another toolkit, and saves the values that its codes stand for.

  python quantizer_peers.py < job.json
  job: {"peer": "hqq" | "gptqmodel" | "autoround", "checkpoint": folder, "out": folder, "bits": 4, "groupSize": 32,
        "symmetric": false, "windows": [[token ids], ...], "iterations": 200}

The last line on standard output is {"cpuSeconds", "wallSeconds", "peakMB", "bitsPerWeight", "version"}: of quantizing alone, as far as
the toolkit lets the two be told apart; peak memory is the process's. Embedding, head and norms stay as they are.
"""

import importlib.metadata
import json
import os
import resource
import sys
import tempfile
import time

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # gptqmodel asks for more workers than two cores have, and stops
job = json.load(sys.stdin)
sys.stdout = sys.stderr  # toolkits print; the result has standard output to itself

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def decoder_linears(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in name}


def load():
    return AutoModelForCausalLM.from_pretrained(job["checkpoint"], dtype=torch.float32).eval()


def hqq():
    from hqq.core.quantize import Quantizer

    model = load()
    yield
    for linear in decoder_linears(model).values():
        codes, meta = Quantizer.quantize(
            linear.weight.data, nbits=job["bits"], group_size=job["groupSize"], axis=1, optimize=True, round_zero=False, device="cpu"
        )
        linear.weight.data = Quantizer.dequantize(codes, meta).float()
    yield
    yield {name: m.weight.data for name, m in decoder_linears(model).items()}, 16  # float16 zero points


def gptqmodel():
    from gptqmodel import GPTQModel, QuantizeConfig

    # what it puts on disk meanwhile cannot be read back from its modules
    config = QuantizeConfig(bits=job["bits"], group_size=job["groupSize"], sym=job["symmetric"], offload_to_disk=False)
    model = GPTQModel.load(job["checkpoint"], config)
    yield
    windows = [{"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)} for ids in job["windows"]]
    model.quantize(windows, batch_size=1)
    yield
    with tempfile.TemporaryDirectory() as folder:  # zero points have another form in memory than kernels read
        model.save(folder)
        model = GPTQModel.load(folder, device="cpu", backend="torch")
    values = {}
    for name, module in model.model.named_modules():
        if ".layers." in name and hasattr(module, "dequantize_weight"):
            values[name] = module.dequantize_weight().T.float().contiguous()
    yield values, 0 if job["symmetric"] else job["bits"]


def autoround():
    from auto_round import AutoRound

    model = load()
    tokenizer = AutoTokenizer.from_pretrained(job["checkpoint"])
    yield
    windows = [{"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)} for ids in job["windows"]]
    rounder = AutoRound(
        model,
        tokenizer,
        bits=job["bits"],
        group_size=job["groupSize"],
        sym=job["symmetric"],
        iters=job.get("iterations", 200),
        batch_size=2,
        seqlen=len(job["windows"][0]),
        nsamples=len(windows),
        dataset=torch.utils.data.DataLoader(windows, batch_size=None),
        device_map="cpu",
    )
    model, _ = rounder.quantize()
    yield
    yield {name: m.weight.data.float() for name, m in decoder_linears(model).items()}, 0 if job["symmetric"] else job["bits"]


package = {"hqq": "hqq", "gptqmodel": "gptqmodel", "autoround": "auto-round"}[job["peer"]]
run = {"hqq": hqq, "gptqmodel": gptqmodel, "autoround": autoround}[job["peer"]]()
next(run)  # loads
cpu, wall = time.process_time(), time.time()
next(run)  # quantizes
cpu, wall = time.process_time() - cpu, time.time() - wall
values, zero_bits = next(run)

model = load()
expected = decoder_linears(model)
if values.keys() != expected.keys():
    sys.exit(f"{job['peer']} left out {sorted(expected.keys() - values.keys())[:3]} and others")
for name, linear in expected.items():
    linear.weight.data = values[name].to("cpu").contiguous()
model.save_pretrained(job["out"])
result = {
    "cpuSeconds": cpu,
    "wallSeconds": wall,
    "peakMB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    "bitsPerWeight": job["bits"] + (16 + zero_bits) / job["groupSize"],
    "version": importlib.metadata.version(package),
}
print(json.dumps(result), file=sys.__stdout__)
