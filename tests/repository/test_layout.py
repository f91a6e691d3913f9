"""The repository's shape: root links, rooms, and that imports point one way, without a circle.

vocabulary <- models, export <- runners <- inference <- likelihoods, reward_models <- problems <- analysis <- cli
"""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import bayes_klrl
from tests.helpers.public_names import homes

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "bayes_klrl"

RANK = {
    "models": 1,
    "export": 1,
    "runners": 2,
    "inference": 3,
    "likelihoods": 4,
    "reward_models": 4,
    "problems": 5,
    "analysis": 6,
    "gallery": 7,
    "cli": 8,
}
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
    "resampling",
    "sequences",
    "typing",
    "weights",
    "whole_files",
}

ROOMS_OF_THE_VOCABULARY = {"prompts", "reward_functions"}

# Every lazy import of ours below cli, {(file, imported): reason}. Those of cli keep `bayes-klrl --help` light.
LAZY = {
    ("__init__", "errors"): "the package itself loads nothing before a name is asked for",
    ("draws", "export.datatree"): "Draws.to_arviz: upward, a convenience of the public face",
    ("draws", "export.notebook"): "Draws._repr_html_: upward, a convenience of notebooks",
    ("posterior", "export.notebook"): "Posterior._repr_html_: upward, a convenience of notebooks",
    ("posterior", "models.programs.pyro_program"): "Posterior.pyro_model: upward, and needs torch",
    ("posterior", "models.programs.numpyro_program"): "Posterior.numpyro_model: upward, and needs jax",
    ("analysis.amortisation.amortise", "analysis.amortisation.picture"): "matplotlib, for pictures only",
    ("analysis.amortisation.amortise", "export.pictures"): "matplotlib, for pictures only",
    ("analysis.certificate.certificate", "analysis.certificate.picture"): "matplotlib, for pictures only",
    (
        "analysis.certificate.training_runs.curve",
        "analysis.certificate.training_runs.picture",
    ): "matplotlib, for pictures only",
    ("analysis.certificate.training_runs.findings", "models.torch_lm.adapters"): "peft, for adapters only",
    ("analysis.certificate.training_runs.findings", "models.torch_lm.self_check"): "torch, for adapters only",
    ("analysis.comparison.compare", "analysis.comparison.picture"): "matplotlib, for pictures only",
    ("analysis.comparison.compare", "export.datatree"): "xarray, for exports only",
    ("analysis.comparison.compare", "export.pictures"): "matplotlib, for pictures only",
    ("analysis.comparison.compare", "export.sealed_files"): "xarray, for exports only",
    ("analysis.frontier.frontier", "analysis.frontier.picture"): "matplotlib, for pictures only",
    ("inference.mcmc.diagnostics", "export.installed_arviz"): "ArviZ, for chains only",
    ("inference.svi.fit", "analysis.certificate.quoted"): "Fit.save: upward, to refuse a certificate of something else",
    ("inference.svi.fit", "export.html"): "for notebooks only: files of NumPy alone know no room that presents",
    ("inference.policies", "models.torch_lm.checkpoint"): "torch, for policies in folders only",
    ("inference.policies", "models.torch_lm.lm"): "torch, for policies in folders only",
    ("inference.svi.bayesian.recipe", "inference.svi.bayesian.files"): "torch, for saved fits only",
    ("inference.svi.bayesian.recipe", "inference.svi.bayesian.programs"): "torch, for programs only",
    ("inference.svi.bayesian.recipe", "inference.svi.bayesian.training"): "torch, when it is fitted",
    ("inference.svi.fit", "export.hub"): "huggingface_hub, for publishing only",
    ("inference.svi.fit", "export.model_card"): "files for other tools, written when a guide is saved",
    ("inference.svi.svi", "inference.svi.numpyro_backend.training"): "jax, when a JaxLM is fitted",
    ("inference.svi.svi", "inference.svi.pyro_backend.training"): "torch, when it is fitted",
    ("inference.svi.pyro_backend.over_ranks.spread", "models.torch_lm.adapters"): "transformers, for FSDP only",
    ("inference.svi.pyro_backend.over_ranks.spread", "models.torch_lm.general.blocks"): "transformers, for FSDP only",
    ("inference.svi.pyro_backend.over_ranks.spread", "models.torch_lm.lm"): "transformers, for FSDP only",
    (
        "inference.svi.pyro_backend.training",
        "inference.svi.pyro_backend.natural_gradient.steps",
    ): "transformers, for natural gradients only",
    ("inference.svi.pyro_backend.training", "models.torch_lm.general.blocks"): "transformers, for a refusal only",
    ("inference.twists.learned", "inference.twists.training"): "torch, when it is fitted",
    ("likelihoods.classifiers.reward", "likelihoods.classifiers.network"): "torch, for classifiers only",
    ("models.jax_lm.lm", "models.jax_lm.checkpoint"): "the reader of checkpoints needs transformers",
    ("models.torch_lm", "models.torch_lm.lm"): "transformers, which tables of logits do without",
    ("models.torch_lm.lm", "models.torch_lm.adapter_kinds.trial"): "peft and transformers, for guides only",
    ("models.torch_lm.lm", "models.torch_lm.adapters"): "peft and transformers, for guides only",
    ("models.torch_lm.lm", "models.torch_lm.checkpoint"): "transformers, for models in folders only",
    ("models.torch_lm.lm", "models.torch_lm.sources.unloaded"): "transformers, for plans only",
    ("models.torch_lm.offsets", "models.torch_lm.adapters"): "peft, for adapters only",
    ("models.torch_lm.offsets", "models.torch_lm.lm"): "transformers, unless the policy is a table",
    ("problems.gpt2_tasks", "models.torch_lm.lm"): "torch, for these problems only",
    ("problems.infilling", "models.torch_lm.lm"): "torch, for this problem only",
    ("problems.suite.run", "problems.suite.picture"): "matplotlib, for pictures only",
    ("reward_models.model", "reward_models.numpyro_program"): "numpyro, when it is fitted",
    ("reward_models.posterior", "reward_models.datatree"): "xarray, for exports only",
}
# Every import of ours for type checkers only, {(file, imported): reason}.
FOR_TYPES = {
    (
        "analysis.certificate.training_runs.picture",
        "analysis.certificate.training_runs.curve",
    ): "CertificateCurve.plot draws itself, and the picture says what it takes",
    (
        "draws",
        "posterior",
    ): "Draws are made for a posterior, and Posterior.log_prior takes Draws: the public face is mutual",
    ("posterior", "draws"): "the other half of it",
    ("errors", "draws"): "BudgetError carries the draws that were made",
    ("errors", "inference.svi.fit"): "an error during training carries what was learned",
    ("errors", "reward_models.posterior"): "ConvergenceError carries the draws that did not converge",
    ("likelihoods.classifiers.reward", "likelihoods.classifiers.network"): "the classifier, which is loaded later",
    ("posterior", "models.programs.numpyro_program"): "Posterior.numpyro_model says what it returns",
    ("typing", "draws"): "protocols say what algorithms return, and what they take",
    ("typing", "inference.svi.fit"): "a GuideRecipe returns a Fit",
    ("typing", "posterior"): "algorithms and twists take a posterior",
    ("typing", "sequences"): "language models score completions",
}
# Lazy imports of other packages by the vocabulary, {file: packages}.
LAZY_THIRD_PARTY = {"draws": {"pandas", "xarray"}, "progress": {"rich", "IPython"}}

# Backends are leaves: only these files, and rooms that present or build things, may import a third package at the top.
# All others are NumPy, so that weights, resampling, SMC, enumeration and n-grams work without torch and JAX.
BACKEND = re.compile(
    r"models\.(torch_lm|jax_lm|programs)\b.*|models\.twists\.neural"
    r"|inference\.svi\.((pyro|numpyro)_backend\..*|losses|loss_inputs|bayesian\.(programs|training|files))"
    r"|inference\.twists\.(losses|training)|likelihoods\.classifiers\.network|reward_models\.(numpyro_program|datatree)"
)
PRESENTING = re.compile(r"(export|cli|gallery|problems|analysis)\b.*|__init__")


@dataclass(frozen=True)
class Import:
    """One imported module, as seen in a file: `module` is absolute, `place` is top, lazy or typing."""

    file: str
    line: int
    module: str
    place: str

    @property
    def pair(self) -> tuple[str, str]:
        """(file, module), both below the package."""
        return self.file.removesuffix(".__init__"), self.module.removeprefix("bayes_klrl.")

    def __str__(self) -> str:
        return f"bayes_klrl/{self.file.replace('.', '/')}.py:{self.line} imports {self.module} ({self.place})"


@functools.cache
def files() -> dict[str, Path]:
    """Dotted name below the package of every source file; `__init__` for the package's own."""
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
    if module == "bayes_klrl" and name in homes():
        return homes()[name]
    is_submodule = module.split(".")[0] == "bayes_klrl" and f"{module}.{name}".removeprefix("bayes_klrl.") in files()
    return f"{module}.{name}" if is_submodule else module


def rank(file: str) -> int:
    """How high a file stands: 0 for the vocabulary; the package's own `__init__` stands above all."""
    return max(RANK.values()) + 1 if file == "__init__" else RANK.get(file.split(".")[0], 0)


def is_ours(module: str) -> bool:
    return module.split(".")[0] == "bayes_klrl"


def points_up(imported: Import) -> bool:
    """Whether the target stands higher, or as high in another room (models and export do not know each other)."""
    target = imported.module.removeprefix("bayes_klrl").removeprefix(".")
    if not target:  # the package itself: harmless for its __version__ and the like
        return False
    ours, theirs = rank(imported.file), rank(target)
    return theirs > ours or (theirs == ours > 0 and target.split(".")[0] != imported.file.split(".")[0])


def is_cli(imported: Import) -> bool:
    """Whether an import is one of the command line, which loads late what `--help` does not need."""
    return rank(imported.file) == RANK["cli"]


@functools.cache
def all_imports() -> list[Import]:
    return [
        each for file, path in files().items() for each in imports_of(file, ast.parse(path.read_text(encoding="utf-8")))
    ]


def report(wrong: list[Import]) -> str:
    return "\n".join(map(str, wrong))


def is_no_link(link: Path) -> bool:
    """Whether the link is absent (an sdist) or a text file with its target (Windows, zip downloads)."""
    return not link.is_symlink()


@pytest.mark.parametrize("name", ["models", "inference"])
def test_root_links_lead_into_the_package(name: str) -> None:
    link = ROOT / name
    if is_no_link(link):
        assert not link.exists() or link.read_text(encoding="utf-8").strip() == f"bayes_klrl/{name}"
        pytest.skip(f"{name} is no link here: an sdist, a zip download, or Windows")
    assert link.readlink() == Path("bayes_klrl") / name
    assert (link / "__init__.py").is_file()


def test_root_links_cannot_be_imported(tmp_cwd: Path) -> None:
    code = "from importlib.util import find_spec; import bayes_klrl; print(find_spec('models'), find_spec('inference'))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["None", "None"]


def folders() -> list[Path]:
    """The package and every folder of code in it."""
    return [PACKAGE, *sorted(path.parent for path in PACKAGE.rglob("*/__init__.py"))]


@pytest.mark.parametrize("folder", folders(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_room_is_small_and_says_what_lives_there(folder: Path) -> None:
    """At most twelve files (sixteen in the package itself, beside its empty `py.typed`), each named in its `__init__`."""
    inside = [path for path in folder.iterdir() if path.is_file() and path.suffix in {".py", ".pyi"}]
    assert len(inside) <= (16 if folder == PACKAGE else 12)
    doc = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    if folder != PACKAGE:
        named = {name.split(".")[0] for name in re.findall(r"`([\w.]+)`", doc)}
        here = {path.stem for path in inside if not path.stem.startswith("__")}
        here |= {path.name for path in folder.iterdir() if (path / "__init__.py").is_file()}
        assert here <= named, f"{folder}/__init__.py does not say what these are: {sorted(here - named)}"
        assert "Read `" in doc


@pytest.mark.slow
def test_imports_at_the_top_never_point_up() -> None:
    wrong = [each for each in all_imports() if each.place == "top" and is_ours(each.module) and points_up(each)]
    assert not wrong, report(wrong)


@pytest.mark.slow
def test_lazy_imports_are_listed_with_their_reason() -> None:
    found = {each.pair for each in all_imports() if each.place == "lazy" and is_ours(each.module) and not is_cli(each)}
    assert found - {(file, "bayes_klrl") for file, _ in found} == set(LAZY)


def test_imports_for_types_are_listed_with_their_reason() -> None:
    found = {
        each.pair for each in all_imports() if each.place == "typing" and is_ours(each.module) and not is_cli(each)
    }
    assert found == set(FOR_TYPES)


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """The groups of two and more files that reach one another, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(arrows.get(node, ())):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(arrows):
        if node not in index:
            visit(node)
    return found


def arrows_of(imports: list[Import]) -> dict[str, set[str]]:
    """{file: files that it imports}, downward and within a room; upward conveniences are listed apart."""
    arrows: dict[str, set[str]] = {}
    for each in imports:
        if is_ours(each.module) and each.place != "typing" and not points_up(each):
            file, target = each.pair
            arrows.setdefault(file, set()).add(target)
    return arrows


def test_no_circle_of_imports() -> None:
    """Lazy imports included: a file that needs another one inside a function needs it all the same."""
    assert not circles(arrows_of(all_imports()))


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == [["b", "c"]]
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}}) == []


def is_numpy_only(file: str) -> bool:
    return not PRESENTING.fullmatch(file) and not BACKEND.fullmatch(file)


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
        if each.file.split(".")[0] in VOCABULARY | ROOMS_OF_THE_VOCABULARY
        and each.place != "typing"
        and (package := each.module.split(".")[0]) not in free
        and package not in LAZY_THIRD_PARTY.get(each.file, set())
    ]
    assert not wrong, report(wrong)


def test_the_vocabulary_is_what_lies_at_the_root() -> None:
    assert {file for file in files() if "." not in file} == VOCABULARY | {"__init__"}


def test_no_file_shadows_a_package_or_a_public_function() -> None:
    """Run from its own folder, a file named like a library would be imported in its place; `bayes_klrl.x` is a name."""
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
    names = {path.stem for path in files().values()} | {path.name for path in folders()}
    assert not packages & names
    assert not set(bayes_klrl.__all__) & {path.stem for path in PACKAGE.iterdir()}


def test_the_import_reader_sees_what_it_should() -> None:
    """The reader on a file with one import of each kind."""
    source = """
import torch
from bayes_klrl import SMC
from bayes_klrl.export import datatree
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
    assert seen == {
        ("torch", "top"),
        ("bayes_klrl.inference.smc.smc", "top"),
        ("bayes_klrl.export.datatree", "top"),
        ("typing_only", "typing"),
        ("optional", "top"),
        ("in_class", "top"),
        ("lazy", "lazy"),
    }
    assert is_numpy_only("inference.svi.svi")
    assert not is_numpy_only("inference.svi.pyro_backend.training")
    assert not is_numpy_only("models.torch_lm.lm")
    assert points_up(Import("draws", 1, "bayes_klrl.inference.smc.smc", "top"))
    assert points_up(Import("models.torch_lm.lm", 1, "bayes_klrl.inference", "top"))
    assert points_up(Import("inference.smc.smc", 1, "bayes_klrl.problems.gold", "lazy"))
    assert points_up(Import("models.mixture", 1, "bayes_klrl.export.datatree", "lazy"))
    assert not points_up(Import("cli.compare", 1, "bayes_klrl.inference.smc.smc", "top"))
    assert not points_up(Import("draws", 1, "bayes_klrl.sequences", "top"))
