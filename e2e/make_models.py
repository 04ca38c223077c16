# Copyright 2026 The kvtap Authors
# SPDX-License-Identifier: Apache-2.0
"""Makes two models small enough to serve anywhere, without a download: make_models.py FOLDER.

FOLDER/llama has full attention alone; FOLDER/gemma3 is hybrid, with layers of a sliding window of 64 tokens. They are
configurations without weights, for --load-format dummy: what an engine caches does not depend on what a model knows.
"""

import json
import pathlib
import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]

COMMON = {
    "bos_token_id": SPECIAL.index("<s>"),
    "eos_token_id": SPECIAL.index("</s>"),
    "torch_dtype": "float32",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "tie_word_embeddings": False,
}

MODELS = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "num_hidden_layers": 2,
    },
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 64,
        "query_pre_attn_scalar": 32,
        "rope_local_base_freq": 10000.0,
    },
}

TEMPLATE = (
    "{% for m in messages %}"
    "<|{{ 'assistant' if m['role'] == 'assistant' else 'user' }}|>{{ m['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer():
    """Every byte is a token, so that any text goes in and any token comes out as text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i + len(SPECIAL) for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def main():
    for name, config in MODELS.items():
        folder = pathlib.Path(sys.argv[1]) / name
        folder.mkdir(parents=True, exist_ok=True)
        vocab = {token: i for i, token in enumerate(SPECIAL)}
        tokenizer = byte_tokenizer()
        whole = json.loads(tokenizer.to_str())
        whole["model"]["vocab"] = vocab | whole["model"]["vocab"]
        whole["added_tokens"] = [
            {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True}
            for token, i in vocab.items()
        ]
        files = {
            "tokenizer.json": whole,
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "unk_token": "<unk>",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "model_max_length": 8192,
                "chat_template": TEMPLATE,
            },
            "generation_config.json": {k: COMMON[k] for k in ("bos_token_id", "eos_token_id")},
            "config.json": COMMON | config | {"vocab_size": len(whole["model"]["vocab"])},
        }
        for file, content in files.items():
            (folder / file).write_text(json.dumps(content, indent=1))


main()
