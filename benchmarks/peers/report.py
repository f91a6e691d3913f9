"""The table and the pictures of a run: medians over all rounds, ratios to this package's first row, errors of the answers."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["plot", "summary", "table"]

_COLOURS = {
    "bayes_klrl": "#1b6ca8",
    "transformers": "#d1495b",
    "llamppl": "#66a182",
    "genlm-control": "#edae49",
    "TRL": "#8d6a9f",
    "disco": "#7a7a7a",
}
_BIASED = 4.0  # standard errors that the mean of Z-hat / Z is from 1


def summary(results: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the processes of one row and cell found together.

    Parameters
    ----------
    results
        One mapping per process: "runs", "peak_mib", "loaded_mib", or "note" if it failed; "log_evidence" is the true one, "kl"
        has a pair of KL(q || p*) and KL(p* || q) per run.
    """
    good = [result for result in results if "runs" in result]
    if not good:
        return {"note": next((str(result["note"]) for result in results), "not run")}
    runs = [run for result in good for run in result["runs"]]
    found: dict[str, Any] = {
        "num_runs": len(runs),
        "cpu": statistics.median(run["cpu"] for run in runs),
        "wall": statistics.median(run["wall"] for run in runs),
        "peak_mib": max(result["peak_mib"] for result in good),
        "rise_mib": max(result["peak_mib"] - result["loaded_mib"] for result in good),
    }
    if "tokens" in runs[0]:
        found["tokens"] = statistics.median(run["tokens"] for run in runs)
    if "log_evidence" in good[0]:
        ratio = np.exp([run["log_evidence"] - good[0]["log_evidence"] for run in runs])
        found["z_ratio"], found["z_ratio_sd"] = float(ratio.mean()), float(ratio.std(ddof=1)) if len(ratio) > 1 else 0.0
        found["z_ratio_se"] = found["z_ratio_sd"] / len(ratio) ** 0.5
    if "kl" in good[0]:
        pairs = [pair for result in good for pair in result["kl"]]
        found["reverse_kl"], found["forward_kl"] = (float(value) for value in np.median(pairs, axis=0))
    return found


def _answer(found: Mapping[str, Any]) -> str:
    """Return the error of the answer in words."""
    if "reverse_kl" in found:
        return f"KL(q‖p\\*) {found['reverse_kl']:.3f}, KL(p\\*‖q) {found['forward_kl']:.3f}"
    if "z_ratio" in found:
        text = f"Ẑ/Z {found['z_ratio']:.3f} ± {found['z_ratio_se']:.3f}, sd {found['z_ratio_sd']:.3f}"
        off = abs(found["z_ratio"] - 1) > _BIASED * max(found["z_ratio_se"], 1e-6)
        return text + (" **biased**" if off else "")
    return f"{found['cpu'] / found['tokens'] * 1e6:,.0f} µs per token"


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return the table in Markdown: `found[cell][row]` as `summary` returns it. Ratios are to the cell's first row.

    Examples
    --------
    >>> print(table({"tuning-x-N4-S2": {"disco: DPG": {"note": "no module"}}}))
    | task | peer | runs | CPU s | × ours | wall s | memory, MiB (rise) | answer |
    |---|---|---|---|---|---|---|---|
    | tuning-x-N4-S2 | disco: DPG | - | - | - | - | - | no module |
    """
    lines = [
        "| task | peer | runs | CPU s | × ours | wall s | memory, MiB (rise) | answer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell, of_rows in found.items():
        reference = next(iter(of_rows.values())).get("cpu")
        for row, values in of_rows.items():
            if "note" in values:
                lines.append(f"| {cell} | {row} | - | - | - | - | - | {values['note']} |")
                continue
            ratio = f"{values['cpu'] / reference:.2f}" if reference else "-"
            lines.append(
                f"| {cell} | {row} | {values['num_runs']} | {values['cpu']:.3g} | {ratio} | {values['wall']:.3g} "
                f"| {values['peak_mib']:,.0f} ({values['rise_mib']:,.0f}) | {_answer(values)} |"
            )
    return "\n".join(lines)


def plot(found: Mapping[str, Mapping[str, Mapping[str, Any]]], path: Path) -> None:
    """Draw three panels into a PNG: sampling's CPU microseconds per token, error of log Z and KL against CPU seconds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    for axis, (kind, key, draw) in zip(axes, _PANELS, strict=True):
        good = {
            cell.removeprefix(f"{kind}-"): {row: values for row, values in of_rows.items() if key in values}
            for cell, of_rows in found.items()
            if cell.startswith(kind)
        }
        axis.spines[["top", "right"]].set_visible(False)
        if any(good.values()):
            draw(axis, good)
        else:
            axis.set_axis_off()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_sampling(axis: Any, found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    names = list(found)[::-1]
    peers: list[str] = []
    for place, cell in enumerate(names):
        for row, values in found[cell].items():
            peer = row.partition(":")[0]
            label = None if peer in peers else peer
            peers.append(peer)
            axis.scatter(values["cpu"] / values["tokens"] * 1e6, place, color=_colour(row), label=label)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set(xlabel="CPU microseconds per token", title="sampling: left is better")
    _in_decades(axis, "x")
    axis.set_axisbelow(True)
    axis.grid(axis="y", color="0.9")
    axis.legend(fontsize=8)


def _draw_evidence(axis: Any, found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    for (cell, of_rows), marker in zip(found.items(), cycle("osD^v<>PX*"), strict=False):
        axis.scatter([], [], marker=marker, color="0.4", label=cell)
        for row, values in of_rows.items():
            axis.scatter(values["cpu"], values["z_ratio_sd"], marker=marker, color=_colour(row))
            _name(axis, row, values["cpu"], values["z_ratio_sd"])
    axis.set(xlabel="CPU seconds per run", ylabel="standard deviation of Ẑ / Z")
    _in_decades(axis, "xy")
    axis.set_title("log Z: down and left is better")
    axis.legend(fontsize=8)


def _draw_tuning(axis: Any, found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    for key, marker, label in (("reverse_kl", "o", "KL(q‖p*)"), ("forward_kl", "^", "KL(p*‖q)")):
        axis.scatter([], [], marker=marker, color="0.4", label=label)
        for row, values in ((row, values) for of_rows in found.values() for row, values in of_rows.items()):
            axis.scatter(values["cpu"], values[key], marker=marker, color=_colour(row))
            if key == "reverse_kl":
                _name(axis, row, values["cpu"], values[key])
    axis.set(xlabel="CPU seconds of the training", ylabel="nats from the posterior")
    _in_decades(axis, "xy")
    axis.set_title("tuning: down and left is better")
    axis.legend(fontsize=8)


_PANELS = (
    ("sampling", "tokens", _draw_sampling),
    ("evidence", "z_ratio_sd", _draw_evidence),
    ("tuning", "reverse_kl", _draw_tuning),
)


def _in_decades(axis: Any, which: str) -> None:
    """Make axes logarithmic, with ticks at 1, 2 and 5 times the powers of ten."""
    from matplotlib.ticker import LogLocator, NullLocator

    for name in which:
        one = getattr(axis, f"{name}axis")
        axis.set(**{f"{name}scale": "log"})
        one.set_major_locator(LogLocator(subs=(1, 2, 5)))
        one.set_minor_locator(NullLocator())
        one.set_major_formatter("{x:g}")


def _colour(row: str) -> str:
    return _COLOURS.get(row.partition(":")[0], "0.3")


def _name(axis: Any, row: str, x: float, y: float) -> None:
    text = row.partition(": ")[2].partition(" at ")[0]
    axis.annotate(text, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=7, color=_colour(row))
