"""The conversion from GGUF, the cache around it, and the model for tests."""

import json
from pathlib import Path
from queue import Queue

import numpy as np
import pytest
from gguf import GGUFWriter, TokenType
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

from deploy.local import default_model, progress
from deploy.local.gguf_conversion import GgufModel, halves_from_pairs
from deploy.local.tiny_model import write_tiny_model

HEADS, KV_HEADS, HEAD_DIM = 2, 1, 4
HIDDEN_SIZE = HEADS * HEAD_DIM
SPECIAL_TOKENS = ["<|unk|>", "<|start|>", "<|end|>"]
TOKENS = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "ll"]
TEMPLATE = "{% for message in messages %}<|start|>{{ message['content'] }}<|end|>{% endfor %}"


def rows(count: int) -> NDArray[np.float32]:
    return np.arange(count * HIDDEN_SIZE, dtype=np.float32).reshape(count, HIDDEN_SIZE)


def pairs_from_halves(projection: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """What llama.cpp does to the rows, spelt out row by row."""
    half = HEAD_DIM // 2
    order = [
        head * HEAD_DIM + side * half + i
        for head in range(heads)
        for i in range(half)
        for side in range(2)
    ]
    return projection[order]


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """One layer, with numbered weights and a byte-level vocabulary."""
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN_SIZE)
    writer.add_feed_forward_length(16)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    special = [TokenType.CONTROL] * len(SPECIAL_TOKENS)
    writer.add_token_types(special + [TokenType.NORMAL] * (len(TOKENS) - len(special)))
    writer.add_token_merges(["h e", "l l"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    writer.add_tensor("token_embd.weight", rows(len(TOKENS)))
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(HIDDEN_SIZE, dtype=np.float32))
    writer.add_tensor("blk.0.attn_q.weight", pairs_from_halves(rows(HEADS * HEAD_DIM), HEADS))
    writer.add_tensor("blk.0.attn_k.weight", pairs_from_halves(rows(HEAD_DIM), KV_HEADS))
    writer.add_tensor("blk.0.attn_v.weight", rows(HEAD_DIM))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def converted(gguf: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "converted"
    folder.mkdir()
    model = GgufModel(gguf)
    model.write_tokenizer(folder)
    model.write_weights(folder)
    return folder


def test_weights_keep_their_values_under_hugging_face_names(converted: Path) -> None:
    weights = load_file(converted / "model.safetensors")
    assert set(weights) == {
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.self_attn.v_proj.weight",
    }
    np.testing.assert_array_equal(weights["model.embed_tokens.weight"], rows(len(TOKENS)))
    np.testing.assert_array_equal(weights["model.layers.0.self_attn.v_proj.weight"], rows(HEAD_DIM))


def test_the_row_order_of_queries_and_keys_is_undone(converted: Path) -> None:
    attention = "model.layers.0.self_attn"
    weights = load_file(converted / "model.safetensors")
    np.testing.assert_array_equal(weights[f"{attention}.q_proj.weight"], rows(HEADS * HEAD_DIM))
    np.testing.assert_array_equal(weights[f"{attention}.k_proj.weight"], rows(HEAD_DIM))


def test_rows_stored_in_pairs_come_back_in_halves() -> None:
    stored = np.array([[0], [2], [1], [3]], dtype=np.float32)
    assert halves_from_pairs(stored, heads=1).ravel().tolist() == [0, 1, 2, 3]


def test_the_config_describes_the_model(converted: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    assert config["num_attention_heads"] == HEADS
    assert config["head_dim"] == HEAD_DIM
    assert config["max_position_embeddings"] == 64
    assert config["tie_word_embeddings"] is True
    assert config["eos_token_id"] == 2


@pytest.mark.parametrize("text", ["hello 2024!", "naïve 漢字 🙂\n\ttabs"])
def test_the_tokenizer_gives_back_what_it_was_given(converted: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(converted / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_tokenizer_merges_splits_digits_and_keeps_special_tokens_whole(
    converted: Path,
) -> None:
    tokenizer = Tokenizer.from_file(str(converted / "tokenizer.json"))
    assert tokenizer.encode("hello12<|end|>").tokens == ["he", "ll", "o", "1", "2", "<|end|>"]


def test_transformers_reads_the_folder_and_its_chat_template(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    messages = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|start|>hello<|end|>"
    assert tokenizer.eos_token == "<|end|>"


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    writer = GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="general.architecture is 'mamba', not 'llama'"):
        GgufModel(path)


@pytest.fixture
def downloads(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Serves the small file instead of the package, and lists what was asked for."""
    asked: list[Path] = []

    def download(scratch: Path) -> Path:
        asked.append(scratch)
        return gguf

    monkeypatch.setattr(default_model, "_download", download)
    monkeypatch.setenv("SWITCHGEAR_CACHE", str(tmp_path / "cache"))
    return asked


def ignore(_: str) -> None:
    pass


def test_the_default_model_is_made_once(downloads: list[Path]) -> None:
    first = default_model.model_folder(ignore)
    second = default_model.model_folder(ignore)
    assert (first == second, len(downloads)) == (True, 1)
    assert (first / "model.safetensors").is_file()


def test_a_long_download_is_spoken_of_again_and_again(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = Queue[str]()

    def download(scratch: Path) -> Path:
        lines = [said.get(timeout=20) for _ in range(3)]
        assert lines[0].startswith("downloading")
        assert all(line.startswith("still downloading") for line in lines[1:])
        return gguf

    monkeypatch.setattr(default_model, "_download", download)
    monkeypatch.setattr(progress, "PERIOD_SECONDS", 0.01)
    monkeypatch.setenv("SWITCHGEAR_CACHE", str(tmp_path / "cache"))
    assert default_model.tokenizer_folder(said.put).is_dir()


def test_an_unfinished_folder_is_made_anew(downloads: list[Path]) -> None:
    folder = default_model.model_folder(ignore)
    (folder / ".complete").unlink()
    (folder / "model.safetensors").write_bytes(b"half")
    default_model.model_folder(ignore)
    assert load_file(folder / "model.safetensors")


def test_a_failed_conversion_leaves_nothing(
    downloads: list[Path], gguf: Path, tmp_path: Path
) -> None:
    gguf.write_bytes(b"not a model")
    with pytest.raises(ValueError, match="GGUF"):
        default_model.model_folder(ignore)
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_the_tokenizer_alone_is_made_without_weights(downloads: list[Path]) -> None:
    folder = default_model.tokenizer_folder(ignore)
    assert (folder / "tokenizer.json").is_file()
    assert not (folder / "model.safetensors").exists()


def test_a_whole_model_serves_as_the_tokenizer(downloads: list[Path]) -> None:
    assert default_model.model_folder(ignore) == default_model.tokenizer_folder(ignore)


def test_the_tiny_model_is_the_same_every_time(converted: Path, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "one", converted)
    write_tiny_model(tmp_path / "two", converted)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert one["model.layers.1.mlp.down_proj.weight"].shape == (64, 128)
