#!/usr/bin/env python3
"""A decode step (one slot) and a verify pass (five) of Llama-3.1-8B through PyTorch and Transformers, dense.

    torch_decode.py [--time-limit SECONDS] [--smoke]

LlamaForCausalLM as it is: random bf16 weights made on the device, a static cache filled with random numbers, SDPA.
Timed as replays of a CUDA graph, so that the host has no part. (Compiled with mode "reduce-overhead" its logits moved by
5.6 % of their norm, more than rounding should, and were not timed.) With a static cache Transformers passes SDPA a mask,
for which it first writes each key and value head out four times: that is the library's doing and part of the time. Cells
that the time limit leaves out are marked -. --smoke: a tiny model on whatever device there is, nothing timed.
"""

import argparse
import time

import torch
import transformers

CELLS = [(1, 8192), (8, 32768), (1, 32768), (8, 8192)]
SLOTS = (1, 5)
ROOM = 256  # slots a cache takes before it is set back
TURNS = 7
STEPS = 5  # calls between two events


def make_model(smoke):
    sizes = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, vocab_size=128256)
    heads = dict(num_attention_heads=32, num_key_value_heads=8)
    if smoke:
        sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=512)
        heads = dict(num_attention_heads=4, num_key_value_heads=2)
    config = transformers.LlamaConfig(
        **sizes, **heads, max_position_embeddings=131072, attn_implementation="sdpa", tie_word_embeddings=False
    )
    torch.set_default_dtype(torch.bfloat16)
    return transformers.LlamaForCausalLM(config).eval()


class Pass:
    """A model, a cache with `kv_len` positions of `batch` sequences, and the next tokens."""

    def __init__(self, model, batch, kv_len, slots):
        config = model.config
        self.model, self.kv_len = model, kv_len
        self.tokens = torch.randint(config.vocab_size, (batch, slots))
        self.cache = transformers.StaticCache(config=config, max_cache_len=kv_len + ROOM)
        head_dim = config.hidden_size // config.num_attention_heads
        self.cache.early_initialization(
            batch, config.num_key_value_heads, head_dim, torch.bfloat16, torch.get_default_device()
        )
        for layer in self.cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
        self.weight_bytes = 2 * sum(p.numel() for p in model.parameters()) - 2 * model.model.embed_tokens.weight.numel()
        self.cache_bytes = sum(2 * 2 * layer.keys[:, :, :kv_len].numel() for layer in self.cache.layers)

    def rewind(self):
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.kv_len)

    def run(self, forward):
        return forward(input_ids=self.tokens, past_key_values=self.cache, use_cache=True).logits


def timed_ms(work, launch):
    """The median over turns of the time of one of STEPS launches; every turn begins at kv_len."""
    times = []
    for _ in range(TURNS + 2):
        work.rewind()
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(STEPS):
            launch()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / STEPS)
    return sorted(times[2:])[TURNS // 2]


def graph_ms(work):
    work.rewind()
    work.run(work.model)
    torch.cuda.synchronize()
    work.rewind()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work.run(work.model)
    return timed_ms(work, graph.replay)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--time-limit", type=float, default=600.0)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    start = time.monotonic()
    torch.manual_seed(5)
    torch.set_default_device("cpu" if arguments.smoke else "cuda")
    with torch.no_grad():
        model = make_model(arguments.smoke)
        if arguments.smoke:
            work = Pass(model, 2, 40, 5)
            work.rewind()
            print("logits", list(work.run(model).shape))
            return
        print(
            f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, Transformers {transformers.__version__}, "
            f"Llama-3.1-8B made in {time.monotonic() - start:.0f} s"
        )
        print("| batch | kv_len | slots | ms | GB of weights and cache | GB/s |\n|---|---|---|---|---|---|")
        for batch, kv_len in CELLS:
            for slots in SLOTS:
                row = f"| {batch} | {kv_len} | {slots} |"
                if time.monotonic() - start > arguments.time_limit:
                    print(row, "- | - | - |")
                    continue
                work = Pass(model, batch, kv_len, slots)
                ms = graph_ms(work)
                gigabytes = 1e-9 * (work.weight_bytes + work.cache_bytes)
                print(row, f"{ms:.3f} | {gigabytes:.1f} | {1e3 * gigabytes / ms:.0f} |", flush=True)
                del work
                torch.cuda.empty_cache()
        print(f"in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
