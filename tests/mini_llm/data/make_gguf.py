"""Writes the golden files of the GGUF tests, by the package `gguf` and by numpy alone.

    pip install gguf==0.19.0 numpy sentencepiece==0.2.3
    python make_gguf.py              # from anywhere; writes gguf_*.gguf and gguf_*.safetensors here

gguf_blocks.safetensors: for each type of tensor random and extreme blocks (U8) and what gguf.quants.dequantize makes of
them (F32). gguf_types.gguf: a model of two layers with random weights, in which each type occurs;
gguf_types.safetensors: some tokens and the logits that float64 arithmetic gives for them, weights rounded to bf16. gguf_sentencepiece.json: a small
SentencePiece vocabulary as a GGUF file keeps it, and what the package `sentencepiece` makes of the texts of encodings.json.
"""

import io
import json
import pathlib

import gguf
import numpy as np
import sentencepiece
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize

here = pathlib.Path(__file__).resolve().parent
random = np.random.default_rng(20261201)

# Where the f16 numbers of a block are: scales, and what is added.
HALVES = {Type.Q4_0: [0], Type.Q4_1: [0, 2], Type.Q5_0: [0], Type.Q5_1: [0, 2], Type.Q8_0: [0], Type.Q4_K: [0, 2],
          Type.Q5_K: [0, 2], Type.Q6_K: [208]}
TYPES = [Type.F32, Type.F16, Type.BF16, *HALVES]
EXTREMES = [0.0, -0.0, 65504.0, -65504.0, 2.0**-24, -(2.0**-24), 1023 * 2.0**-24, 2.0**-14, -0.333]


def random_blocks(kind, count, scale):
    """Random bits with f16 numbers of about that size."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = random.integers(0, 256, (count, size), dtype=np.uint8)
    for at in HALVES[kind]:
        numbers = (random.standard_normal(count) * scale).astype(np.float16)
        blocks[:, at : at + 2] = numbers.view(np.uint8).reshape(count, 2)
    return blocks


def golden_blocks(kind):
    if kind not in HALVES:
        values = np.concatenate([random.standard_normal(23), EXTREMES]).astype(np.float32)
        if kind == Type.F32:
            return values.view(np.uint8).reshape(-1, 4)
        if kind == Type.F16:
            return values.astype(np.float16).view(np.uint8).reshape(-1, 2)
        return quantize(values, kind).view(np.uint8).reshape(-1, 2)
    blocks = random_blocks(kind, len(EXTREMES) + 5, 0.1)
    for i, number in enumerate(EXTREMES):
        for at in HALVES[kind]:
            other = number if at == HALVES[kind][0] else EXTREMES[-1 - i]
            blocks[i, at : at + 2] = np.array([other], dtype=np.float16).view(np.uint8)
    first = HALVES[kind][-1] + 2 if kind != Type.Q6_K else 0
    last = 208 if kind == Type.Q6_K else blocks.shape[1]
    blocks[-2, first:last] = 0
    blocks[-1, first:last] = 255
    return blocks


def write_safetensors(path, tensors):
    header, data = {}, b""
    for name, values in tensors.items():
        kind = {"uint8": "U8", "float32": "F32", "int32": "I32"}[str(values.dtype)]
        header[name] = {"dtype": kind, "shape": values.shape, "data_offsets": [len(data), len(data) + values.nbytes]}
        data += values.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


HIDDEN, FFN, VOCAB, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 256, 32, 64, 4, 2, 8, 2
THETA, EPSILON = 1000.0, 1e-5

# rows, columns and type of each layer's matrices
MATRICES = [
    {"attn_q": (32, 256, Type.Q8_0), "attn_k": (16, 256, Type.F32), "attn_v": (16, 256, Type.F16),
     "attn_output": (256, 32, Type.Q4_0), "ffn_gate": (32, 256, Type.Q4_K), "ffn_up": (32, 256, Type.Q5_K),
     "ffn_down": (256, 32, Type.Q4_1)},
    {"attn_q": (32, 256, Type.Q6_K), "attn_k": (16, 256, Type.BF16), "attn_v": (16, 256, Type.Q4_K),
     "attn_output": (256, 32, Type.Q5_0), "ffn_gate": (32, 256, Type.Q6_K), "ffn_up": (32, 256, Type.Q5_K),
     "ffn_down": (256, 32, Type.Q5_1)},
]


def bf16(values):
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32).astype(np.float64)


def stored(rows, columns, kind):
    """Random weights as the file has them, and their values."""
    if kind in (Type.Q4_K, Type.Q5_K, Type.Q6_K):  # gguf only reads these
        scale = {Type.Q4_K: 0.0004, Type.Q5_K: 0.0002, Type.Q6_K: 0.00004}[kind]
        data = random_blocks(kind, rows, scale)  # a block a row: 256 columns
    else:
        data = quantize((random.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32), kind)
    return data, bf16(dequantize(data, kind))


def write_model(path, divisors):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(THETA)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = ["<|end|>", "<|begin|>"] + [chr(ord("A") + i) for i in range(60)] + ["AB", "ABC"]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * 62)
    writer.add_token_merges(["A B", "AB C"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    weights = {}

    def add(name, data, values, kind):
        weights[name] = values
        writer.add_tensor(name + ".weight", data, raw_dtype=kind)

    def add_vector(name):
        values = (1 + 0.1 * random.standard_normal(HIDDEN)).astype(np.float32)
        add(name, values, bf16(values), Type.F32)

    add("token_embd", *stored(VOCAB, HIDDEN, Type.Q8_0), Type.Q8_0)
    add("output", *stored(VOCAB, HIDDEN, Type.Q6_K), Type.Q6_K)
    add_vector("output_norm")
    add("rope_freqs", divisors, divisors.astype(np.float64), Type.F32)
    for layer, matrices in enumerate(MATRICES):
        add_vector(f"blk.{layer}.attn_norm")
        add_vector(f"blk.{layer}.ffn_norm")
        for name, (rows, columns, kind) in matrices.items():
            add(f"blk.{layer}.{name}", *stored(rows, columns, kind), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def norm(x, gain):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * gain


def rotate(x, divisors):
    """Pairs that rotate together are neighbours, as in the file. x: [positions, heads, HEAD_DIM]"""
    frequencies = THETA ** (-2.0 * np.arange(HEAD_DIM // 2) / HEAD_DIM) / divisors
    angles = np.arange(len(x))[:, None, None] * frequencies
    a, b = x[..., 0::2], x[..., 1::2]
    turned = np.empty_like(x)
    turned[..., 0::2] = a * np.cos(angles) - b * np.sin(angles)
    turned[..., 1::2] = b * np.cos(angles) + a * np.sin(angles)
    return turned


def logits_of(weights, ids):
    x = weights["token_embd"][ids]
    count = len(ids)
    mask = np.triu(np.full((count, count), -np.inf), 1)
    for layer in range(LAYERS):
        w = {name: weights[f"blk.{layer}.{name}"] for name in ("attn_norm", "ffn_norm", *MATRICES[layer])}
        h = norm(x, w["attn_norm"])
        q = rotate((h @ w["attn_q"].T).reshape(count, HEADS, HEAD_DIM), weights["rope_freqs"])
        k = rotate((h @ w["attn_k"].T).reshape(count, KV_HEADS, HEAD_DIM), weights["rope_freqs"])
        v = (h @ w["attn_v"].T).reshape(count, KV_HEADS, HEAD_DIM)
        out = np.empty_like(q)
        for head in range(HEADS):
            own = head // (HEADS // KV_HEADS)
            scores = q[:, head] @ k[:, own].T / np.sqrt(HEAD_DIM) + mask
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = shares / shares.sum(-1, keepdims=True) @ v[:, own]
        x = x + out.reshape(count, -1) @ w["attn_output"].T
        h = norm(x, w["ffn_norm"])
        gate = h @ w["ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["ffn_up"].T)) @ w["ffn_down"].T
    return norm(x, weights["output_norm"]) @ weights["output"].T


def write_sentencepiece(path):
    corpus = (here / "../../golden/sampled.txt").read_text(encoding="utf-8")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus.splitlines()), model_writer=model, model_type="bpe", vocab_size=600,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True,
        split_digits=True, minloglevel=2)
    words = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(words.get_piece_size())

    def kind(i):
        return 2 if words.is_unknown(i) else 3 if words.is_control(i) else 6 if words.is_byte(i) else 1

    texts = {case["text"] for case in json.loads((here / "encodings.json").read_text())["llama2"]}
    texts = sorted(t for t in texts if t and not any(mark in t for mark in ("<s>", "</s>", "<unk>", "<mark>")))
    content = {
        "tokens": [words.id_to_piece(i) for i in ids], "scores": [words.get_score(i) for i in ids],
        "token_type": [kind(i) for i in ids],
        "encodings": [{"text": t, "ids": words.encode(t), "decoded": words.decode(words.encode(t))} for t in texts]}
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n")


def main():
    write_sentencepiece(here / "gguf_sentencepiece.json")
    blocks = {}
    for kind in TYPES:
        data = golden_blocks(kind)
        blocks[kind.name + ".blocks"] = data
        raw = data.view({Type.F32: np.float32, Type.F16: np.float16}.get(kind, np.uint8))
        blocks[kind.name + ".values"] = dequantize(raw, kind).astype(np.float32)
    write_safetensors(here / "gguf_blocks.safetensors", blocks)

    divisors = np.array([1.0, 1.0, 2.5, 8.0], dtype=np.float32)
    weights = write_model(here / "gguf_types.gguf", divisors)
    ids = np.array([1, 2, 63, 17, 40, 40, 5, 62, 33, 9], dtype=np.int32)
    logits = logits_of(weights, ids)
    write_safetensors(here / "gguf_types.safetensors", {"ids": ids, "logits": logits.astype(np.float32)})
    print("logits: deviation", logits.std(), "largest", abs(logits).max())


main()
