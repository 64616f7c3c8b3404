"""A real Llama folder that is as small as vLLM takes: random weights, a real tokeniser.

Its text means nothing, but it is deterministic, loads in a moment, and its distributions are sharp
enough that two runs agree token for token. For tests of everything around a real engine.
"""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

_LAYERS = 2
_HIDDEN_SIZE = 64
_INTERMEDIATE_SIZE = 128
_HEADS = 2
_KV_HEADS = 1
_HEAD_DIM = 32  # The smallest that vLLM's CPU attention takes.
_VOCABULARY_TOKENS = 49152  # SmolLM2's.
_CONTEXT_TOKENS = 2048
# Wide enough that the largest logit stands clear of the second.
_WEIGHT_DEVIATION = 0.3


def write_tiny_model(folder: Path, tokenizer_folder: Path, seed: int = 0) -> None:
    """Writes a two-layer Llama into `folder` (16 MB), with the tokeniser of `tokenizer_folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(tokenizer_folder / name, folder / name)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": _HIDDEN_SIZE,
        "intermediate_size": _INTERMEDIATE_SIZE,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "head_dim": _HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": _CONTEXT_TOKENS,
        "vocab_size": _VOCABULARY_TOKENS,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    generator = np.random.default_rng(seed)
    weights = {
        name: (generator.standard_normal(shape, dtype=np.float32) * np.float32(_WEIGHT_DEVIATION))
        if len(shape) > 1
        else np.ones(shape, dtype=np.float32)
        for name, shape in _shapes().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _shapes() -> dict[str, tuple[int, ...]]:
    layer = {
        "input_layernorm": (_HIDDEN_SIZE,),
        "self_attn.q_proj": (_HEADS * _HEAD_DIM, _HIDDEN_SIZE),
        "self_attn.k_proj": (_KV_HEADS * _HEAD_DIM, _HIDDEN_SIZE),
        "self_attn.v_proj": (_KV_HEADS * _HEAD_DIM, _HIDDEN_SIZE),
        "self_attn.o_proj": (_HIDDEN_SIZE, _HEADS * _HEAD_DIM),
        "post_attention_layernorm": (_HIDDEN_SIZE,),
        "mlp.gate_proj": (_INTERMEDIATE_SIZE, _HIDDEN_SIZE),
        "mlp.up_proj": (_INTERMEDIATE_SIZE, _HIDDEN_SIZE),
        "mlp.down_proj": (_HIDDEN_SIZE, _INTERMEDIATE_SIZE),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (_VOCABULARY_TOKENS, _HIDDEN_SIZE),
        "model.norm.weight": (_HIDDEN_SIZE,),
    }
    for i in range(_LAYERS):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes
