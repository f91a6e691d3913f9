"""The benchmark of peers: its map, its truths, its table, that it goes on where it stopped, and our own peer's process."""

from __future__ import annotations

import doctest
import importlib
import itertools
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from tests.helpers.truth import Truth

ROOT = Path(__file__).parents[2]
# As a package of its own: the root, with its links, must not come onto sys.path.
if "benchmarks" not in sys.modules:
    package = types.ModuleType("benchmarks")
    package.__path__ = [str(ROOT / "benchmarks")]
    sys.modules["benchmarks"] = package
peer_map, measure, models, report, run, truth = (
    importlib.import_module(f"benchmarks.peers.{name}")
    for name in ("map", "measure", "models", "report", "run", "truth")
)
EVIDENCE = peer_map.Cell("evidence", 8, task="constraint")
OURS = peer_map.rows(EVIDENCE)[2]


@pytest.mark.parametrize("module", [peer_map, measure, models, report], ids=lambda module: module.__name__)
def test_the_examples_in_docstrings_hold(module: types.ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_the_map_has_every_size_once() -> None:
    full = peer_map.cells(full=True)
    assert len({cell.name for cell in full}) == len(full)
    assert {cell.name for cell in peer_map.cells()} <= {cell.name for cell in full}
    sampling = {
        (cell.shape, cell.vocab_size, cell.num, cell.tokens, cell.prompt_length, cell.num_prompts)
        for cell in full
        if cell.kind == "sampling"
    }
    for shape, vocabulary in (("4x128", 2000), ("12x256", 150_000), ("gpt2", 50_257), ("smollm2", 49_152)):
        for sizes in itertools.product((64, 256, 1024), (32, 128, 512), (8, 256), (1, 32)):
            assert (shape, vocabulary, *sizes) in sampling


def test_every_row_has_a_module_and_ours_comes_first() -> None:
    """Ratios of the table are to the first row."""
    for cell in peer_map.cells(full=True):
        found = peer_map.rows(cell)
        assert found[0].peer == "bayes_klrl"
        assert len({row.name for row in found}) == len(found)
        for row in found:
            assert (ROOT / "benchmarks" / "peers" / f"{row.module}.py").is_file()
    everyone = {row.peer for cell in peer_map.cells() for row in peer_map.rows(cell)}
    assert everyone == {"bayes_klrl", "transformers", "llamppl", "genlm-control", "TRL", "disco"}


@pytest.fixture(scope="module")
def reward() -> Truth:
    return Truth(truth.task("gpt2-8x4"))


def test_log_evidence_and_rewards_are_those_of_another_enumeration(reward: Truth) -> None:
    assert np.isclose(truth.log_evidence("gpt2-8x4"), reward.log_evidence[0], atol=1e-6)
    table = truth.look_up("gpt2-8x4")
    assert len(table) == len(reward.xs)
    found = [table[models.as_text(x)] for x in reward.xs]
    assert np.allclose(found, reward.reward[0] / reward.posterior.alpha)


def test_the_constraint_forbids_two_tokens() -> None:
    posterior, table = truth.task("constraint"), truth.look_up("constraint")
    allowed = {x for x, value in table.items() if value == 0}
    assert allowed == {x for x in table if not {str(token) for token in truth.FORBIDDEN} & set(x.split())}
    assert all(value == -np.inf for x, value in table.items() if x not in allowed)
    log_prior = bk.ImportanceSampling(4000).run(posterior, seed=0)
    error = np.exp(log_prior.log_evidence[0]) - np.exp(truth.log_evidence("constraint"))
    assert abs(error) < 4 * 0.25 / np.sqrt(4000)
    prefixes = np.array([[0, 1], [0, truth.FORBIDDEN[0]], [truth.FORBIDDEN[1], 0]])
    assert truth.forbidden_twist(posterior, np.zeros(3, dtype=int), prefixes).tolist() == [0, -np.inf, -np.inf]


def test_distances_of_a_folder(reward: Truth, tmp_path: Path) -> None:
    """Of the prior itself, whose KLs another enumeration knows."""
    folder = models.write_task(reward.posterior, tmp_path / "model")
    reverse, forward = truth.distances("gpt2-8x4", folder)
    assert np.isclose(reverse, reward.kl(reward.posterior.prior)[0], atol=1e-5)
    assert np.isclose(forward, (reward.p * (reward.log_posterior - reward.log_prior)).sum(), atol=1e-5)
    tokenizer = bk.TorchLM.from_pretrained(folder).tokenizer
    prompt = list(reward.posterior.prompt_ids[0])
    assert tokenizer.encode(models.as_text(prompt)) == prompt  # what text peers are given


def evidences(*values: float) -> dict[str, Any]:
    runs = [{"cpu": 0.5, "wall": 1.0, "tokens": 10, "log_evidence": value} for value in values]
    return {"runs": runs, "peak_mib": 120.0, "loaded_mib": 100.0, "log_evidence": 0.0}


def test_the_table_says_who_failed_and_who_is_biased() -> None:
    found = {
        "evidence-constraint-N8": {
            "ours: SMC": report.summary([evidences(0.1, -0.1), evidences(0.2, -0.3)]),
            "theirs: SMC": report.summary([{**evidences(1.0, 1.01, 0.99), "peak_mib": 150.0}]),
            "other: SMC": report.summary([{"note": "ModuleNotFoundError: No module named 'other'"}]),
        },
        "sampling-x": {"ours: draws": report.summary([{**evidences(0.0), "log_evidence": 0.0}])},
        "tuning-x": {"ours: SVI": report.summary([{**evidences(0.0), "kl": [[0.25, 0.5]]}])},
    }
    assert report.table(found).splitlines()[2:] == [
        "| evidence-constraint-N8 | ours: SMC | 4 | 0.5 | 1.00 | 1 | 120 (20) | Ẑ/Z 0.993 ± 0.107, sd 0.213 |",
        "| evidence-constraint-N8 | theirs: SMC | 3 | 0.5 | 1.00 | 1 | 150 (50) | Ẑ/Z 2.718 ± 0.016, sd 0.027 **biased** |",
        "| evidence-constraint-N8 | other: SMC | - | - | - | - | - | ModuleNotFoundError: No module named 'other' |",
        "| sampling-x | ours: draws | 1 | 0.5 | 1.00 | 1 | 120 (20) | Ẑ/Z 1.000 ± 0.000, sd 0.000 |",
        "| tuning-x | ours: SVI | 1 | 0.5 | 1.00 | 1 | 120 (20) | KL(q‖p\\*) 0.250, KL(p\\*‖q) 0.500 |",
    ]


def test_the_picture_takes_panels_without_results(tmp_path: Path) -> None:
    found = {
        "evidence-constraint-N8": {
            "bayes_klrl: SMC": report.summary([evidences(0.1, -0.1)]),
            "llamppl: smc_steer": {"note": "refused"},
        },
        "tuning-gpt2-8x4-N8-S2": {"disco: DPG at 2e-3": {"note": "not installed"}},
    }
    report.plot(found, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").stat().st_size > 10_000


def test_it_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in the second round; a row that failed is not tried again, and what is done is not run anew."""
    asked: list[tuple[str, int]] = []

    def fake(row: Any, job: Any, out: Path, *, repetitions: int, first_seed: int, limit: float) -> dict[str, Any]:
        if len(asked) == 7 and stops:
            raise KeyboardInterrupt
        asked.append((row.method, first_seed))
        return {"note": "refused"} if row.method == "smc_steer" else {**evidences(0.0, 0.1), "versions": {"x": "1"}}

    monkeypatch.setattr(run, "run_process", fake)
    monkeypatch.setattr(run, "job_of", lambda cell, row, out: {})
    monkeypatch.setattr(report, "plot", lambda found, path: path.write_text(", ".join(found)))
    stops = True
    arguments = ["--cell", "evidence-constraint-N64", "--out", str(tmp_path), "--repetitions", "2", "--rounds", "2"]
    run.main(arguments)
    assert [method for method, _ in asked[:6]] == ["IS", "SMC", "SMC, twisted", "smc_standard", "smc_steer", "AWRS"]
    stops = False
    run.main(arguments)
    assert asked[6:] == [(method, 3) for method in ("IS", "SMC", "SMC, twisted", "smc_standard", "AWRS")]
    written = json.loads((tmp_path / "peers.json").read_text())
    rows = written["cells"]["evidence-constraint-N64"]
    assert rows["bayes_klrl: SMC"]["num_runs"] == 4
    assert rows["llamppl: smc_steer"] == {"note": "refused"}
    assert written["versions"] == {"x": "1"}
    assert (tmp_path / "peers.png").read_text() == "evidence-constraint-N64"
    assert "Versions: x 1." in (tmp_path / "peers.md").read_text()


def test_a_cell_that_does_not_fit_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_free_gib", lambda: 1.0)
    monkeypatch.setattr(run, "run_process", lambda *_, **__: pytest.fail("it was run"))
    cell = peer_map.Cell("sampling", 1024, 512, "gpt2", 50_257)
    run.run_cells([cell], tmp_path, rounds=1, repetitions=1, limit=1.0)
    found, _ = run.collect([cell], tmp_path)
    assert found[cell.name]["transformers: generate"]["note"].startswith("needs about 38.1 GiB, 1.0 are free")


def test_an_unknown_cell_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--cell", "nothing"])
    assert "there is no cell 'nothing'" in capsys.readouterr().err


def test_a_process_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = peer_map.Row("nobody", "nobody_peer", "SMC")
    found = run.run_process(nobody, {"kind": "sampling"}, tmp_path, repetitions=1, first_seed=1, limit=60.0)
    assert "No module named benchmarks.peers.nobody_peer" in found["note"]
    monkeypatch.setattr(run, "DISCO", tmp_path / "nothing")
    disco = peer_map.rows(peer_map.Cell("tuning", 8, task="gpt2-8x4", steps=2))[-1]
    found = run.run_process(disco, {"kind": "tuning"}, tmp_path, repetitions=1, first_seed=1, limit=60.0)
    assert found == {"note": run.NO_DISCO}
    found = run.run_process(OURS, {"kind": "evidence"}, tmp_path, repetitions=1, first_seed=1, limit=0.01)
    assert found == {"note": "not finished after 0 s"}


@pytest.mark.slow
def test_our_own_process(tmp_path: Path) -> None:
    """It finds what a run here finds."""
    job = run.job_of(EVIDENCE, OURS, tmp_path)
    found = run.run_process(OURS, job, tmp_path, repetitions=2, first_seed=5, limit=300.0)
    assert "note" not in found, found
    assert [each["seed"] for each in found["runs"]] == [5, 6]
    assert all(each["cpu"] > 0 and each["wall"] > 0 for each in found["runs"])
    assert found["peak_mib"] >= found["loaded_mib"]
    assert found["versions"]["torch"]
    algorithm = bk.SMC(8, proposal="twisted", twist=truth.forbidden_twist)
    expected = [algorithm.run(truth.task("constraint"), seed=seed).log_evidence[0] for seed in (5, 6)]
    assert np.allclose([each["log_evidence"] for each in found["runs"]], expected)
    assert found["log_evidence"] == truth.log_evidence("constraint")


def test_draws_of_two_prompts_are_counted(tmp_path: Path) -> None:
    """3 completions of 5 tokens for each of 2 prompts, by this package and by `generate`."""
    cell = peer_map.Cell("sampling", 3, 5, "4x128", 100, num_prompts=2)
    for row in peer_map.rows(cell)[:2]:
        peer = importlib.import_module(f"benchmarks.peers.{row.module}")
        found = measure.measured(peer.prepared(run.job_of(cell, row, tmp_path)), repetitions=2, first_seed=1)
        assert [each["tokens"] for each in found["runs"]] == [30, 30]


@pytest.mark.slow
def test_a_trained_policy_is_left_in_a_folder(tmp_path: Path) -> None:
    cell = peer_map.Cell("tuning", 8, task="gpt2-8x4", steps=2)
    job = run.job_of(cell, peer_map.rows(cell)[0], tmp_path)
    answer = importlib.import_module("benchmarks.peers.ours").prepared(job)(1, measure.Clock(), False)
    fit = bk.SVI(2, 8, optimizer="adam").fit(truth.task("gpt2-8x4"), seed=1)
    reverse, _ = truth.distances("gpt2-8x4", Path(answer["policy"]))
    assert np.isclose(reverse, Truth(truth.task("gpt2-8x4")).kl(fit.guide)[0], atol=1e-4)
