"""The repository's shape: root links, what a wheel holds, and that imports point one way.

faces -> inference -> models -> vocabulary -> numpy
"""

import ast
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import bayes_klrl

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "bayes_klrl"

VOCABULARY = {
    "arrays",
    "batch",
    "checks",
    "draws",
    "errors",
    "likelihood",
    "posterior",
    "progress",
    "randomness",
    "sequences",
    "typing",
    "weights",
}
LAYERS = ("vocabulary", "models", "inference", "faces")  # each may import itself and those before it

# Lazy imports inside functions that point upwards, {file: modules}. Each is a convenience of the public face.
LAZY_UPWARD = {
    "posterior": {"bayes_klrl.models.pyro_model", "bayes_klrl.models.numpyro_model"},
    "draws": {"bayes_klrl.arviz_export"},
    "models.reward_posterior": {"bayes_klrl.arviz_reward", "bayes_klrl.inference.reward_ensemble"},
}
# Lazy imports of other packages by the vocabulary, {file: packages}.
LAZY_THIRD_PARTY = {"draws": {"pandas", "xarray"}, "progress": {"rich"}}

# Backends are leaves: only these files, and the faces that present or build things, may import a third package at the
# top. All others are NumPy, so that weights, resampling, SMC, enumeration and n-grams work without torch and JAX.
BACKEND = re.compile(
    r"models\.(torch|jax|pyro|numpyro)_\w+|inference\.(svi_\w+|elbo(_\w+)?|loss_\w+|twist_losses|twist_training)"
)
FACES = {
    "arviz_export",
    "arviz_reward",
    "cli",
    "cli_certify",
    "cli_common",
    "cli_suite",
    "suite_table",
    "comparison",
    "comparison_table",
    "plots",
    "problems",
    "trainer_audit",
}


@dataclass(frozen=True)
class Import:
    """One imported module, as seen in a file: `module` is absolute, `place` is top, lazy or typing."""

    file: str
    line: int
    module: str
    place: str

    def __str__(self) -> str:
        return f"bayes_klrl/{self.file.replace('.', '/')}.py:{self.line} imports {self.module} ({self.place})"


def files() -> dict[str, Path]:
    """Dotted name below the package, without `__init__`, of every source file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts)] = path
    return found


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def imports_of(file: str, tree: ast.AST, place: str = "top") -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name, place)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            for alias in node.names:
                yield Import(file, node.lineno, resolve(node.module or "", alias.name), place)
        elif isinstance(node, ast.If) and is_type_checking(node):
            for statement in node.body:
                yield from imports_of(file, ast.Module([statement], []), "typing")
            for statement in node.orelse:
                yield from imports_of(file, ast.Module([statement], []), place)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports_of(file, node, "lazy" if inside and place == "top" else place)


def resolve(module: str, name: str) -> str:
    """The module behind `from module import name`, where module is ours and name a submodule or a public name."""
    if module == "bayes_klrl" and name in bayes_klrl._HOME:
        return bayes_klrl._HOME[name]
    is_submodule = module.split(".")[0] == "bayes_klrl" and f"{module}.{name}".removeprefix("bayes_klrl.") in files()
    return f"{module}.{name}" if is_submodule else module


def layer(file: str) -> str:
    first = file.split(".")[0]
    if first in {"models", "inference"}:
        return first
    return "vocabulary" if first in VOCABULARY else "faces"


def is_ours(module: str) -> bool:
    return module.split(".")[0] == "bayes_klrl"


def points_up(imported: Import) -> bool:
    target = imported.module.removeprefix("bayes_klrl").removeprefix(".")
    if not target:  # the package itself: harmless for its __version__ and the like
        return False
    return LAYERS.index(layer(target)) > LAYERS.index(layer(imported.file))


def all_imports() -> list[Import]:
    found = []
    for file, path in files().items():
        if file != "__init__":  # its imports are lazy or for type checkers, see test_imports.py
            found += imports_of(file, ast.parse(path.read_text(encoding="utf-8")))
    return [each for each in found if each.place != "typing"]


def report(wrong: list[Import]) -> str:
    return "\n".join(map(str, wrong))


@pytest.mark.parametrize("name", ["models", "inference"])
def test_root_links_lead_into_the_package(name: str) -> None:
    link = ROOT / name
    assert link.is_symlink()
    assert link.readlink() == Path("bayes_klrl") / name
    assert (link / "__init__.py").is_file()


def test_root_links_cannot_be_imported(tmp_cwd: Path) -> None:
    code = "from importlib.util import find_spec; import bayes_klrl; print(find_spec('models'), find_spec('inference'))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["None", "None"]


def test_imports_at_the_top_never_point_up() -> None:
    wrong = [each for each in all_imports() if each.place == "top" and is_ours(each.module) and points_up(each)]
    assert not wrong, report(wrong)


def test_lazy_imports_point_up_only_where_listed() -> None:
    lazy = [each for each in all_imports() if each.place == "lazy" and is_ours(each.module) and points_up(each)]
    wrong = [each for each in lazy if each.module not in LAZY_UPWARD.get(each.file, set())]
    assert not wrong, report(wrong)


def is_numpy_only(file: str) -> bool:
    return file not in FACES and not BACKEND.fullmatch(file)


def test_numpy_only_files_import_no_other_package() -> None:
    """Nor a file of ours that does."""
    free = sys.stdlib_module_names | {"numpy"}
    wrong = []
    for each in all_imports():
        package, inner = each.module.split(".")[0], each.module.removeprefix("bayes_klrl.")
        if each.place == "top" and is_numpy_only(each.file):
            wrong += [each] * (not is_numpy_only(inner) if is_ours(each.module) else package not in free)
    assert not wrong, report(wrong)


def test_the_vocabulary_imports_other_packages_only_where_listed() -> None:
    free = sys.stdlib_module_names | {"numpy", "bayes_klrl"}
    wrong = [
        each
        for each in all_imports()
        if each.file in VOCABULARY
        and (package := each.module.split(".")[0]) not in free
        and package not in LAZY_THIRD_PARTY.get(each.file, set())
    ]
    assert not wrong, report(wrong)


def test_no_file_shadows_a_package() -> None:
    """Run from its own folder, a file of that name would be imported in the package's place."""
    packages = {
        "arviz",
        "jax",
        "numpy",
        "numpyro",
        "pandas",
        "peft",
        "pyro",
        "scipy",
        "torch",
        "transformers",
        "xarray",
    }
    assert not packages & {path.stem for path in files().values()}


def test_the_import_reader_sees_what_it_should() -> None:
    """The reader on a file with one import of each kind."""
    source = """
import torch
from bayes_klrl import SMC
from bayes_klrl import arviz_export
if TYPE_CHECKING:
    import typing_only
try:
    import optional
except ImportError:
    pass
class C:
    import in_class
    def method(self):
        if self:
            import lazy
"""
    seen = {(each.module, each.place) for each in imports_of("draws", ast.parse(source))}
    exported = "bayes_klrl.arviz_export" if "arviz_export" in files() else "bayes_klrl"
    assert seen == {
        ("torch", "top"),
        ("bayes_klrl.inference.smc", "top"),
        (exported, "top"),
        ("typing_only", "typing"),
        ("optional", "top"),
        ("in_class", "top"),
        ("lazy", "lazy"),
    }
    assert is_numpy_only("inference.svi")
    assert not is_numpy_only("inference.svi_pyro")
    assert not is_numpy_only("models.torch_lm")
    assert points_up(Import("draws", 1, "bayes_klrl.inference.smc", "top"))
    assert points_up(Import("models.torch_lm", 1, "bayes_klrl.inference", "top"))
    assert points_up(Import("inference.smc", 1, "bayes_klrl.plots", "lazy"))
    assert not points_up(Import("cli", 1, "bayes_klrl.inference.smc", "top"))
    assert not points_up(Import("draws", 1, "bayes_klrl.sequences", "top"))


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
    """The shipped model, the data files and py.typed included."""
    here = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }
    there = {name for name in wheel.namelist() if name.startswith("bayes_klrl/")}
    assert there == here
    assert "bayes_klrl/py.typed" in there
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
