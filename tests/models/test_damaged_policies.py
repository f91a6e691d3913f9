"""A damaged folder of a policy is refused by an error that names it, or gives a model; nothing else is raised."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from tests.helpers.tiny_models import tiny_gpt2


def torch_policy(folder: Path) -> None:
    bk.TorchLM(tiny_gpt2(), eos_token_id=0).save_pretrained(folder)


def ngram_policy(folder: Path) -> None:
    bk.NgramLM.fit(["ab", "ba"], order=2).save_pretrained(folder)


@pytest.mark.parametrize(
    "kind, write",
    [("TorchLM", torch_policy), ("JaxLM", torch_policy), ("NgramLM", ngram_policy)],
    ids=["TorchLM", "JaxLM", "NgramLM"],
)
def test_a_damaged_folder_is_named(kind: str, write: Callable[[Path], None], tmp_path: Path) -> None:
    """30 damages: cut, zeroed, flipped, appended, in every file, most of them near its start, where its structure is."""
    folder = tmp_path / "policy"
    write(folder)
    rng, refused = np.random.default_rng(5), 0
    files = sorted(folder.iterdir())
    for number in range(30):
        file = files[number % len(files)]
        whole = file.read_bytes()
        content, start = bytearray(whole), int(rng.integers(len(whole) if number % 2 else min(len(whole), 200)))
        if number % 4 == 0:
            del content[start:]
        elif number % 4 == 1:
            content[start : start + 60] = bytes(len(content[start : start + 60]))
        elif number % 4 == 2:
            content[start] ^= 1 << int(rng.integers(8))
        else:
            content += rng.bytes(20)
        file.write_bytes(content)
        try:
            getattr(bk, kind).from_pretrained(folder)
        except bk.CheckpointError as error:
            refused += str(folder) in str(error)
        except Exception as error:
            pytest.fail(f"{file.name}, {number}: {type(error).__name__}: {error}")
        file.write_bytes(whole)
    assert refused >= 20


def test_a_damaged_generation_config_is_refused(tmp_path: Path) -> None:
    """transformers passes over it, and the EOS ids that stand in it alone would be gone."""
    torch_policy(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 3')
    for kind in (bk.TorchLM, bk.JaxLM):
        with pytest.raises(bk.CheckpointError, match=r"generation_config\.json in .* is no JSON"):
            kind.from_pretrained(tmp_path)


def test_a_full_disk_leaves_the_policy_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the words of safetensors, whose error is none of the system."""
    torch_policy(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(tensors: Any, file: str, **_: Any) -> None:
        Path(file).write_bytes(b"half")
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    other = bk.TorchLM(tiny_gpt2(seed=1), eos_token_id=0)
    with pytest.raises(bk.OutputError, match="No space left on device"):
        other.save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    with pytest.raises(bk.OutputError, match="No space left on device"):
        other.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_saving_over_a_sharded_model_leaves_none_of_its_files(tmp_path: Path) -> None:
    """An index of before would point to weights of before."""
    torch_policy(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"old")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    torch_policy(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
