"""Makes a tiny model with random weights of each family and writes what Hugging Face Transformers computes with it.

    pip install torch==2.15.0 transformers==5.24.0
    python make_models.py            # from anywhere; writes families/ beside this file

families/<weights>/ holds a model's weights in bf16 as save_pretrained() writes them (qwen2 in shards with an index).
families/cases.json lists cases: the name, whose weights, and a config.json as published models spell it; several cases
share weights and differ in their rope scaling. families/golden.safetensors holds `ids` and each case's logits
[tokens, vocab], computed from the same rounded weights with float64 products and eager attention (Transformers
computes norms, angles and softmax in float32).
"""

import json
import pathlib
import shutil

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

here = pathlib.Path(__file__).resolve().parent / "families"
TOKENS = 40
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDE_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # 4 * 16 is not hidden_size

LLAMA = {**SHAPE, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False}
MISTRAL = {**SHAPE, **WIDE_HEADS, "architectures": ["MistralForCausalLM"], "model_type": "mistral"}
QWEN2 = {
    **SHAPE,
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "tie_word_embeddings": True,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "sliding_window": 32,
    "max_window_layers": 2,
    "use_mrope": False,
}
QWEN3 = {
    **SHAPE,
    **WIDE_HEADS,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "sliding_window": None,
    "use_sliding_window": False,
}

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

CASES = {  # name: (weights, config.json)
    "llama": ("llama", LLAMA),
    "llama, linear": ("llama", {**LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}}),
    "llama, llama3": ("llama", {**LLAMA, "rope_theta": 500.0, "rope_scaling": LLAMA3}),
    "llama, yarn": ("llama", {**LLAMA, "rope_scaling": YARN}),
    "llama, yarn with everything stated": (
        "llama",
        {
            **LLAMA,
            "rope_parameters": {
                **YARN,
                "rope_theta": 300.0,
                "beta_fast": 3.0,
                "beta_slow": 0.2,
                "truncate": False,
                "attention_factor": 0.8,
            },
        },
    ),
    "llama, yarn with mscale": ("llama", {**LLAMA, "rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 2.0}}),
    "mistral": ("mistral", {**MISTRAL, "sliding_window": None}),
    "mistral, a window as long as the context": ("mistral", {**MISTRAL, "sliding_window": 64}),
    "qwen2": ("qwen2", QWEN2),
    "qwen2, yarn beside a shorter context": (
        "qwen2",
        {
            **QWEN2,
            "max_position_embeddings": 16,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        },
    ),
    "qwen3": ("qwen3", QWEN3),
}
CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def transformers_config(config):
    """Transformers' object for a config.json; what it does not know as a constructor's argument is left out."""
    known = {k: v for k, v in config.items() if k not in ("architectures", "model_type", "use_mrope")}
    # The older spelling keeps kind and base apart; the kind was once "type".
    scaling = dict(known.pop("rope_scaling", None) or {"rope_type": "default"})
    scaling["rope_type"] = scaling.pop("type", scaling.get("rope_type"))
    theta = known.pop("rope_theta", 10000.0)
    known.setdefault("rope_parameters", {"rope_theta": theta, **scaling})
    return CONFIGS[config["model_type"]](**known, attn_implementation="eager")


def make_weights(name, config):
    """Random weights, large enough that attention is far from uniform, rounded to bf16 and written."""
    model = AutoModelForCausalLM.from_config(transformers_config(config), dtype=torch.float32)
    for parameter_name, parameter in model.named_parameters():
        spread = torch.randn(parameter.shape)
        if parameter_name.endswith("norm.weight"):
            parameter.data = 1.0 + 0.2 * spread
        elif parameter_name.endswith("bias"):
            parameter.data = 0.5 * spread
        else:
            parameter.data = spread * 1.5 / parameter.shape[-1] ** 0.5
    model = model.to(torch.bfloat16)
    model.tie_weights()
    target = here / name
    shutil.rmtree(target, ignore_errors=True)
    model.save_pretrained(target, max_shard_size="20KB" if name == "qwen2" else "1GB")


def golden_logits(weights, config, ids):
    model = AutoModelForCausalLM.from_pretrained(here / weights, config=transformers_config(config), dtype=torch.float64)
    with torch.no_grad():
        return model.eval()(ids).logits[0].to(torch.float32).contiguous()


def main():
    torch.manual_seed(7)
    here.mkdir(exist_ok=True)
    ids = torch.randint(0, SHAPE["vocab_size"], (1, TOKENS))
    golden = {"ids": ids[0].to(torch.int32).contiguous()}
    made = set()
    for name, (weights, config) in CASES.items():
        if weights not in made:
            make_weights(weights, config)
            made.add(weights)
        golden[name] = golden_logits(weights, config, ids)
    save_file(golden, here / "golden.safetensors")
    for pattern in ("*/config.json", "*/generation_config.json"):  # cases.json says what they would
        for file in here.glob(pattern):
            file.unlink()
    cases = [{"name": name, "weights": weights, "config": config} for name, (weights, config) in CASES.items()]
    (here / "cases.json").write_text(json.dumps(cases, indent=1) + "\n")


main()
