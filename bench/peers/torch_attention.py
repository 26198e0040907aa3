#!/usr/bin/env python3
"""The verify table through PyTorch: dense scaled_dot_product_attention, each backend that takes the shape.

32 query heads, 8 kv heads, head_dim 128, bf16; times are CUDA graph replays over rotated caches, less an empty node,
as attend_bench_cuda takes them. Usage: torch_attention.py
"""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

CELLS = [(1, 8192), (1, 32768), (1, 131072), (8, 8192), (8, 32768), (16, 32768)]
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def replay_us(launch, nodes):
    """The median of ten replays of a graph of launch(0) … launch(nodes - 1), for each node."""
    launch(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(nodes):
            launch(i)
    times = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / nodes)
    return sorted(times[2:])[5]


def measure(batch, kv_len, slots, backend, empty_us):
    size = (batch, 8, kv_len + slots, 128)
    sets = min(24, max(2, int(1e9 / (4 * batch * 8 * kv_len * 128))))
    layers = [[torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(2)] for _ in range(sets)]
    q = torch.randn((batch, 32, slots, 128), device="cuda", dtype=torch.bfloat16)

    def launch(i):
        k, v = layers[i % sets]
        with sdpa_kernel(backend):
            torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return replay_us(launch, max(sets, 8)) - empty_us


def main():
    one = torch.zeros(1, device="cuda")
    empty_us = replay_us(lambda _: one.add_(1), 100)
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}; an empty node: {empty_us:.2f} us")
    print("| batch | kv_len | slots |", " | ".join(f"{name} us" for name in BACKENDS), "|")
    print("|---|---|---|" + "---|" * len(BACKENDS))
    for batch, kv_len in CELLS:
        for slots in (6, 1):
            times = []
            for backend in BACKENDS.values():
                try:
                    times.append(f"{measure(batch, kv_len, slots, backend, empty_us):.1f}")
                except RuntimeError:
                    times.append("-")
                torch.cuda.empty_cache()
            print("|", batch, "|", kv_len, "|", slots, "|", " | ".join(times), "|", flush=True)


if __name__ == "__main__":
    main()
