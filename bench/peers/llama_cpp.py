"""Autoregressive speed of llama.cpp on the CPU, on the same weights: the outside peer of the generator's own bench.

Install (Python 3.9 or later and a C++ compiler; the first package compiles llama.cpp for this machine, some minutes):

    python3 -m venv ~/peer && ~/peer/bin/pip install gguf
    CMAKE_ARGS="-DGGML_NATIVE=ON" ~/peer/bin/pip install --no-binary llama-cpp-python llama-cpp-python

Run, from the repository's root:

    ~/peer/bin/python bench/peers/llama_cpp.py examples/models/books-7m --golden tests/golden/books-7m.safetensors \\
        --weights bf16 f16 f32 --kv f16 f32 --fa on off -t 2 --depth 0 3840 -n 128 --reps 7 --json peer.json

What it does, for each combination of weights type, cache type, flash attention and threads:

1. converts the Hugging Face Llama directory to GGUF with the gguf package (into the folder --gguf);
2. with --golden, feeds the golden token ids and compares llama.cpp's logits and its greedy continuation with the golden
   ones. Logits may differ by 0.25 at most, and a continuation may leave the golden one only at a near tie (a golden
   margin under twice the largest logit difference seen); anything else is not timed and makes the exit status 1;
3. prefills `depth` tokens (timed, --reps times), then decodes n tokens greedily, one at a time, rolls the cache back to
   `depth` and repeats. The decode rate counts only the time inside llama_decode and llama_synchronize; what Python
   adds around them (argmax, loop) is printed as `py us`. `others` is how many cores other processes kept busy
   meanwhile: distrust a figure when it is far above 0.

On a CPU llama.cpp rounds the activations to the weights' type before each product with bf16 or f16 weights; with f32 it
does not. bf16 weights are exact in bf16 and f32, and lose bits in f16 only when very small.
"""

import argparse
import ctypes
import importlib.metadata
import itertools
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time


def fail(message):
    sys.exit(f"llama_cpp.py: {message}")


try:
    import gguf
    import numpy as np
    # This file has the name of the package it imports: keep its own folder out of the search.
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or ".") != os.path.dirname(os.path.abspath(__file__))]
    import llama_cpp.llama_cpp as ll
except ImportError as error:
    fail(f"{error}. Install the two packages as the top of this file says.")

TYPES = {"f32": 0, "f16": 1, "bf16": 30}  # ggml's numbers
PERMUTED = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
       "lm_head.weight": "output.weight"}
FIELDS = {
    "context_length": "max_position_embeddings", "embedding_length": "hidden_size", "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size", "head_count": "num_attention_heads", "vocab_size": "vocab_size",
    "head_count_kv": "num_key_value_heads", "layer_norm_rms_eps": "rms_norm_eps", "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id", "rope_freq_base": "rope_theta", "rope_dimension_count": "head_dim",
    "key_length": "head_dim", "value_length": "head_dim"}
COLUMNS = [("{:.0f}", "prefill_tokens_per_second"), ("{:.1f}", "tokens_per_second"), ("{:.3f}", "ms_per_token"),
           ("{:.0f}–{:.0f}", "tokens_per_second_range"), ("{:.0f}", "python_us_per_token"), ("{:.2f}", "other_cores_busy")]


def read_safetensors(path):
    """Every tensor of a file as numpy; bf16 is widened to float32, exactly."""
    raw = pathlib.Path(path).read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    tensors = {}
    for name, entry in json.loads(raw[8:start]).items():
        if name == "__metadata__":
            continue
        kind = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "I32": "<i4", "I64": "<i8"}[entry["dtype"]]
        first, last = entry["data_offsets"]
        data = np.frombuffer(raw[start + first:start + last], kind)
        wide = (data.astype(np.uint32) << 16).view(np.float32) if entry["dtype"] == "BF16" else data
        tensors[name] = wide.reshape(entry["shape"])
    return tensors


def convert(source, weights, folder):
    """Writes the directory `source` as GGUF with the given weights type; returns the file."""
    config = json.loads((source / "config.json").read_text())
    shards = sorted(source.glob("*.safetensors"))
    if config.get("model_type") != "llama" or config.get("rope_scaling") or not shards:
        fail(f"{source}: only a Llama with plain rope, in .safetensors files, is converted")
    folder.mkdir(parents=True, exist_ok=True)
    path, partial = folder / f"{source.name}-{weights}.gguf", folder / f"{source.name}-{weights}.{os.getpid()}"
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    out = gguf.GGUFWriter(str(partial), "llama")
    out.add_name(source.name)
    for field, key in FIELDS.items():
        getattr(out, "add_" + field)(config[key])
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    special = {t["id"]: t["content"] for t in tokenizer["added_tokens"]}
    words = {i: w for w, i in tokenizer["model"]["vocab"].items()} | special
    ids = range(config["vocab_size"])
    out.add_tokenizer_model("gpt2")  # byte-level BPE
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list([words.get(i, f"[unused{i}]") for i in ids])
    out.add_token_types([gguf.TokenType.CONTROL if i in special else
                         gguf.TokenType.NORMAL if i in words else gguf.TokenType.UNUSED for i in ids])
    out.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    kind = gguf.GGMLQuantizationType[weights.upper()]
    for shard in shards:
        for name, value in read_safetensors(shard).items():
            if name == "lm_head.weight" and config.get("tie_word_embeddings"):
                continue  # llama.cpp uses the embedding when there is no output.weight
            value = value.astype(np.float32)
            for part, count in PERMUTED.items():  # llama.cpp rotates neighbours, Hugging Face halves
                if part in name:
                    value = value.reshape(config[count], 2, config["head_dim"] // 2, -1).swapaxes(1, 2).reshape(value.shape)
            parts = name.removesuffix(".weight").split(".", 3)  # model.layers.<layer>.<rest>
            name = TOP.get(name) or f"blk.{parts[2]}.{NAMES[parts[3]]}.weight"
            stored = kind if value.ndim > 1 else gguf.GGMLQuantizationType.F32  # norms: float32 always
            out.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(value), stored), raw_dtype=stored)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    os.replace(partial, path)
    return path


class Session:
    """One llama.cpp context over a loaded model, through the C interface."""

    def __init__(self, model, n_ctx, kv, flash, threads):
        params = ll.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = TYPES[kv]
        params.flash_attn_type = ll.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else ll.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = ll.llama_init_from_model(model, params)
        if not self.context:
            fail(f"llama.cpp made no context for cache type {kv}, flash attention {flash}")
        self.memory = ll.llama_get_memory(self.context)
        self.n_batch = ll.llama_n_batch(self.context)
        self.vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))
        self.token = (ll.llama_token * 1)()
        self.single = ll.llama_batch(n_tokens=1, token=self.token)  # position and sequence: llama.cpp's own count

    def logits(self, row=-1):
        address = ctypes.addressof(ll.llama_get_logits_ith(self.context, row).contents)
        return np.frombuffer((ctypes.c_float * self.vocab).from_address(address), np.float32)

    def decode(self, batch):
        """Evaluates a batch; returns the seconds that llama.cpp took."""
        start = time.perf_counter()
        if status := ll.llama_decode(self.context, batch):
            fail(f"llama_decode returned {status} on a batch of {batch.n_tokens}")
        ll.llama_synchronize(self.context)
        return time.perf_counter() - start

    def step(self, token):
        self.token[0] = token
        return self.decode(self.single)

    def prefill(self, ids, rows=()):
        """Empties the cache and evaluates `ids`; returns the seconds, and the logits of `rows` (or of the last)."""
        ll.llama_memory_clear(self.memory, False)
        wanted = set(rows) or {len(ids) - 1}
        found, seconds = {}, 0.0
        for first in range(0, len(ids), self.n_batch):
            part = [int(t) for t in ids[first:first + self.n_batch]]
            flags = (ctypes.c_int8 * len(part))(*[first + i in wanted for i in range(len(part))])
            tokens = (ll.llama_token * len(part))(*part)
            seconds += self.decode(ll.llama_batch(n_tokens=len(part), token=tokens, logits=flags))
            found.update({first + i: self.logits(i).copy() for i in range(len(part)) if flags[i]})
        return seconds, [found[r] for r in (rows or sorted(wanted))]


def validate(model, golden, kv, flash, threads):
    """Logits and greedy continuation against the golden file."""
    need = max(len(golden["input_ids"]), len(golden["prompt_ids"]) + len(golden["greedy_ids"]))
    session = Session(model, need, kv, flash, threads)
    rows = [int(r) for r in golden["logit_rows"]]
    difference = float(np.abs(np.array(session.prefill(golden["input_ids"], rows)[1]) - golden["logits"]).max())
    token = int(session.prefill(golden["prompt_ids"])[1][0].argmax())
    result = {"max_logit_difference": difference, "first_difference": None, "golden_margin": None, "ok": difference < 0.25}
    words = f"logits ±{difference:.1e}, greedy same"
    for i, expected in enumerate(int(t) for t in golden["greedy_ids"]):
        if token != expected:
            margin = float(golden["greedy_margin"][i])
            result.update(first_difference=i, golden_margin=margin, ok=margin < 2 * difference < 0.5)
            words = f"logits ±{difference:.1e}, greedy leaves at {i}, margin {margin:.3f}"
            break
        session.step(token)
        token = int(session.logits().argmax())
    ll.llama_free(session.context)
    return {**result, "words": words}


def busy():
    """Seconds of CPU spent by all other processes so far; None without /proc/stat."""
    stat, own = pathlib.Path("/proc/stat"), os.times()
    if not stat.exists():
        return None
    fields = [int(x) for x in stat.read_text().split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def measure(model, ids, depth, n, reps, kv, flash, threads):
    session = Session(model, depth + n, kv, flash, threads)
    session.prefill(ids[:max(depth, 1)])  # warm-up
    prefills = [session.prefill(ids[:depth])[0] for _ in range(reps if depth else 0)]
    totals, walls = [], []
    started, before = time.perf_counter(), busy()
    for _ in range(reps):
        ll.llama_memory_seq_rm(session.memory, 0, depth, -1)
        token, seconds = int(ids[depth]), 0.0
        wall = time.perf_counter()
        for _ in range(n):
            seconds += session.step(token)
            token = int(session.logits().argmax())
        walls.append(time.perf_counter() - wall)
        totals.append(seconds)
    median = statistics.median(totals)
    result = {
        "prefill_tokens_per_second": depth / statistics.median(prefills) if prefills else None,
        "tokens_per_second": n / median,
        "tokens_per_second_range": [n / max(totals), n / min(totals)], "ms_per_token": 1e3 * median / n,
        "python_us_per_token": 1e6 * (sum(walls) - sum(totals)) / (n * reps),
        "other_cores_busy": None if before is None else max(0.0, (busy() - before) / (time.perf_counter() - started)),
    }
    ll.llama_free(session.context)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", type=pathlib.Path, help="Hugging Face Llama directory")
    add("--golden", help="golden .safetensors file of that model; validates before timing")
    add("--gguf", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir()) / "specattn-peer",
        help="folder for the converted files (default %(default)s)")
    add("--weights", nargs="+", choices=TYPES, default=["bf16"], help="weights types (default bf16)")
    add("--kv", nargs="+", choices=TYPES, default=["f16"], help="cache types (default f16)")
    add("--fa", nargs="+", choices=["on", "off"], default=["on", "off"], help="flash attention (default both)")
    add("-t", "--threads", nargs="+", type=int, default=[os.cpu_count() or 1], help="default: all cores")
    add("-d", "--depth", nargs="+", type=int, default=[0, 3840], help="tokens in the cache (default 0 3840)")
    add("-n", type=int, default=128, help="tokens decoded a repetition (default 128)")
    add("--reps", type=int, default=5, help="repetitions; the median is reported (default 5)")
    add("--json", help="also write everything to this file")
    args = parser.parse_args()
    if min(args.n, args.reps, *args.threads) < 1 or min(args.depth) < 0:
        fail("-n, --reps and -t must be at least 1, --depth at least 0")
    if not (args.model / "config.json").is_file():
        fail(f"{args.model} has no config.json: give a Hugging Face model directory")

    errors_only = ll.llama_log_callback(lambda level, text, _: level == 4 and print(text.decode(), file=sys.stderr))
    ll.llama_log_set(errors_only, ctypes.c_void_p(0))
    ll.llama_backend_init()
    golden = read_safetensors(args.golden) if args.golden else None
    vocab = json.loads((args.model / "config.json").read_text())["vocab_size"]
    ids = golden["long_ids"] if golden else np.random.default_rng(1).integers(0, vocab, 4096)
    ids = np.resize(ids, max(args.depth) + 1)
    report = {"package": f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}", "model": args.model.name,
              "system_info": ll.llama_print_system_info().decode(), "n": args.n, "reps": args.reps, "runs": []}
    print(f"{report['package']} · {report['model']} · decode of {args.n} tokens, median of {args.reps}\n"
          f"{report['system_info']}\n\n| weights | kv | fa | t | depth | prefill tok/s | decode tok/s | ms/token | "
          "worst–best tok/s | py us | others | golden |\n|---|---|---|--:|--:|--:|--:|--:|---|--:|--:|---|", flush=True)
    status = 0
    for weights in args.weights:
        path = convert(args.model, weights, args.gguf)
        model = ll.llama_model_load_from_file(str(path).encode(), ll.llama_model_default_params())
        if not model:
            fail(f"llama.cpp did not load {path}")
        for kv, fa, threads in itertools.product(args.kv, args.fa, args.threads):
            flash = fa == "on"
            check = validate(model, golden, kv, flash, threads) if golden else None
            words = check["words"] if check else "not checked"
            run = {"weights": weights, "kv": kv, "flash_attention": flash, "threads": threads, "golden": check}
            head = f"| {weights} | {kv} | {fa} | {threads} |"
            if check and not check["ok"]:
                status = 1
                report["runs"].append(run)
                print(f"{head} WRONG, not timed: {words} |", flush=True)
                continue
            for depth in args.depth:
                m = measure(model, ids, depth, args.n, args.reps, kv, flash, threads)
                report["runs"].append({**run, "depth": depth, **m})
                cells = ["-" if m[key] is None else pattern.format(*np.atleast_1d(m[key])) for pattern, key in COLUMNS]
                print(head, " | ".join([str(depth), *cells, words]), "|", flush=True)
        ll.llama_model_free(model)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
