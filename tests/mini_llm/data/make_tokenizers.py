"""Trains the small tokenizers of this folder and writes what Hugging Face's `tokenizers` makes of some texts.

    pip install tokenizers==0.23.3
    python make_tokenizers.py        # from anywhere; reads ../../golden/sampled.txt, writes *.json here

Each <name>.json is a tokenizer.json; encodings.json lists, for each, texts with their ids (without and with the
tokens around a text) and the text the ids decode to (without and with special tokens).
"""

import json
import pathlib

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

here = pathlib.Path(__file__).resolve().parent
corpus = (here / "../../golden/sampled.txt").read_text(encoding="utf-8")

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORD_MARK = "\u2581"

TEXTS = [
    "",
    " ",
    "   ",
    "Hello, world!",
    " leading, and  double  spaces ",
    "tabs\tand\nnewlines\n\n\r\n \n x\n",
    "It's we'll they'VE I'm you'd 'S 'tis o'clock ''ll",
    "na\u00efve caf\u00e9 \u2014 \u201cquoted\u201d \u2018single\u2019 \u2026",
    "e\u0301 a\u0308o\u0302 combining; Z\u0351\u036b\u0343\u036a\u0302",
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3002\u4e2d\u6587\uff0c\ud55c\uad6d\uc5b4",
    "\u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0627\u0644\u0639\u0631\u0628\u064a\u0629 "
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u05e2\u05d1\u05e8\u05d9\u05ea",
    "\U0001f600 \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea\U0001f3f3\ufe0f",
    "1234567890 3.14159 1,000,000 \u00bd \u2167 \u0663\u0664\u0665 x2y33z444a5555",
    "CamelCase snake_case kebab-case a+b==c; // comment\n\tif (x[0] != '\\n') { return; }",
    "nbsp\u00a0em\u2003ideographic\u3000zero\u200bwidth\u0085next line\u2028sep",
    "\u0000nul \u0001 \u007f control",
    "a" * 300,
    "the" * 200 + "rest",
    " " * 67 + "x" + "\n" * 13,
    "!" * 50 + "?" * 3 + "...",
    "\u017ft '\u017f long s, \u212aelvin, \u0130stanbul",
    WORD_MARK + "marked" + WORD_MARK + WORD_MARK + "text " + WORD_MARK,
    "<s>begin</s> and <unk> or <0x41><0x0A>",
    "a<s>b <s> c</s>",
    "<|begin_of_text|>user<|end_of_text|> x  <pad>  y <pad><pad>",
    "before <mark> after<mark>",
    "\ufffd\ufeff\U0010ffff\ue000",
    corpus[:1500],
    corpus[5000:6200].replace(" ", "  "),
]


def trained(pre_tokenizer, size, alphabet):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(
        [corpus], trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(tokenizer.to_str())["model"]
    texts = sorted(model["vocab"], key=model["vocab"].get)
    return texts, [tuple(m) for m in model["merges"]]


def llama2_parts():
    texts, merges = trained(pre_tokenizers.Metaspace(replacement=WORD_MARK, prepend_scheme="first"), 340, [])
    texts = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)] + texts
    vocab = {text: i for i, text in enumerate(texts)}
    return models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def with_begin(tokenizer, begin):
    template = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    return template


def add_llama2_marks(tokenizer, normalized):
    tokenizer.add_special_tokens([AddedToken(t, normalized=normalized, special=True) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.add_tokens([AddedToken("<mark>", normalized=True)])
    tokenizer.post_processor = with_begin(tokenizer, "<s>")


def llama2():
    tokenizer = Tokenizer(llama2_parts())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(WORD_MARK), normalizers.Replace(" ", WORD_MARK)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(WORD_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    add_llama2_marks(tokenizer, False)
    return tokenizer


def llama2_metaspace():
    """The newer files of the same family: no normaliser, a Metaspace step that does not split."""
    tokenizer = Tokenizer(llama2_parts())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=WORD_MARK, prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(WORD_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    add_llama2_marks(tokenizer, False)
    return tokenizer


def metaspace_split():
    """No byte fallback, so that unknown tokens occur; the begin and end tokens sought after normalising."""
    parts = json.loads(llama2().to_str())["model"]
    merges = [tuple(m) for m in parts["merges"]]
    vocab = {t: i for i, t in enumerate(t for t in parts["vocab"] if not t.startswith("<0x"))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=WORD_MARK, prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Metaspace(replacement=WORD_MARK, prepend_scheme="always")
    add_llama2_marks(tokenizer, True)
    return tokenizer


def byte_level(pre_tokenizer, begin, **options):
    texts, merges = trained(pre_tokenizer, 600, pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(texts)}, merges=merges, **options))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([begin, "<|end_of_text|>"])
    return tokenizer


def llama3():
    steps = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer = byte_level(steps, "<|begin_of_text|>", ignore_merges=True)
    tokenizer.add_special_tokens([AddedToken("<pad>", lstrip=True, rstrip=True, special=True)])
    tokenizer.add_tokens([AddedToken("<mark>", lstrip=True), AddedToken("<mark> a")])
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), with_begin(tokenizer, "<|begin_of_text|>")]
    )
    return tokenizer


def digits():
    steps = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return byte_level(steps, "<|begin_of_text|>")


def prefix_space():
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True), "<|begin_of_text|>")


def reference(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return {
        "text": text,
        "ids": ids,
        "ids_special": tokenizer.encode(text).ids,
        "decoded": tokenizer.decode(ids),
        "decoded_all": tokenizer.decode(ids, skip_special_tokens=False),
    }


def main():
    encodings = {}
    for make in (llama2, llama2_metaspace, metaspace_split, llama3, digits, prefix_space):
        text = make().to_str()
        if make is llama2:  # older files write a merge as one string
            content = json.loads(text)
            content["model"]["merges"] = [" ".join(m) for m in content["model"]["merges"]]
            text = json.dumps(content, ensure_ascii=False)
        (here / f"{make.__name__}.json").write_text(text + "\n", encoding="utf-8")
        tokenizer = Tokenizer.from_str(text)
        encodings[make.__name__] = [reference(tokenizer, t) for t in TEXTS]
    lines = [f"{json.dumps(k)}: [\n" + ",\n".join(json.dumps(c) for c in v) + "\n]" for k, v in encodings.items()]
    (here / "encodings.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


main()
