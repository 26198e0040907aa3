"""Top-p by sorting, in PyTorch, on the rows of select_bench.cu: the same generator, seed and order of cells.

    python3 bench/peers/torch_top_p.py [--real FILE] [--smoke]

Needs PyTorch with CUDA, nothing else. For each cell the weights are sorted descending, summed up, cut where the sum
reaches 0.95 of the row's, and the kept positions are marked in a mask of the row's shape, which is what PyTorch users
write. The mask is compared with one found in double precision before anything is timed: it must keep the heaviest, and
hold the mass to 1e-4. Times are replays of a CUDA graph (cold: inputs rotate through more than the L2 holds), less an
empty graph's node; a cell that cannot be captured is timed between two events and marked †.
"""

import argparse
import statistics
import struct
import sys

try:
    import torch
except ImportError:
    sys.exit("torch_top_p.py: needs PyTorch with CUDA")

TOP_P = 0.95
TABLE = [
    (8, 2048),
    (8, 8192),
    (8, 32768),
    (8, 131072),
    (64, 32768),
    (256, 2048),
    (256, 8192),
    (256, 32768),
    (256, 131072),
    (1024, 32768),
    (1024, 131072),
]
KINDS = ["softmax", "uniform", "one-hot", "all equal", "heavy ties"]
SEED = 77


def signed(value):
    """The int64 with the bits of a uint64."""
    return value - (1 << 64) if value >= 1 << 63 else value


def shifted(x, bits):
    """A logical right shift; int64 has only the arithmetic one."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def unscaled(kind, first, count, length, seed):
    """select_rows.cuh's unscaled_weight for `count` weights from index `first` on."""
    i = torch.arange(first, first + count, device="cuda", dtype=torch.int64)
    position = i % length
    if kind == "one-hot":
        return (position == length // 3).float()
    if kind == "all equal":
        return torch.ones(count, device="cuda")
    x = (i + 1) * signed(0x9E3779B97F4A7C15) + seed
    x = (x ^ shifted(x, 30)) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ shifted(x, 27)) * signed(0x94D049BB133111EB)
    x = x ^ shifted(x, 31)
    u = (shifted(x, 40).float() + 0.5) * 2.0**-24
    if kind == "uniform":
        return u
    if kind == "heavy ties":
        return torch.exp2(-(x & 7).float())
    v = (x & 0xFFFFFF).float() * 2.0**-24
    logit = 2.5 * torch.sqrt(-2.0 * torch.log(u)) * torch.cos(6.2831853 * v)
    logit += 6.0 * (position < 4) + 2.0 * (position >= length - 64)
    return torch.exp(logit)


def made_rows(kind, rows, length, seed):
    out = torch.empty(rows, length, device="cuda")
    step = max(1, (1 << 24) // length)
    for r in range(0, rows, step):
        part = out[r : r + step]
        part.copy_(unscaled(kind, r * length, part.numel(), length, seed).view_as(part))
        part.copy_(part.double() / part.double().sum(1, keepdim=True))
    return out


def file_rows(path, rows):
    with open(path, "rb") as file:
        count, length = struct.unpack("<qq", file.read(16))
        data = torch.frombuffer(bytearray(file.read()), dtype=torch.float32).view(count, length)
    return data[torch.arange(rows) * 97 % count].cuda()


def top_p_mask(weights):
    ordered, order = torch.sort(weights, dim=-1, descending=True)
    kept = torch.cumsum(ordered, dim=-1) - ordered < TOP_P
    return torch.zeros_like(kept).scatter_(-1, order, kept)


def check(weights, mask, what):
    """Of the first eight rows; returns the share kept, of all rows."""
    row, kept = weights[:8].double(), mask[:8]
    least = row.masked_fill(~kept, float("inf")).amin(1)
    left = row.masked_fill(kept, 0.0).amax(1)
    mass = (row * kept).sum(1)
    lightest = (row * (kept & (row == least[:, None]))).amax(1)
    if (least < left).any() or (mass < TOP_P - 1e-4).any() or (mass - lightest > TOP_P + 1e-4).any():
        sys.exit(f"torch_top_p.py: {what}: not a selection of that mass")
    return mask.sum().item() / mask.numel()


def median_us(enqueue, parts):
    times = []
    for turn in range(12):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        enqueue()
        end.record()
        end.synchronize()
        if turn >= 2:
            times.append(1e3 * begin.elapsed_time(end) / parts)
    return statistics.median(times)


def graph_us(call, inputs, calls):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(inputs[i % len(inputs)])
    return median_us(graph.replay, calls)


def timed(inputs, calls, empty_us):
    try:
        return f"{graph_us(top_p_mask, inputs, calls) - empty_us:.1f}"
    except RuntimeError:
        torch.cuda.synchronize()
        return f"{median_us(lambda: [top_p_mask(inputs[i % len(inputs)]) for i in range(calls)], calls):.1f}†"


def measure(kind, rows, length, empty_us, options):
    def make(i):
        return file_rows(options.real, rows) if kind == "real" else made_rows(kind, rows, length, SEED + i)

    inputs = [make(0)]
    length = inputs[0].shape[1]
    sets = 1 if options.smoke else min(640, 2 + 160_000_000 // (4 * rows * length))
    inputs += [make(i) for i in range(1, sets)]
    kept = check(inputs[0], top_p_mask(inputs[0]), f"{rows} x {length}, {kind}")
    if not options.smoke:
        cold, warm = timed(inputs, max(sets, 4), empty_us), timed(inputs[:1], 4, empty_us)
        print(f"| {kind} | {rows} | {length} | {100 * kept:.1f} | {cold} | {warm} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description="Top-p by sorting in PyTorch, timed on select_bench's rows.")
    parser.add_argument("--real", help="rows of a file, see README.md beside this script")
    parser.add_argument("--smoke", action="store_true", help="one size, correctness only")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("SKIPPED: no CUDA device", file=sys.stderr)
        sys.exit(77)
    one = torch.zeros(1, device="cuda")
    empty_us = graph_us(lambda x: x.zero_(), [one], 100)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}; less an empty node of {empty_us:.2f} us\n")
    print("| weights | rows | length | kept % | torch sort, cold us | torch sort, warm us |\n|---|---|---|---|---|---|")
    for rows, length in TABLE[1:2] if options.smoke else TABLE:
        measure("softmax", rows, length, empty_us, options)
    for rows, length in [(8, 8192)] if options.smoke else [(8, 32768), (256, 32768)]:
        for kind in KINDS:
            measure(kind, rows, length, empty_us, options)
        if options.real:
            measure("real", rows, 0, empty_us, options)


if __name__ == "__main__":
    main()
