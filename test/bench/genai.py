"""onnxruntime-genai on a folder with genai_config.json, for `engine.ts`: one line of JSON in, one out, until the input ends.

    python3 genai.py FOLDER THREADS

in   {"ids": [...], "tokens": N}
out  {"prefillMs": ..., "tokenMs": ...}    first {"version": ...}
"""
import json, sys, time
import onnxruntime_genai as og

config = og.Config(sys.argv[1])
model = og.Model(config)
print(json.dumps({"version": og.__version__}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    ids, tokens = asked["ids"], asked["tokens"]
    params = og.GeneratorParams(model)
    length = len(ids) + tokens + 2
    params.set_search_options(do_sample=False, min_length=length, max_length=length)
    generator = og.Generator(model, params)
    start = time.perf_counter()
    generator.append_tokens(ids)
    generator.generate_next_token()
    first = time.perf_counter()
    for _ in range(tokens):
        generator.generate_next_token()
    end = time.perf_counter()
    print(json.dumps({"prefillMs": (first - start) * 1e3, "tokenMs": (end - first) * 1e3 / tokens}), flush=True)
    del generator
