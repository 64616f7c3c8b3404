"""A Llama model in one GGUF file, written anew as a Hugging Face folder. Without torch.

GGUF keeps the same tensors under other names, with two differences that matter:

* llama.cpp rotates neighbouring pairs of a head's dimensions, Hugging Face rotates dimension i with
  i + half. The rows of the query and key projections are therefore stored interleaved, and are put
  back in order here.
* The tokeniser is stored as lists of tokens and merges plus the *name* of its pre-tokeniser, whose
  rules have to be known. Only `smollm` (single digits, then byte level) is.

Weights are written as float32, whatever they were quantised to: any dtype can be served from that.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

Weights = NDArray[np.float32]

_TOP_LEVEL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SPECIAL_TOKEN_KEYS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
# llama.cpp's token type for tokens that text is never split into.
_CONTROL_TOKEN = 3


class GgufModel:
    """An opened GGUF file. Raises ValueError for a model that this module cannot convert."""

    def __init__(self, path: Path) -> None:
        self._reader = GGUFReader(path)
        self._is_tied = all(tensor.name != "output.weight" for tensor in self._reader.tensors)
        for key, known in (("general.architecture", "llama"), ("tokenizer.ggml.pre", "smollm")):
            if self._value(key) != known:
                raise ValueError(f"{path.name}: {key} is {self._value(key)!r}, not {known!r}")

    def write_tokenizer(self, folder: Path) -> None:
        """Writes all that tokenising and templating need: the configs and tokenizer.json."""
        tokens = self._value("tokenizer.ggml.tokens")
        special_ids = {
            role: self._value(f"tokenizer.ggml.{key}_token_id")
            for role, key in _SPECIAL_TOKEN_KEYS.items()
        }
        context_tokens = self._value("llama.context_length")

        _write_json(folder / "config.json", self._config(special_ids))
        _write_json(
            folder / "generation_config.json",
            {f"{role}_token_id": special_ids[role] for role in ("bos", "eos", "pad")},
        )
        _write_json(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                **{f"{role}_token": tokens[token_id] for role, token_id in special_ids.items()},
                "add_bos_token": False,
                "clean_up_tokenization_spaces": False,
                "model_max_length": context_tokens,
                "chat_template": self._value("tokenizer.chat_template"),
            },
        )
        self._tokenizer(tokens).save(str(folder / "tokenizer.json"))

    def write_weights(self, folder: Path) -> None:
        """Writes model.safetensors, in float32."""
        weights = {
            _hugging_face_name(tensor.name): self._weights(tensor)
            for tensor in self._reader.tensors
        }
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    def _value(self, key: str) -> Any:
        field = self._reader.get_field(key)
        return None if field is None else field.contents()

    def _config(self, special_ids: dict[str, int]) -> dict[str, object]:
        heads = self._value("llama.attention.head_count")
        hidden_size = self._value("llama.embedding_length")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": hidden_size,
            "intermediate_size": self._value("llama.feed_forward_length"),
            "num_hidden_layers": self._value("llama.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._value("llama.attention.head_count_kv"),
            "head_dim": hidden_size // heads,
            "hidden_act": "silu",
            "rms_norm_eps": self._value("llama.attention.layer_norm_rms_epsilon"),
            "rope_theta": self._value("llama.rope.freq_base"),
            "max_position_embeddings": self._value("llama.context_length"),
            "vocab_size": len(self._value("tokenizer.ggml.tokens")),
            "bos_token_id": special_ids["bos"],
            "eos_token_id": special_ids["eos"],
            "pad_token_id": special_ids["pad"],
            "tie_word_embeddings": self._is_tied,
            "attention_bias": False,
            "mlp_bias": False,
            "torch_dtype": "float32",
        }

    def _tokenizer(self, tokens: list[str]) -> Tokenizer:
        merges = [tuple(merge.split(" ")) for merge in self._value("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(
            models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        types = self._value("tokenizer.ggml.token_type")
        tokenizer.add_special_tokens(
            [
                AddedToken(token, special=True, normalized=False)
                for token, kind in zip(tokens, types, strict=True)
                if kind == _CONTROL_TOKEN
            ]
        )
        return tokenizer

    def _weights(self, tensor: Any) -> Weights:
        weights: Weights = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if ".attn_q." in tensor.name:
            weights = halves_from_pairs(weights, self._value("llama.attention.head_count"))
        elif ".attn_k." in tensor.name:
            weights = halves_from_pairs(weights, self._value("llama.attention.head_count_kv"))
        return np.ascontiguousarray(weights)


def halves_from_pairs(projection: Weights, heads: int) -> Weights:
    """Undoes llama.cpp's order of a projection's rows, head by head.

    For a head of dimension 4, rows stored as 0 2 1 3 (pairs that rotate together lie side by side)
    come back as 0 1 2 3 (row i rotates with row i + 2).
    """
    rows, columns = projection.shape
    pairs = projection.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _hugging_face_name(gguf_name: str) -> str:
    match gguf_name.split("."):
        case [tensor, "weight"] if tensor in _TOP_LEVEL_NAMES:
            return f"{_TOP_LEVEL_NAMES[tensor]}.weight"
        case ["blk", layer, tensor, "weight"] if tensor in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[tensor]}.weight"
    raise ValueError(f"no Llama tensor is called {gguf_name!r}")


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
