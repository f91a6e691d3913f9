"""A gridworld as a language model over actions: soft Q-learning, soft SARSA and a DQN learn its twist.

A token is an action, a completion a walk, and the reward belongs to the squares that the walk enters. The soft value of
square s with t steps behind it is the log psi of sequential Monte Carlo (theory.md 3.2),

    V_t(s) = log mean_a exp(r(s, a) / alpha + V_{t+1}(s')),        V_T = 0,

and the optimal policy is the posterior, pi(a | s) = p0(a) exp(r(s, a) / alpha + V_{t+1}(s') - V_t(s)). `Exact` has it by
messages. The three learners see walks only; each answer is judged by its KL to the posterior.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import bayes_klrl as bk
from bayes_klrl.export.plot_style import COLOURS, drawing
from bayes_klrl.gallery.finding import Finding
from bayes_klrl.gallery.glance import Glance

GLANCE = Glance(
    job="Control: walk through a gridworld",
    today="Q-learning, SARSA, DQN",
    adds="Exact messages; learned values as twists that SMC corrects",
    verdict="partly",
    measured="Where the map is known, messages are exact without a walk. Where it is not, DQN is "
    "{DQN, KL to the posterior (nats):.3f} nats from the posterior after {walks:,.0f} walks, soft SARSA "
    "{soft SARSA, KL to the posterior (nats):.2f}, soft Q-learning {soft Q-learning, KL to the posterior (nats):.2f}.",
    claims=(
        ("soft SARSA, KL to the posterior (nats)", "DQN, KL to the posterior (nats)"),
        ("soft Q-learning, KL to the posterior (nats)", "DQN, KL to the posterior (nats)"),
    ),
    picture="KL of each learner's policy to the posterior, against the walks that it has seen; both axes are logarithmic.",
    setting="Model: the grid itself, 5 x 5 squares and walks of 12 steps; the DQN (deep Q-network) has 5,380 "
    "parameters. Data: 4,000 walks for each learner. Messages are exact sums from the last step back to the first. A "
    "twist is an estimate of what the rest of a walk will be worth.",
)

SIDE, STEPS, ALPHA = 5, 12, 0.15
GOAL, PITS = (4, 4), ((1, 1), (1, 2), (3, 3), (3, 4), (2, 3))
MOVES = np.array([(-1, 0), (1, 0), (0, -1), (0, 1)])  # up, down, left, right
ARROWS = "↑↓←→"


def grid() -> tuple[np.ndarray, np.ndarray]:
    """Return the next square (S, 4), and the reward in nats r / alpha (S, 4), of each action on each square."""
    squares = np.stack(np.divmod(np.arange(SIDE**2), SIDE), axis=1)
    there = np.clip(squares[:, None] + MOVES, 0, SIDE - 1)
    after = there[..., 0] * SIDE + there[..., 1]
    goal, pits = GOAL[0] * SIDE + GOAL[1], [row * SIDE + column for row, column in PITS]
    reward = np.where(after == goal, 1.0, -0.02) - 1.0 * np.isin(after, pits)
    after[goal], reward[goal] = goal, 0.0  # a walk ends at the goal
    return after, reward / ALPHA


AFTER, REWARD = grid()


def problem() -> bk.Posterior:
    """Return the posterior over walks: all actions are equally probable before the reward is known."""
    walk = bk.Automaton(AFTER, start=0)
    reward = bk.AutomatonReward(walk, token_rewards=REWARD * ALPHA, alpha=ALPHA, name="gridworld")
    return bk.Posterior(bk.NgramLM(np.log(np.full(4, 0.25)), eos_token_id=None), reward, max_new_tokens=STEPS)


def soft_max(q: np.ndarray) -> np.ndarray:
    """Return log mean_a exp q over the last axis: the soft value of action values in nats."""
    top = q.max(axis=-1, keepdims=True)
    value: np.ndarray = (top + np.log(np.exp(q - top).mean(axis=-1, keepdims=True)))[..., 0]
    return value


def exact_values() -> np.ndarray:
    """Return the action values Q (T, S, 4) by backward messages."""
    q, value = np.zeros((STEPS, SIDE**2, 4)), np.zeros(SIDE**2)
    for t in reversed(range(STEPS)):
        q[t] = REWARD + value[AFTER]
        value = soft_max(q[t])
    return q


def policy_of(q: np.ndarray) -> np.ndarray:
    """Return pi(a | s) at each step, (T, S, 4)."""
    weights = np.exp(q - q.max(axis=-1, keepdims=True))
    policy: np.ndarray = weights / weights.sum(axis=-1, keepdims=True)
    return policy


def distance(q: np.ndarray) -> float:
    """Return KL(pi || posterior) in nats of the policy of some action values: log Z minus its ELBO, both by messages."""
    policy, elbo = policy_of(q), np.zeros(SIDE**2)
    for t in reversed(range(STEPS)):
        gain = REWARD + elbo[AFTER] - np.log(4) - np.log(np.maximum(policy[t], 1e-300))
        elbo = (policy[t] * gain).sum(axis=1)
    return float(soft_max(exact_values()[0])[0] - elbo[0])


def walks(policy: Callable[[], np.ndarray], num: int, rng: np.random.Generator) -> Iterator[list[tuple[int, int, int]]]:
    """Yield walks, lists of (step, square, action), drawn from the policy that holds when each begins."""
    for _ in range(num):
        table, square, walk = policy(), 0, []
        for t in range(STEPS):
            action = int(rng.choice(4, p=table[t, square]))
            walk.append((t, square, action))
            square = int(AFTER[square, action])
        yield walk


def value_after(q: np.ndarray, t: int, square: int) -> float:
    """Return V_{t+1} of a square."""
    return float(soft_max(q[t + 1, square])) if t + 1 < STEPS else 0.0


def soft_q_learning(num_walks: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Learn off policy, from walks of the prior: Q moves towards r / alpha + log mean exp Q of the next square."""
    q, seen = np.zeros((STEPS, SIDE**2, 4)), np.zeros((STEPS, SIDE**2, 4))
    uniform = np.full((STEPS, SIDE**2, 4), 0.25)
    for walk in walks(lambda: uniform, num_walks, rng):
        for t, square, action in reversed(walk):
            seen[t, square, action] += 1
            target = REWARD[square, action] + value_after(q, t, int(AFTER[square, action]))
            q[t, square, action] += (target - q[t, square, action]) / seen[t, square, action] ** 0.6
        yield q


def soft_sarsa(num_walks: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Learn from walks near its own policy: the next value is that of one more action drawn from it, less its log-ratio.

    E_pi[Q - log(pi / p0)] is the soft value, so the fixed point is the same; the target has the noise of one action.
    """
    q, seen = np.zeros((STEPS, SIDE**2, 4)), np.zeros((STEPS, SIDE**2, 4))
    for walk in walks(lambda: 0.9 * policy_of(q) + 0.025, num_walks, rng):
        following = 0.0
        for t, square, action in reversed(walk):
            seen[t, square, action] += 1
            target = REWARD[square, action] + following
            q[t, square, action] += (target - q[t, square, action]) / seen[t, square, action] ** 0.6
            ahead = policy_of(q[t, square])
            taken = int(rng.choice(4, p=ahead))
            following = float(q[t, square, taken] - np.log(ahead[taken] / 0.25))
        yield q


def deep_q_network(num_walks: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Learn by a network of (square, step), from a memory of all steps so far, against a slower copy of itself."""
    import torch

    torch.manual_seed(int(rng.integers(2**31)))
    inputs = np.zeros((STEPS, SIDE**2, SIDE**2 + STEPS), dtype=np.float32)
    inputs[:, np.arange(SIDE**2), np.arange(SIDE**2)] = 1
    inputs[np.arange(STEPS), :, SIDE**2 + np.arange(STEPS)] = 1
    table = torch.as_tensor(inputs)
    network, slow = (
        torch.nn.Sequential(torch.nn.Linear(SIDE**2 + STEPS, 128), torch.nn.ReLU(), torch.nn.Linear(128, 4))
        for _ in range(2)
    )
    slow.load_state_dict(network.state_dict())
    optimizer, memory = torch.optim.Adam(network.parameters(), lr=2e-3), []
    q = np.zeros((STEPS, SIDE**2, 4))

    def explores() -> np.ndarray:
        return 0.7 * policy_of(q) + 0.075

    for number, walk in enumerate(walks(explores, num_walks, rng)):
        memory += walk
        t, square, action = np.array(memory)[rng.integers(len(memory), size=256)].T
        after = AFTER[square, action]
        with torch.no_grad():
            ahead = slow(table[np.minimum(t + 1, STEPS - 1), after])
            value = (ahead.logsumexp(1) - np.log(4)) * torch.as_tensor(t + 1 < STEPS)
            target = torch.as_tensor(REWARD[square, action], dtype=torch.float32) + value
        loss = torch.nn.functional.smooth_l1_loss(network(table[t, square])[range(256), action], target)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if number % 20 == 0:
            slow.load_state_dict(network.state_dict())
            with torch.no_grad():
                q[:] = network(table).double().numpy()
        yield q


LEARNERS = {"soft Q-learning": soft_q_learning, "soft SARSA": soft_sarsa, "DQN": deep_q_network}


def twist_of(q: np.ndarray) -> Callable[..., np.ndarray]:
    """Return log psi of a prefix: the reward so far, and the value of where it has led."""

    def twist(_posterior: bk.Posterior, _prompt_index: np.ndarray, prefixes: np.ndarray) -> np.ndarray:
        square, so_far = np.zeros(len(prefixes), dtype=int), np.zeros(len(prefixes))
        for action in prefixes.T:
            so_far += REWARD[square, action]
            square = AFTER[square, action]
        t = prefixes.shape[1]
        return so_far + (soft_max(q[t, square]) if t < STEPS else 0.0)

    return twist


def main(out: Path, *, seed: int = 0, num_walks: int = 4000) -> Finding:
    """Learn, judge, draw, and write the report."""
    posterior, exact = problem(), exact_values()
    curves: dict[str, list[tuple[int, float]]] = {}
    learned: dict[str, np.ndarray] = {}
    for number, (name, learner) in enumerate(LEARNERS.items()):
        marks = set(np.unique(np.geomspace(10, num_walks, 25).astype(int)).tolist())
        for count, q in enumerate(learner(num_walks, np.random.default_rng([seed, number])), start=1):
            if count in marks:
                curves.setdefault(name, []).append((count, distance(q)))
        learned[name] = q.copy()
    rows: dict[str, Any] = {"exact": bk.Exact(num_draws=2000), "prior IS": bk.ImportanceSampling(500)}
    for name, q in learned.items():
        twist = twist_of(q)
        rows[f"SMC, {name}"] = bk.SMC(500, twist=twist, proposal=bk.TwistedLM(posterior, twist))
    comparison = bk.compare(posterior, rows, seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    draw_curves(curves, out / "curves.png")
    draw_grid(exact, out / "grid.png")
    best = min(learned, key=lambda name: distance(learned[name]))
    certificate = bk.certify(posterior, bk.TwistedLM(posterior, twist_of(learned[best])), seed=seed)
    pictures = {
        "KL of each learner's policy to the posterior, against the walks that it has seen.": out / "curves.png",
        "How often the posterior's walks are on each square, and where they go from there.": out / "grid.png",
    }
    title = "Soft values: a gridworld as a language model over actions"
    page = bk.report([comparison, certificate], out / "report.html", title=title, pictures=pictures, seed=seed)
    left = {f"{name}, KL to the posterior (nats)": distance(q) for name, q in learned.items()}
    worst = max(learned, key=lambda name: distance(learned[name]))
    return Finding(
        report=page,
        picture=out / "curves.png",
        better="Where the map is known, messages give the exact posterior policy without a walk, and say how far each learner "
        "is from it.",
        worse=f"Where it is not, learners are what there is, and inference adds only the measure: after {num_walks:,} walks "
        f"{best} is {distance(learned[best]):.3f} nats from the posterior, {worst} {distance(learned[worst]):.3f}, in one run "
        "of each.",
        numbers={"walks": num_walks, **left},
    )


def draw_curves(curves: dict[str, list[tuple[int, float]]], file: Path) -> None:
    """Draw the distance of each policy to the posterior."""
    with drawing(file, (6.4, 3.6)) as figure:
        axes = figure.subplots()
        for colour, (name, points) in zip(COLOURS, curves.items(), strict=False):
            axes.loglog(*zip(*points, strict=True), color=colour, label=name)
        axes.set(xlabel="walks", ylabel="KL to the posterior (nats)")
        axes.legend(frameon=False)


def draw_grid(q: np.ndarray, file: Path) -> None:
    """Draw the visits of the posterior, and its most probable action weighted by when it is there."""
    policy, there = policy_of(q), np.eye(SIDE**2)[0]
    visits, chosen = np.zeros(SIDE**2), np.zeros((SIDE**2, 4))
    for t in range(STEPS):
        visits += there
        moved = there[:, None] * policy[t]
        chosen += moved
        there = np.bincount(AFTER.ravel(), moved.ravel(), SIDE**2)
    with drawing(file, (4.2, 4.0)) as figure:
        axes = figure.subplots()
        shown = np.minimum(visits, 2).reshape(SIDE, SIDE)
        axes.imshow(shown, cmap="Blues", vmin=0, vmax=3)
        for square in range(SIDE**2):
            row, column = divmod(square, SIDE)
            mark = "goal" if (row, column) == GOAL else "pit" if (row, column) in PITS else ""
            arrow = "" if (row, column) == GOAL else ARROWS[int(chosen[square].argmax())]
            axes.text(column, row, f"{arrow}\n{mark}".strip(), ha="center", va="center")
        axes.set(xticks=[], yticks=[], title="start: top left")


if __name__ == "__main__":
    print(main(Path("bayes-klrl-gallery/soft_values")))
