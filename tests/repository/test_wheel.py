"""What a built wheel holds."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import bayes_klrl

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "bayes_klrl"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_has_one_top_level_name(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert top == {"bayes_klrl", f"bayes_klrl-{bayes_klrl.__version__}.dist-info"}


def test_the_wheel_holds_every_file_of_the_package(wheel: zipfile.ZipFile) -> None:
    """The shipped model, the data files, the list of names and py.typed included."""
    here = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }
    there = {name for name in wheel.namelist() if name.startswith("bayes_klrl/")}
    assert there == here
    assert {"bayes_klrl/py.typed", "bayes_klrl/__init__.pyi"} <= there
    shipped = PACKAGE / "models" / "shipped"
    if shipped.is_dir():
        assert any(name.startswith("bayes_klrl/models/shipped/") and name.endswith(".safetensors") for name in there)


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    info = f"bayes_klrl-{bayes_klrl.__version__}.dist-info"
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "\nRequires-Python: >=3.11\n" in metadata
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
    assert b"bayes-klrl = bayes_klrl.cli:main" in wheel.read(f"{info}/entry_points.txt")
