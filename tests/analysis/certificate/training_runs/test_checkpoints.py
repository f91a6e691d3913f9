"""Which checkpoints of a run are whole: a trainer may be writing one at this moment."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import bayes_klrl as bk
from bayes_klrl.analysis.certificate.training_runs.checkpoints import checkpoints_in
from bayes_klrl.analysis.certificate.training_runs.trainer_log import TrainerLog
from bayes_klrl.inference.policies import model_folder
from tests.policies.make import HERE


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def shard(folder: Path) -> None:
    """Half of a model in two files."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights yet": (lambda folder: (folder / "model.safetensors").unlink(), "no safetensors weights"),
    "half of the weights": (lambda folder: cut(folder / "model.safetensors"), "model.safetensors is not whole"),
    "an empty file": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.safetensors is not whole"),
    "one of two shards": (shard, "lacks model-00002-of-00002.safetensors"),
    "half an index": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_'),
        r"model.safetensors.index.json is not whole",
    ),
    "no state yet": (lambda folder: (folder / "trainer_state.json").unlink(), "no trainer_state.json yet"),
    "half a configuration": (lambda folder: cut(folder / "config.json"), "config.json is not whole"),
    "an empty configuration": (lambda folder: (folder / "config.json").write_text(""), "config.json is not whole"),
    "half a tokenizer": (
        lambda folder: (folder / "tokenizer_config.json").write_text('{"a'),
        "tokenizer_config.json is not whole",
    ),
    "half a state": (lambda folder: cut(folder / "trainer_state.json"), "trainer_state.json is not whole"),
    "an empty state": (
        lambda folder: (folder / "trainer_state.json").write_text(""),
        "trainer_state.json is not whole",
    ),
    "no configuration": (
        lambda folder: (folder / "config.json").unlink(),
        "neither config.json nor adapter_config.json",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_checkpoint_that_is_not_whole_is_skipped_and_said(damage: str, tmp_path: Path) -> None:
    run = shutil.copytree(HERE / "grpo", tmp_path / "run")
    make, reason = DAMAGE[damage]
    make(run / "checkpoint-6")
    found = checkpoints_in(run)
    assert list(found.whole) == [3]
    assert list(found.skipped) == ["checkpoint-6"]
    assert reason in found.skipped["checkpoint-6"]
    with pytest.raises(bk.CheckpointError, match=rf"last checkpoint.*checkpoint-6, and.*{reason}"):
        model_folder(without_model(run))


def without_model(run: Path) -> Path:
    """A run whose model was not saved yet, beside its checkpoints."""
    for file in run.iterdir():
        if file.is_file():
            file.unlink()
    return run


def posterior_of_one_word() -> bk.Posterior:
    words = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0, bounds=(1, 2))
    return bk.Posterior(bk.TorchLM.from_pretrained(HERE / "base"), words, prompts="the day", max_new_tokens=1)


@pytest.mark.parametrize("name", ["trainer_state.json", "config.json"])
def test_the_others_are_certified_while_the_last_is_being_written(name: str, tmp_path: Path) -> None:
    run = shutil.copytree(HERE / "grpo", tmp_path / "run")
    cut(run / "checkpoint-6" / name)
    curve = bk.certify_checkpoints(posterior_of_one_word(), run, seed=0, num_draws=32)
    assert curve.steps.tolist() == [3]
    assert curve.log is not None
    assert f"skipped checkpoint-6: its {name} is not whole" in str(curve)
    shutil.rmtree(run / "checkpoint-3")
    with pytest.raises(bk.CheckpointError, match=rf"no whole checkpoint-N in it \(checkpoint-6: its {name}"):
        checkpoints_in(run)


def test_a_number_that_no_step_can_have_is_skipped(tmp_path: Path) -> None:
    run = shutil.copytree(HERE / "grpo", tmp_path / "run")
    shutil.copytree(run / "checkpoint-3", run / f"checkpoint-{10**22}")
    found = checkpoints_in(run)
    assert list(found.whole) == [3, 6]
    assert found.skipped == {f"checkpoint-{10**22}": "its number is too large for a step"}
    assert model_folder(without_model(run)).name == "checkpoint-6"


def test_two_folders_of_one_number_are_told_apart(tmp_path: Path) -> None:
    """The verdict never has the name of one with the number of the other."""
    shutil.copytree(HERE / "grpo" / "checkpoint-3", tmp_path / "checkpoint-3")
    shutil.copytree(HERE / "grpo" / "checkpoint-6", tmp_path / "checkpoint-03")
    found = checkpoints_in(tmp_path)
    assert found.whole == {3: tmp_path / "checkpoint-3"}
    assert found.skipped == {"checkpoint-03": "checkpoint-3 has the same number"}
    with pytest.raises(bk.CheckpointError, match=r"checkpoint-03 and checkpoint-3 in .* have the same number"):
        model_folder(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-3")
    curve = bk.certify_checkpoints(posterior_of_one_word(), tmp_path, seed=0, num_draws=32)
    assert curve.steps.tolist() == [3]
    assert curve.verdict.startswith("checkpoint-03 is nearest")


def test_a_path_that_is_none_is_refused_by_name() -> None:
    with pytest.raises(bk.CheckpointError, match=r"path of a folder with checkpoints.*got None"):
        bk.certify_checkpoints(posterior_of_one_word(), None, seed=0)  # type: ignore[arg-type]


def test_what_is_skipped_stands_in_the_text(tmp_path: Path) -> None:
    run = shutil.copytree(HERE / "grpo", tmp_path / "run")
    (run / "checkpoint-6").rename(run / "tmp-checkpoint-6")
    (run / "checkpoint-best").mkdir()
    prior = bk.TorchLM.from_pretrained(HERE / "base")
    words = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0, bounds=(1, 2))
    posterior = bk.Posterior(prior, words, prompts="the day", max_new_tokens=1)
    curve = bk.certify_checkpoints(posterior, run, seed=0, num_draws=32)
    assert curve.skipped == {"tmp-checkpoint-6": "it is being written"}
    assert "skipped tmp-checkpoint-6: it is being written" in str(curve)


def test_the_order_is_that_of_the_numbers(tmp_path: Path) -> None:
    for number in (9, 10, 100):
        shutil.copytree(HERE / "grpo" / "checkpoint-3", tmp_path / f"checkpoint-{number}")
    assert list(checkpoints_in(tmp_path).whole) == [9, 10, 100]


def test_trainers_that_write_no_state_are_read_too(tmp_path: Path) -> None:
    """Where no checkpoint has a trainer_state.json, its absence says nothing."""
    run = shutil.copytree(HERE / "grpo", tmp_path / "run")
    for state in run.rglob("trainer_state.json"):
        state.unlink()
    assert list(checkpoints_in(run).whole) == [3, 6]


def test_a_folder_without_a_whole_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(bk.CheckpointError, match="There is no folder"):
        checkpoints_in(tmp_path / "absent")
    with pytest.raises(bk.CheckpointError, match=r"no whole checkpoint-N in it\. Give the folder"):
        checkpoints_in(tmp_path)
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(bk.CheckpointError, match=r"no whole checkpoint-N in it \(checkpoint-4: it has neither"):
        checkpoints_in(tmp_path)
    with pytest.raises(bk.CheckpointError, match=r"checkpoint-3' has no whole checkpoint-N in it"):
        checkpoints_in(HERE / "grpo" / "checkpoint-3")


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"log_history": 3}', '{"log_history": [3]}', "\x00"])
def test_a_state_that_is_half_written_is_refused_by_name(content: str, tmp_path: Path) -> None:
    """Of the one checkpoint that was asked for."""
    shutil.copytree(HERE / "rloo" / "checkpoint-6", tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-6" / "trainer_state.json").write_text(content)
    prior = bk.TorchLM.from_pretrained(HERE / "base")
    words = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    posterior = bk.Posterior(prior, words, prompts="the day", max_new_tokens=1)
    with pytest.raises(bk.CheckpointError, match=r"checkpoint-6.trainer_state\.json"):
        bk.certify(posterior, tmp_path / "checkpoint-6", seed=0, num_draws=32)


@pytest.mark.parametrize(
    "content, why",
    [
        ({"log_history": [{"step": 10**30, "reward": 1.0}]}, "a step of 31 digits"),
        ({"global_step": -(10**30)}, "a step of 31 digits"),
        ({"log_history": [{"step": 1, "reward": 10**400}]}, "a number above all floats"),
    ],
    ids=["step", "global step", "value"],
)
def test_numbers_that_no_trainer_writes_are_refused_by_name(
    content: dict[str, object], why: str, tmp_path: Path
) -> None:
    (tmp_path / "trainer_state.json").write_text(json.dumps(content))
    with pytest.raises(bk.CheckpointError, match=rf"trainer_state\.json' is no trainer's state.*{why}"):
        TrainerLog.read(tmp_path / "trainer_state.json")
    run = shutil.copytree(HERE / "grpo", tmp_path / "run")
    (run / "checkpoint-3" / "trainer_state.json").write_text(json.dumps(content))
    with pytest.raises(bk.CheckpointError, match=rf"^checkpoint-3: .*{why}"):
        bk.certify_checkpoints(posterior_of_one_word(), run, seed=0, num_draws=32)
