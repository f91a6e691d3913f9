"""Where models come from: shards, and GGUF files that are dequantised once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bayes_klrl as bk
from bayes_klrl.models.torch_lm import checkpoint
from bayes_klrl.models.torch_lm.sources import gguf_cache
from tests.helpers.tiny_models import tiny_gpt2, tiny_llama, tiny_tokenizer

SEQUENCES = bk.Sequences(np.random.default_rng(0).integers(0, 20, (1, 4, 5)), np.full((1, 4), 5))


def scores(lm: bk.TorchLM) -> torch.Tensor:
    with torch.no_grad():
        return lm.token_log_probs([[1, 2]], SEQUENCES)


# --- shards ---------------------------------------------------------------------------------------------------------


def sharded(folder: Path) -> bk.TorchLM:
    model = tiny_llama(50)
    model.save_pretrained(folder, max_shard_size="5KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return bk.TorchLM(model)


def test_shards_are_one_model_on_both_backends(tmp_path: Path) -> None:
    own = scores(sharded(tmp_path))
    assert torch.equal(scores(bk.TorchLM.from_pretrained(tmp_path)), own)
    on_jax = bk.JaxLM.from_pretrained(tmp_path).token_log_probs([[1, 2]], SEQUENCES)
    np.testing.assert_allclose(on_jax, own, rtol=0, atol=1e-5)


def test_a_missing_shard_is_named_before_any_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded(tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    shards[1].unlink()
    monkeypatch.setattr(checkpoint.AutoModelForCausalLM, "from_pretrained", lambda *a, **o: pytest.fail("was read"))
    for kind in (bk.TorchLM, bk.JaxLM):
        with pytest.raises(
            bk.CheckpointError, match=rf"lacks 1 of the {len(shards)} shards .* {shards[1].name}\. Is the"
        ):
            kind.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    for kind in (bk.TorchLM, bk.JaxLM):
        with pytest.raises(bk.CheckpointError, match="names no shards"):
            kind.from_pretrained(tmp_path)


def test_large_models_are_saved_in_shards(tmp_path: Path) -> None:
    lm = bk.TorchLM(tiny_llama(50))
    lm.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert torch.equal(scores(bk.TorchLM.from_pretrained(tmp_path)), scores(lm))


# --- GGUF -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that stands for a GGUF file, beside a cache; the reader of GGUF files returns a tiny model."""
    monkeypatch.setenv(gguf_cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    place = tmp_path / "models" / "tiny.Q4.gguf"
    place.parent.mkdir()
    place.write_bytes(b"weights" * 100)
    plain, read = checkpoint.load_model, []

    def load_model(source: str, dtype: torch.dtype, **options: Any) -> tuple[Any, Any]:
        if "gguf_file" not in options:
            return plain(source, dtype, **options)
        read.append(dtype)
        model = tiny_gpt2(20, eos_token_id=3, seed=len(place.read_bytes()))
        model.hf_quantizer = object()  # as transformers leaves it
        model.config.quantization_config = {"quant_method": "gguf"}
        return model, tiny_tokenizer()

    monkeypatch.setattr(checkpoint, "load_model", load_model)
    monkeypatch.setattr(gguf_cache, "reads", read, raising=False)
    return place


def reads() -> list[torch.dtype]:
    return gguf_cache.reads  # type: ignore[attr-defined,no-any-return]


def entry(file: Path) -> Path:
    (found,) = (file.parents[1] / "cache" / "gguf").iterdir()
    return found


def test_a_file_is_dequantised_once(file: Path, tmp_path: Path) -> None:
    first, second = bk.TorchLM.from_pretrained(file), bk.TorchLM.from_pretrained(file.parent)
    assert reads() == [torch.float32]
    assert torch.equal(scores(first), scores(second))
    assert first.eos_token_ids == second.eos_token_ids == {3}
    assert first.tokenizer is not None
    assert first.module.config._name_or_path == str(file)  # what an adapter names as its base
    half = bk.TorchLM.from_pretrained(file, dtype="bfloat16")
    assert half.half_precision
    assert len(reads()) == 1
    first.save_pretrained(tmp_path / "saved")  # transformers refuses to save what it calls quantised
    assert torch.equal(scores(bk.TorchLM.from_pretrained(tmp_path / "saved")), scores(first))


def test_another_file_has_another_entry(file: Path) -> None:
    old = scores(bk.TorchLM.from_pretrained(file))
    file.write_bytes(b"weights" * 101)
    assert not torch.equal(scores(bk.TorchLM.from_pretrained(file)), old)
    os.utime(file, (1, 1))  # of the same content, but changed since
    bk.TorchLM.from_pretrained(file)
    assert len(reads()) == 3


@pytest.mark.parametrize("damage", ["a byte", "cut", "a file is missing", "no checksums"])
def test_a_damaged_entry_is_written_anew(damage: str, file: Path) -> None:
    whole = scores(bk.TorchLM.from_pretrained(file))
    weights = entry(file) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    if damage == "a byte":
        weights.write_bytes(content)
    elif damage == "cut":
        weights.write_bytes(content[:-10])
    else:
        (entry(file) / {"a file is missing": "tokenizer.json", "no checksums": "checksums.json"}[damage]).unlink()
    assert torch.equal(scores(bk.TorchLM.from_pretrained(file)), whole)
    assert len(reads()) == 2
    bk.TorchLM.from_pretrained(file)
    assert len(reads()) == 2


def test_a_write_that_fails_leaves_nothing_and_the_model_is_there(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file.parents[1] / "cache").write_text("a file where the cache should be")
    with pytest.warns(UserWarning, match="dequantised each time .* cannot be written.*BAYES_KLRL_CACHE"):
        lm = bk.TorchLM.from_pretrained(file)
    assert scores(lm).isfinite().all()
    monkeypatch.setenv(gguf_cache.CACHE_VARIABLE, str(file.parents[1] / "other"))
    monkeypatch.setattr(gguf_cache, "checksums", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        bk.TorchLM.from_pretrained(file)
    assert list((file.parents[1] / "other").rglob("*.safetensors")) == []


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(gguf_cache.CACHE_VARIABLE, str(tmp_path))
    assert gguf_cache.cache_folder() == tmp_path
    monkeypatch.delenv(gguf_cache.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert gguf_cache.cache_folder() == tmp_path / "bayes_klrl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert gguf_cache.cache_folder() == Path.home() / ".cache" / "bayes_klrl"


def test_several_files_in_a_folder_are_not_chosen_among(file: Path) -> None:
    (file.parent / "tiny.Q8.gguf").write_bytes(b"more")
    with pytest.raises(bk.CheckpointError, match=r"has 2 GGUF files \(tiny.Q4.gguf, tiny.Q8.gguf, ...\). Name one"):
        bk.TorchLM.from_pretrained(file.parent)
