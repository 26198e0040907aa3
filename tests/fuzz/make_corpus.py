"""Writes the seeds in corpus/: small files of each kind, from the embedded models and tests/mini_llm/data.

    python make_corpus.py
"""

import json
import pathlib
import struct

here = pathlib.Path(__file__).resolve().parent
models = here / "../../examples/models"
data = here / "../mini_llm/data"


def write(target, name, content):
    folder = here / "corpus" / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def safetensors(tensors):
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(content)]}
        body += content
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + body


def shrunk(tokenizer, count):
    """Few tokens and merges, all that the rest refers to."""
    model = tokenizer["model"]
    merges = model["merges"][:count]
    keep = {"<unk>", "<s>", "</s>", "<0x0A>", "<0xC3>", "<0xA9>", *"Hewlord1\u0120\u2581<>"}
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        keep |= {left, right, left + right}
    model["merges"] = merges
    model["vocab"] = {t: i for t, i in model["vocab"].items() if t in keep}
    return json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":"))


def hostile():
    """Small files that ask for much memory or time: growing texts, costly patterns, long templates, many tokens."""
    vocab = {"u": 0, "a": 1, " ": 2, "_": 3}
    base = {"added_tokens": [{"id": 4, "content": "a|a", "normalized": True}, {"id": 5, "content": "a|"}],
            "decoder": {"type": "Fuse"}, "model": {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "u"}}

    def sequence(name, *steps):
        return {"type": "Sequence", name: steps}

    def replace(old, new):
        return {"type": "Replace", "pattern": {"String": old}, "content": new}

    def split(expression):
        return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}

    prepend = {"type": "Prepend", "prepend": "a" * 40}
    special = [{"SpecialToken": {"id": "u"}}] * 4 + [{"Sequence": {"id": "A"}}]
    return {
        "growth": {**base, "normalizer": sequence("normalizers", prepend, replace("a", "aaaa"), replace("aa", "a a"))},
        "decoder": {**base, "decoder": sequence("decoders", replace("_", "aa" * 9), replace("a", "____"))},
        "metaspace": {**base, "pre_tokenizer": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "first"},
                      "decoder": {"type": "Metaspace", "replacement": "_"}},
        "lookahead": {**base, "pre_tokenizer": split(".(?=.*z)")},
        "backtracking": {**base, "pre_tokenizer": sequence("pretokenizers", split("."), split("(?:a|a?)+$|b{1,3}"))},
        "template": {**base, "post_processor": {
            "type": "TemplateProcessing", "single": special, "special_tokens": {"u": {"ids": [0] * 9}}}},
    }


def gguf_text(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf(values, tensors=()):
    """Metadata from Python's types; tensors as (name, shape from the innermost, type, bytes)."""

    def value(v):
        if isinstance(v, bool):
            return 7, struct.pack("<B", v)
        if isinstance(v, int):
            return 4, struct.pack("<I", v)
        if isinstance(v, float):
            return 6, struct.pack("<f", v)
        if isinstance(v, str):
            return 8, gguf_text(v)
        elements = [(5, struct.pack("<i", e)) if isinstance(e, int) else value(e) for e in v]
        return 9, struct.pack("<IQ", elements[0][0], len(elements)) + b"".join(e for _, e in elements)

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))
    for key, v in values.items():
        kind, content = value(v)
        head += gguf_text(key) + struct.pack("<I", kind) + content
    data = b""
    for name, shape, kind, content in tensors:
        head += gguf_text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape) + struct.pack("<IQ", kind, len(data))
        data += content + bytes(-len(content) % 32)
    return head + bytes(-len(head) % 32) + data


def gguf_files():
    """A vocabulary of each kind, a model of 16-bit weights and one of blocks of the smaller kinds."""
    words = {"tokenizer.ggml.tokens": ["<unk>", "a", "b", "ab", "<0x0A>", "\u2581", "<s>", "c|"],
             "tokenizer.ggml.token_type": [2, 1, 1, 1, 6, 1, 3, 4], "tokenizer.ggml.bos_token_id": 6,
             "tokenizer.ggml.eos_token_id": 0, "tokenizer.chat_template": "{{ m }}"}
    byte_level = {**words, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.merges": ["a b"]}
    scored = {**words, "tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0, -1.0, -1.0, -2.0, 0.0, -3.0, 0.0, -4.0],
              "tokenizer.ggml.add_space_prefix": True}

    def model(hidden, types):
        shape = {"general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 64,
                 "llama.embedding_length": hidden, "llama.feed_forward_length": hidden, "llama.attention.head_count": 2,
                 "llama.attention.head_count_kv": 2, "llama.attention.layer_norm_rms_epsilon": 1e-5,
                 "llama.rope.freq_base": 1e4, "llama.rope.dimension_count": hidden // 2}
        sizes = {1: 2, 2: 18 / 32, 3: 20 / 32, 6: 22 / 32, 7: 24 / 32, 8: 34 / 32}
        names = ["blk.0." + n for n in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")]
        tensors = [("token_embd.weight", [hidden, 8], 1, bytes(range(16)) * hidden)]
        for i, name in enumerate(names):
            kind = types[i % len(types)]
            tensors.append((name + ".weight", [hidden, hidden], kind, bytes([1, 42]) * int(hidden * hidden * sizes[kind] / 2)))
        for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
            tensors.append((name + ".weight", [hidden], 0, struct.pack("<f", 1.0) * hidden))
        return shape, tensors

    small, halves = model(4, [1])
    large, blocks = model(32, [2, 3, 6, 7, 8])
    return {"byte_level": gguf(byte_level), "scored": gguf(scored), "halves": gguf({**small, **byte_level}, halves),
            "blocks": gguf({**large, **scored, "llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}, blocks)}


def main():
    two = struct.pack("<2f", 1.0, -2.0)
    write("safetensors", "types", safetensors({
        "a": ("F32", [2], two), "b": ("BF16", [2, 1], two[:4]), "c": ("F16", [], two[:2]), "d": ("I64", [3, 0], b"")}))
    write("safetensors", "empty", safetensors({}))
    write("safetensors", "index", json.dumps({
        "metadata": {"total_size": 8}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}))

    config = (models / "books-1m/config.json").read_text()
    write("config", "books", config)
    content = json.loads(config)
    content["rope_scaling"] = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                               "original_max_position_embeddings": 8192}
    write("config", "llama3", json.dumps(content) + '\0{"eos_token_id":[1,2],"bos_token_id":3}')
    content["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    content |= {"architectures": ["MistralForCausalLM"], "rope_scaling": None, "sliding_window": None, "head_dim": None}
    write("config", "mistral", json.dumps(content))

    names = {"add_bos_token": True, "bos_token": {"content": "<s>"}, "add_eos_token": False, "eos_token": "</s>"}
    text = "\0Hello <s>w\u00f6rld</s> it's 12  \n<mark> \U0001f600"
    for path in sorted(data.glob("*.json")):
        if path.name != "encodings.json" and not path.name.startswith("gguf_"):
            tokenizer = json.loads(path.read_text())
            has_marks = "<s>" in tokenizer["model"]["vocab"]
            write("tokenizer", path.stem, shrunk(tokenizer, 6) + "\0" + (json.dumps(names) if has_marks else "{}") + text)
    for name, tokenizer in hostile().items():
        content = json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":"))
        write("tokenizer", "hostile_" + name, content + "\0{}\0a a|a_" + "a" * 300 + "z a|")
    for name, content in gguf_files().items():
        write("gguf", name, content)


main()
