"""Files and folders are written whole or not at all, and what stops the writing is named."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.draws import Cost
from bayes_klrl.export.output_folder import prepare_output
from bayes_klrl.whole_files import UNFINISHED, check_folder, whole_file, whole_folder, write_whole


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


class Stop(Exception):
    """Something other than an error of the system."""


def write_half(file: Path, error: type[BaseException]) -> None:
    file.write_text("half")
    raise error


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_is_in_its_place_only_when_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.tar.gz"
    file.write_text("before")
    with whole_file(file) as unfinished:
        assert unfinished.name.startswith(UNFINISHED)
        assert unfinished.suffixes == [".tar", ".gz"]
        unfinished.write_text("half")
        assert file.read_text() == "before"
    assert file.read_text() == "half"
    assert names(tmp_path) == ["a.tar.gz"]


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_what_was_there_stays_when_the_writing_stops(error: type[BaseException], tmp_path: Path) -> None:
    file = write_whole(tmp_path / "a.csv", "before")
    with pytest.raises(error), whole_file(file) as unfinished:
        write_half(unfinished, error)
    assert names(tmp_path) == ["a.csv"]
    assert file.read_text() == "before"


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[int] = []

    def push(number: int) -> None:
        assert not (tmp_path / "a.csv").exists() or stat.S_ISDIR(os.fstat(number).st_mode)
        pushed.append(number)

    monkeypatch.setattr(os, "fsync", push)
    write_whole(tmp_path / "a.csv", b"1,2\n")
    assert pushed


def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_whole(tmp_path / "a.csv", "before")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        bk.OutputError, match=r"a\.csv' cannot be written: No space left on device.*Free some space"
    ) as caught:
        write_whole(file, "after")
    assert caught.value.file == file
    assert isinstance(caught.value.__cause__, OSError)
    assert file.read_text() == "before"
    assert names(tmp_path) == ["a.csv"]


@pytest.mark.parametrize(
    "words",
    [
        "Error while serializing: I/O error: No space left on device (os error 28)",
        "Unable to flush file (file write failed: errno = 28, error message = 'No space left on device')",
        "[Errno 28] No space left on device",
    ],
)
def test_a_full_disk_is_known_in_the_words_of_libraries(words: str, tmp_path: Path) -> None:
    with pytest.raises(bk.OutputError, match="No space left"), whole_file(tmp_path / "a"):
        raise RuntimeError(words)
    with pytest.raises(RuntimeError, match="too many"), whole_file(tmp_path / "a"):
        raise RuntimeError("28 are too many")


def test_links_permissions_and_devices(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    file = write_whole(tmp_path / "far" / "a", "before")
    file.chmod(0o640)
    (tmp_path / "link").symlink_to(file)
    write_whole(tmp_path / "link", "after")
    assert (tmp_path / "link").is_symlink()
    assert file.read_text() == "after"
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    write_whole("/dev/null", "gone")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    assert not list(Path("/dev").glob(f"{UNFINISHED}*"))


def test_places_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "a", "1")
    for file, why in (("none/b", "No such file"), ("a/b", "Not a directory"), (".", "Is a directory")):
        with pytest.raises(bk.OutputError, match=why):
            write_whole(tmp_path / file, "2")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(bk.OutputError, match=r"Permission denied.*may write to"):
        write_whole(tmp_path / "a", "2")
    assert (tmp_path / "a").read_text() == "1"


def write_model(folder: Path, text: str, *more: str) -> None:
    for name in ("config.json", "model.safetensors", *more):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def test_a_new_folder_comes_as_one(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "deep" / "model") as unfinished:
        write_model(unfinished, "new", "tokenizer/vocab.json")
        assert not (tmp_path / "deep" / "model").exists()
    assert names(tmp_path) == [
        f"deep/model/{name}" for name in ("config.json", "model.safetensors", "tokenizer/vocab.json")
    ]
    with pytest.raises(Stop), whole_folder(tmp_path / "other") as unfinished:
        write_half(unfinished / "config.json", Stop)
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


def test_in_a_folder_that_is_there_files_of_others_stay(tmp_path: Path) -> None:
    write_model(tmp_path, "old", "notes.txt", "model.safetensors.index.json", "tokenizer/vocab.json")
    with whole_folder(tmp_path, replaces="model*.safetensors*") as unfinished:
        write_model(unfinished, "new", "tokenizer/vocab.json")
        assert (tmp_path / "config.json").read_text() == "old"
    assert names(tmp_path) == ["config.json", "model.safetensors", "notes.txt", "tokenizer/vocab.json"]
    assert [(tmp_path / name).read_text() for name in names(tmp_path)] == ["new", "new", "old", "new"]


@pytest.mark.parametrize("num_moved", [0, 1])
def test_a_folder_that_was_half_replaced_is_no_models_folder(
    num_moved: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old config.json with new weights, or the other way round, would be a model that nobody has trained."""
    coins = [bk.NgramLM.fit(texts, order=2) for texts in (["ab", "b"], ["aab", "a"])]
    coins[0].save_pretrained(tmp_path)
    moved: list[Path] = []
    replace = Path.replace

    def killed(self: Path, target: Path) -> Path:
        if len(moved) == num_moved:
            raise Stop
        moved.append(target)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(Stop):
        coins[1].save_pretrained(tmp_path)
    with pytest.raises(bk.CheckpointError, match=tmp_path.name):
        bk.NgramLM.from_pretrained(tmp_path)


def test_folders_that_can_be_made_are_not_left_behind(tmp_path: Path) -> None:
    check_folder(tmp_path / "a" / "b")
    check_folder(tmp_path)
    assert not list(tmp_path.iterdir())


def test_two_processes_may_check_one_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them takes the folder away again just before the other writes into it."""
    real, taken = Path.touch, []

    def touch(self: Path, *args: Any, **options: Any) -> None:
        if not taken:
            taken.append(self.parent.rmdir())
        real(self, *args, **options)

    monkeypatch.setattr(Path, "touch", touch)
    check_folder(tmp_path / "a" / "b")
    assert taken == [None]
    assert not (tmp_path / "a").exists()


def test_folders_that_cannot_be_made_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "file", "1")
    for folder, why in ((tmp_path / "file" / "a", "Not a directory"), ("", "is empty"), (" ", "is empty")):
        with pytest.raises(bk.OutputError, match=why):
            check_folder(folder)
    with pytest.raises(bk.OutputError, match="file' cannot be written"):
        check_folder(tmp_path / "file")

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "touch", forbidden)
    with pytest.raises(bk.OutputError, match=r"b' cannot be written: Permission denied.*may write to"):
        check_folder(tmp_path / "a" / "b")
    assert names(tmp_path) == ["file"]
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("place", ["", " ", None, 3, b"a", "a\0b", "a\ud800b"], ids=ascii)
def test_what_cannot_be_a_path_is_refused_by_name(place: Any, tmp_cwd: Path) -> None:
    coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    posterior = bk.Posterior(coin, bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0), max_new_tokens=2)
    fit = bk.Fit(coin, {"elbo": np.zeros(1)}, posterior, Cost())
    for save in (bk.Exact().run(posterior, seed=0).save, fit.save, coin.save_pretrained, prepare_output, check_folder):
        with pytest.raises(bk.OutputError, match=r"is empty|must be a text or a pathlib|no name of a file has a NUL"):
            save(place)
    assert names(tmp_cwd) == []


def test_a_folder_that_is_loaded_as_draws_is_called_one(tmp_path: Path) -> None:
    with pytest.raises(bk.CheckpointError, match=r"is a folder\. Give the file"):
        bk.Draws.load(tmp_path)
    write_whole(tmp_path / "draws.nc", "")
    with pytest.raises(bk.CheckpointError, match=r"is a folder\. Its draws are in '.*draws\.nc'"):
        bk.Draws.load(tmp_path)
    with pytest.raises(bk.CheckpointError, match="got None"):
        bk.Draws.load(None)  # type: ignore[arg-type]


def test_trainings_ask_before_they_begin(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", "1")
    with pytest.raises(bk.OutputError, match="Not a directory"):
        bk.Checkpoint(tmp_path / "file" / "state")
    with pytest.raises(bk.OutputError, match="Not a directory"):
        bk.CertifyEvery(5, folder=tmp_path / "file" / "best")


LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np
import bayes_klrl as bk
from bayes_klrl.export.pictures import plot_history

folder = Path(sys.argv[1])
coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
posterior = bk.Posterior(coin, bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0), max_new_tokens=3)
draws = bk.ImportanceSampling(2000).run(posterior, seed=0)
draws.resample(5, seed=0).save(folder / "draws.nc")
before = (folder / "draws.nc").read_bytes()
resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))
wide = bk.NgramLM(np.log(np.random.default_rng(0).dirichlet(np.ones(64), 64)), eos_token_id=1)
for write in (
    lambda: draws.save(folder / "draws.nc"),
    lambda: draws.save(folder / "new.nc"),
    lambda: plot_history({"elbo": np.arange(20.0)}, folder / "picture.png"),
    lambda: wide.save_pretrained(folder / "policy"),
):
    try:
        write()
        print("written")
    except bk.OutputError as error:
        print(error)
assert (folder / "draws.nc").read_bytes() == before
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limits of the size of files")
def test_a_real_limit_of_the_size_of_files(tmp_path: Path) -> None:
    """HDF5 itself crashes the process here; what is left is what was there."""
    result = subprocess.run([sys.executable, "-c", LIMITED, tmp_path], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 4
    for line, name in zip(lines, ("draws.nc", "new.nc", "picture.png", "policy"), strict=True):
        assert f"{name}' cannot be written: File too large" in line
    assert [path.name for path in tmp_path.iterdir()] == ["draws.nc"]
