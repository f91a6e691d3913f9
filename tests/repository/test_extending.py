"""docs/extending.md does what it says, in a folder outside the package.

A Python block that begins with a file name is written there as that file; the others run in order, sharing their names; a
block fenced "```text output" is what the block before it printed; `bayes-klrl` lines are run. The algorithm, the models and
the likelihood of the page are then compared with truths that the page does not use.
"""

import csv
import dataclasses
import doctest
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
from scipy.special import gammaln
from typer.testing import CliRunner

import bayes_klrl as bk
from bayes_klrl.cli import app
from tests.helpers.truth import Truth, chi_square_p, counts, random_posterior, z_score
from tests.repository.test_readme import FENCE, Block

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "extending.md"
NAMED = re.compile(r"# (\w+\.py)\n")
MODULES = ("antithetic", "echo", "served", "urn")


def blocks() -> list[Block]:
    text = PAGE.read_text(encoding="utf-8")
    return [
        Block(match["info"].strip(), match["body"], text.count("\n", 0, match.start("body")) + 1)
        for match in FENCE.finditer(text)
    ]


def name_of(block: Block) -> str | None:
    """The file that a block is, if it is one."""
    named = NAMED.match(block.body)
    return named[1] if block.info == "python" and named else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The files of the page, where Python finds them."""
    where = tmp_path_factory.mktemp("extending")
    assert ROOT not in where.parents
    for block in blocks():
        name = name_of(block)
        if name is not None:
            (where / name).write_text(block.body, encoding="utf-8")
    sys.path.insert(0, str(where))
    yield where
    sys.path.remove(str(where))
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def mine(folder: Path) -> Any:
    """The modules of the page, by name."""
    return SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})


def urn_posterior(mine: Any, **options: Any) -> bk.Posterior:
    return bk.Posterior(mine.urn.UrnLM("abc"), mine.echo.Echo(alpha=0.5), **{"max_new_tokens": 4, **options})


def test_the_page_has_its_parts() -> None:
    assert {name for block in blocks() if (name := name_of(block))} == {
        *(f"{m}.py" for m in MODULES),
        "my_posterior.py",
    }
    assert {block.info for block in blocks()} == {"python", "bash", "text output"}


@pytest.mark.slow
def test_blocks_run_and_print_what_they_say(
    folder: Path, tmp_cwd: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names: dict[str, Any] = {"__name__": "extending"}
    printed = ""
    for block in blocks():
        if block.info == "python" and name_of(block) is None:
            source = "\n" * (block.line - 1) + block.body  # so that a traceback names the line of the page
            capsys.readouterr()
            exec(compile(source, str(PAGE), "exec"), names)
            printed = capsys.readouterr().out
        elif block.info == "text output":
            assert printed.splitlines() == block.body.splitlines(), f"docs/extending.md:{block.line}"
    assert (tmp_cwd / "acceptance.png").read_bytes().startswith(b"\x89PNG")


def evidences(table: Path) -> dict[str, float]:
    """{method: log evidence} of a table.csv."""
    with table.open(encoding="utf-8") as file:
        return {row["method"]: float(row["log_evidence"] or "nan") for row in csv.DictReader(file)}


@pytest.mark.slow
def test_command_lines_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, but without `folder` among the places where Python finds modules: the command line adds it."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(folder)])
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    lines = [line for block in blocks() if block.info == "bash" for line in block.body.splitlines()]
    tables = []
    for line in lines:
        program, *arguments = shlex.split(line, comments=True)
        assert program == "bayes-klrl"
        run = CliRunner().invoke(app, [*arguments, "--quiet"])
        assert run.exit_code == 0, run.output
        assert (folder / "my-results" / "draws.nc").is_file()
        tables.append(evidences(folder / "my-results" / "table.csv"))
    assert [set(table) for table in tables] == [{"antithetic", "exact"}, {"exact", "SuffixMH(4, 200)"}]
    assert abs(tables[0]["antithetic"] - tables[0]["exact"]) < 0.2


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(mine: Any, name: str) -> None:
    module: ModuleType = getattr(mine, name)
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted > 0 or name == "served"


@pytest.mark.parametrize("name", MODULES)
def test_every_public_object_is_documented_and_listed(mine: Any, name: str) -> None:
    module = getattr(mine, name)
    assert (module.__doc__ or "").strip()
    for public in module.__all__:
        assert (getattr(module, public).__doc__ or "").strip()


def test_the_files_are_as_ours_are(folder: Path) -> None:
    """By ruff, with the settings of the package."""
    files = [str(folder / f"{name}.py") for name in MODULES]
    for task in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *task, "--config", str(ROOT / "pyproject.toml"), *files]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout


@pytest.mark.slow
def test_type_checkers_see_the_protocols(folder: Path) -> None:
    """The files, and that their classes fit where the package wants an algorithm, a model, a likelihood."""
    (folder / "fits.py").write_text(
        "import bayes_klrl as bk\n"
        "from antithetic import AntitheticSampling\nfrom echo import Echo\nfrom served import ServedLM\n"
        "from urn import UrnLM\n\n"
        "algorithm: bk.Algorithm = AntitheticSampling(1)\nlikelihood: bk.Likelihood = Echo(alpha=1.0)\n"
        "models: list[bk.LanguageModel] = [UrnLM('ab'), ServedLM(lambda ids: ids, vocab_size=3, eos_token_id=2)]\n"
    )
    config = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    files = [str(folder / f"{name}.py") for name in (*MODULES, "fits")]
    command = [sys.executable, "-m", "mypy", *config, *files]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    wrong = [line for line in run.stdout.splitlines() if str(folder) in line or folder.name in line]
    assert not wrong, run.stdout
    assert "5 source files" in run.stdout, run.stdout + run.stderr


def is_there(path: str) -> bool:
    """Whether a path leads somewhere, or a bare file name is that of some file of the package."""
    places = [ROOT / path, ROOT / "bayes_klrl" / path]
    return any(place.exists() for place in places) or ("/" not in path and any((ROOT / "bayes_klrl").rglob(path)))


@pytest.mark.parametrize("page", [PAGE, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_the_files_and_folders_that_a_page_names_are_there(page: Path) -> None:
    """Paths are from the root of the repository or from that of the package; what `make` builds is not looked for."""
    named = set(re.findall(r"`([\w.]+/[\w./]*|[\w]+\.py)`", page.read_text(encoding="utf-8")))
    mine = {f"{name}.py" for name in (*MODULES, "my_posterior")}
    missing = [path for path in named - mine if not is_there(path)]
    assert named
    assert not missing


# Into the package


@pytest.mark.slow
def test_one_file_and_one_line_make_it_part_of_the_package(folder: Path, tmp_path: Path) -> None:
    """In a copy of the package: the public name is there, and the command line takes it."""
    copy = tmp_path / "bayes_klrl"
    shutil.copytree(ROOT / "bayes_klrl", copy, ignore=shutil.ignore_patterns("__pycache__", "shipped"))
    shutil.copy(folder / "antithetic.py", copy / "inference" / "sampling")
    (line,) = re.findall(
        r"^ {4}(from \.inference\.sampling\.antithetic .*\n)", PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
    stub = copy / "__init__.pyi"
    stub.write_text(line + stub.read_text(encoding="utf-8"), encoding="utf-8")
    file = (folder / "my_posterior.py").read_text(encoding="utf-8")
    (tmp_path / "posterior.py").write_text(file.replace("from antithetic import", "from bayes_klrl import"))
    command = [sys.executable, "-m", "bayes_klrl.cli", "compare", "posterior.py", "--quiet", "--out", "results"]
    command += ["--method", "AntitheticSampling(500)", "--method", "exact"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    rows = evidences(tmp_path / "results" / "table.csv")
    assert set(rows) == {"AntitheticSampling(500)", "exact"}
    assert abs(rows["AntitheticSampling(500)"] - rows["exact"]) < 0.2


# The algorithm


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_antithetic_evidence_is_unbiased(mine: Any, seed: int) -> None:
    posterior = random_posterior(seed, prompts=[(0,), (1, 2)])
    truth = Truth(posterior)
    algorithm = mine.antithetic.AntitheticSampling(6)
    runs = np.array([algorithm.run(posterior, seed=1000 * seed + run).log_evidence for run in range(400)])
    for p in range(2):
        assert abs(z_score(np.exp(runs[:, p]), float(np.exp(truth.log_evidence[p])))) < 4


def test_both_halves_of_a_pair_have_the_law_of_the_prior(mine: Any) -> None:
    posterior = random_posterior(7, num_tokens=4)
    truth = Truth(posterior)
    draws = mine.antithetic.AntitheticSampling(4000).run(posterior, seed=0)
    prior = np.exp(truth.log_prior[0])
    for half in (0, 1):
        assert chi_square_p(counts(truth, draws.tokens[0, half::2]), prior) > 1e-3


@pytest.mark.slow
def test_the_standard_error_is_that_of_pairs(mine: Any) -> None:
    """Against the spread of many runs, where pairs help and where they do not."""
    posterior = random_posterior(3, alpha=1.0)
    truth = Truth(posterior)
    runs = [mine.antithetic.AntitheticSampling(100).run(posterior, seed=seed) for seed in range(400)]
    spread = np.std([np.exp(draws.log_evidence - truth.log_evidence) for draws in runs], ddof=1)
    claimed = np.sqrt(np.mean([draws.log_evidence_se**2 for draws in runs]))
    assert claimed == pytest.approx(spread, rel=0.15)  # the error of a standard deviation of 400 is 3.5 %


@pytest.mark.slow
def test_pairs_pay_where_the_reward_grows_with_the_token_ids(mine: Any) -> None:
    prior = bk.NgramLM(np.log(np.full(5, 0.2)), eos_token_id=None)
    growing = bk.TokenReward(lambda tokens, lengths: tokens.sum(axis=1), alpha=8.0)
    posterior = bk.Posterior(prior, growing, max_new_tokens=4)

    def variance(algorithm: bk.Algorithm) -> float:
        return float(np.var([np.exp(algorithm.run(posterior, seed=seed).log_evidence[0]) for seed in range(300)]))

    pairs, independent = mine.antithetic.AntitheticSampling(16), bk.ImportanceSampling(32)
    assert variance(pairs) < 0.3 * variance(independent)


def test_antithetic_keeps_the_rules_of_algorithms(mine: Any) -> None:
    algorithm = mine.antithetic.AntitheticSampling(20)
    assert isinstance(algorithm, bk.Algorithm)
    assert dataclasses.is_dataclass(algorithm)
    with pytest.raises(dataclasses.FrozenInstanceError):
        algorithm.num_pairs = 3
    with pytest.raises(bk.BayesKLRLError, match="num_pairs must be an integer of at least 1"):
        mine.antithetic.AntitheticSampling(0)
    posterior = random_posterior(0, prompts=[(0,), (1,)])
    few, again = algorithm.run(posterior, seed=1), algorithm.run(posterior, seed=1)
    many = mine.antithetic.AntitheticSampling(300).run(posterior, seed=1)
    np.testing.assert_array_equal(few.tokens, again.tokens)
    np.testing.assert_array_equal(few.tokens, many.tokens[:, :40])
    np.testing.assert_array_equal(few.log_prior, posterior.log_prior(few))
    never = bk.TokenReward(lambda tokens, lengths: lengths * -np.inf, alpha=1.0)
    impossible = bk.Posterior(posterior.prior, never, max_new_tokens=2)
    with pytest.raises(bk.BudgetError) as caught:
        algorithm.run(impossible, seed=0)
    assert caught.value.draws is not None


@pytest.mark.slow
def test_compare_and_files_take_the_algorithm(mine: Any, tmp_path: Path) -> None:
    posterior = urn_posterior(mine, prompts=["ab", "c"])
    algorithms = {"antithetic": mine.antithetic.AntitheticSampling(2000), "exact": bk.Exact()}
    result = bk.compare(posterior, algorithms, seed=0, repeats=2)
    table = result.table()
    off = table.loc["antithetic", "log_evidence"] - table.loc["exact", "log_evidence"]
    assert abs(off) < 4 * table.loc["antithetic", "log_evidence_se"]
    tree = result.to_arviz()
    assert {"antithetic", "exact"} <= set(tree.children)
    saved = result["antithetic"].save(tmp_path / "draws.nc")
    np.testing.assert_array_equal(bk.Draws.load(saved).log_weights, result["antithetic"].log_weights)


# The language models


def log_prob_of_urn(weight: float, prompt: list[int], x: list[int], vocab_size: int) -> float:
    """log p(x | prompt) of a Polya urn in closed form: the Dirichlet-multinomial law of an ordered sequence."""
    before, after = (
        weight + np.bincount(np.array(ids, dtype=np.int64), minlength=vocab_size) for ids in (prompt, prompt + x)
    )
    return float((gammaln(after) - gammaln(before)).sum() - gammaln(after.sum()) + gammaln(before.sum()))


@pytest.mark.parametrize("weight", [0.3, 2.0])
def test_the_urn_is_its_closed_form_and_sums_to_one(mine: Any, weight: float) -> None:
    urn = mine.urn.UrnLM("ab", weight=weight)
    plain = bk.TokenReward(lambda tokens, lengths: 0.0 * lengths, alpha=1.0)
    posterior = bk.Posterior(urn, plain, prompts=["aab", ""], max_new_tokens=5)
    truth = Truth(posterior)
    for p, prompt in enumerate([[0, 0, 1], []]):
        expected = [log_prob_of_urn(weight, prompt, x, 3) for x in truth.xs]
        np.testing.assert_allclose(truth.log_prior[p], expected, atol=1e-12)
    np.testing.assert_allclose(np.exp(truth.log_prior).sum(axis=1), 1.0, atol=1e-12)
    bk.check_posterior(posterior).raise_if_broken()


def test_certificates_and_frontiers_take_the_urn(mine: Any) -> None:
    posterior = urn_posterior(mine, prompts=["ab", "c"])
    truth = Truth(posterior)
    policy = mine.urn.UrnLM("abc", weight=0.5)
    certificate = bk.certify(posterior, policy, seed=0)
    assert certificate.grade == "A"
    np.testing.assert_allclose(certificate.reverse_kl, np.repeat(truth.kl(policy)[:, None], 2, axis=1), atol=1e-6)
    curve = bk.frontier(posterior, num_draws=2000, seed=0)
    assert np.isfinite(curve.log_evidence).all()


def test_draws_of_the_urn_have_its_law(mine: Any) -> None:
    posterior = urn_posterior(mine, prompts=["ab"])
    truth = Truth(posterior)
    drawn = bk.ImportanceSampling(4000).run(posterior, seed=0)
    assert chi_square_p(counts(truth, drawn.tokens[0]), np.exp(truth.log_prior[0])) > 1e-3


def test_the_check_finds_a_broken_urn(mine: Any) -> None:
    """The promises of the page, broken one at a time."""

    class GrowsInPlace(mine.urn.UrnLM):
        def append(self, state: np.ndarray, tokens: np.ndarray) -> np.ndarray:
            state[np.arange(len(tokens)), tokens] += 1.0
            return state

    class ForgetsEOS(mine.urn.UrnLM):
        def token_log_probs(self, prompts: Any, sequences: bk.Sequences) -> np.ndarray:
            return np.where(sequences.tokens == 3, 0.0, super().token_log_probs(prompts, sequences))

    class TopTwo(mine.urn.UrnLM):
        def next_log_probs(self, state: np.ndarray) -> np.ndarray:
            log_probs = super().next_log_probs(state)
            return np.where(log_probs < np.sort(log_probs)[:, -2:-1], -np.inf, log_probs)

    for broken, promise in (
        (GrowsInPlace, "a state is unchanged by append"),
        (ForgetsEOS, "sampler and scorer agree"),
        (TopTwo, "probabilities sum to 1"),
    ):
        posterior = bk.Posterior(broken("abc"), mine.echo.Echo(alpha=1.0), prompts=["ab"], max_new_tokens=4)
        with np.errstate(invalid="ignore"):
            report = bk.check_posterior(posterior)
        assert [check for check in report.checks if promise in check.promise and not check.kept], report


def test_a_served_model_is_the_model_behind_it(mine: Any) -> None:
    """Over HTTP: the same draws to the bit, and no prefix asked for twice in one request."""
    urn = mine.urn.UrnLM("abc")
    asked: list[list[list[int]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            ids = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(ids)
            body = json.dumps(urn.next_log_probs(urn.prefill(ids)).tolist()).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (the base class names it so)
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"

        def ask(ids: list[list[int]]) -> Any:
            with urlopen(url, data=json.dumps(ids).encode(), timeout=30) as answer:
                return json.load(answer)

        tokenizer = SimpleNamespace(encode=lambda text: urn.encode([text])[0], decode=lambda ids: urn.decode([ids])[0])
        served = mine.served.ServedLM(ask, tokenizer=tokenizer, vocab_size=4, eos_token_id=3)
        here, there = (
            bk.Posterior(lm, mine.echo.Echo(alpha=0.5), prompts=["ab", "c"], max_new_tokens=4) for lm in (urn, served)
        )
        for algorithm in (bk.ImportanceSampling(50), bk.SMC(50)):
            asked.clear()
            drawn, expected = algorithm.run(there, seed=0), algorithm.run(here, seed=0)
            np.testing.assert_array_equal(drawn.tokens, expected.tokens)
            np.testing.assert_array_equal(drawn.log_weights, expected.log_weights)
            assert drawn.texts() == expected.texts()
            if isinstance(algorithm, bk.ImportanceSampling):
                assert all(len(set(map(tuple, ids))) == len(ids) for ids in asked)
        np.testing.assert_array_equal(there.log_prior(expected), here.log_prior(expected))
        bk.check_posterior(there).raise_if_broken()
        server.shutdown()


# The likelihood


def test_echo_by_hand(mine: Any) -> None:
    """Both ways against sets, for prompts of text and of ids, tempered and in a product."""
    urn = mine.urn.UrnLM("abc")
    texts = bk.Posterior(urn, mine.echo.Echo(alpha=0.5), prompts=["ab", "c"], max_new_tokens=4)
    ids = bk.Posterior(urn, mine.echo.Echo(alpha=0.5), prompts=[[0, 1], [2]], max_new_tokens=4)
    function = bk.Reward(mine.echo.EchoOfCharacters(ignored="b"), alpha=0.5)
    ignoring = bk.Posterior(urn, function, prompts=["ab", "c"], max_new_tokens=4)
    truth = Truth(texts)
    for p, prompt in enumerate([{0, 1}, {2}]):
        expected = [sum(token in prompt for token in x) for x in truth.xs]
        np.testing.assert_array_equal(truth.reward[p], expected)
        np.testing.assert_array_equal(Truth(ids).reward[p], expected)
        np.testing.assert_array_equal(
            Truth(ignoring).reward[p], [sum(token in prompt - {1} for token in x) for x in truth.xs]
        )
    longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=0.5, bounds=(1, 4))
    both = bk.Posterior(urn, mine.echo.Echo(alpha=1.0) ** 2.0 * longer, prompts=["ab", "c"], max_new_tokens=4)
    assert both.alpha == 0.5
    assert both.likelihood.bounds == (1.0, 8.0)
    np.testing.assert_array_equal(Truth(both).reward, truth.reward + truth.sequences.lengths)


def test_echo_counts_no_padding(mine: Any) -> None:
    """A prompt that holds EOS, which also pads: only an EOS that was drawn counts."""
    prior = bk.NgramLM(np.log(np.full(3, 1 / 3)), eos_token_id=2)
    posterior = bk.Posterior(prior, mine.echo.Echo(alpha=1.0), prompts=[[2, 0]], max_new_tokens=3)
    truth = Truth(posterior)
    np.testing.assert_array_equal(truth.reward[0], [sum(token in {0, 2} for token in x) for x in truth.xs])
    bk.check_posterior(posterior).raise_if_broken()


def test_echo_meets_its_exact_posterior(mine: Any) -> None:
    """By rejection, which needs its bounds, and by the toy algorithm."""
    posterior = urn_posterior(mine, prompts=["ab", "c"])
    truth = Truth(posterior)
    accepted = bk.RejectionSampling(2000).run(posterior, seed=0)
    for p in range(2):
        assert chi_square_p(counts(Truth(posterior), accepted.tokens[p]), truth.p[p]) > 1e-3
    draws = mine.antithetic.AntitheticSampling(4000).run(posterior, seed=0)
    assert (np.abs(draws.log_evidence - truth.log_evidence) < 4 * draws.log_evidence_se).all()
    np.testing.assert_allclose(draws.mean(draws.reward), (truth.p * truth.reward).sum(axis=1), atol=0.15)


def test_echo_refuses_what_it_cannot_be(mine: Any) -> None:
    with pytest.raises(bk.BayesKLRLError, match="alpha must be a positive finite number"):
        mine.echo.Echo(alpha=0.0)
    assert mine.echo.Echo(alpha=1.0).label == "echo"
    assert mine.echo.Echo(alpha=1.0, name="loyal").label == "loyal"
