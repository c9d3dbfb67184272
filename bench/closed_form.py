"""Checks that RL algorithms find the optimal policy of a bandit, a single state with six actions.

    python bench/closed_form.py --json bench/results/closed-form.json --plot docs/closed_form.png

The policy that maximises E_π[r] − β·KL(π ‖ ref) is π* ∝ ref·exp(r/β). Each algorithm starts at ref and samples its own
actions. Losses, advantages and gradients are the library's; the rows of the head are the logits. For each seed, the
total variation ½ Σ |π − π*| is reported, with π averaged over the last quarter of the steps.

GRPO's own KL term, k3 in the loss, has another solution: on-policy, the gradient of k3 is that of KL(ref ‖ π), so the
policy converges to β·ref/(λ − r), with λ such that it sums to 1. It is compared with that policy, and with π*.
Exit status 1: a distance is above 0.03.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xpo_fast import METHODS, Objective
from xpo_fast.bench.measure import environment, table
from xpo_fast.files import write_json
from xpo_fast.methods.advantages import gae, group_normalised, leave_one_out
from xpo_fast.methods.math import k1

ACTIONS, BETA, GROUPS, GROUP = 6, 0.5, 64, 8
STEPS, LEARNING_RATE, EPOCHS = 600, 0.03, 2
TOLERANCE = 0.03


class Bandit:
    """Random log-probs of the reference and random rewards of the actions, (V,) float64 each."""

    def __init__(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.log_ref = torch.randn(ACTIONS, generator=g, dtype=torch.float64).log_softmax(0)
        self.reward = torch.randn(ACTIONS, generator=g, dtype=torch.float64)

    def optimum(self) -> Tensor:
        """Returns π* ∝ ref·exp(r/β), (V,)."""
        return (self.log_ref + self.reward / BETA).softmax(0)

    def forward_optimum(self) -> Tensor:
        """Returns the maximiser of E_π[r] − β·KL(ref ‖ π), (V,): β·ref/(λ − r), with λ by bisection."""
        ref = self.log_ref.exp()
        low, high = (self.reward + BETA * ref).max(), self.reward.max() + BETA
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (low, middle) if (BETA * ref / (middle - self.reward)).sum() < 1 else (middle, high)
        return BETA * ref / (high - self.reward)


class Policy:
    """Trains a head (V, 1) whose hidden states are all 1, so that its weight is the logits; for PPO, also a value."""

    def __init__(self, bandit: Bandit, seed: int, steps: int) -> None:
        self.weight = bandit.log_ref[:, None].clone().requires_grad_()
        self.value = torch.zeros((), dtype=torch.float64, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.weight, self.value], lr=LEARNING_RATE)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.0, steps)
        self.random = torch.Generator().manual_seed(seed)

    def log_probs(self) -> Tensor:
        """Returns log π, (V,)."""
        return self.weight.detach()[:, 0].log_softmax(0)

    def sample(self) -> Tensor:
        """Returns sampled actions (GROUPS·GROUP, 1)."""
        return self.log_probs().exp().multinomial(GROUPS * GROUP, replacement=True, generator=self.random)[:, None]

    def learn(self, objective: Objective, actions: Tensor, more: Tensor | float = 0.0, **given: Any) -> None:
        """Makes a step of the optimizer. more: a loss that is added; given: the objective's other inputs."""
        hidden = torch.ones(*actions.shape, 1, dtype=torch.float64)
        loss = objective(hidden, self.weight, actions, **given).loss + more
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def _penalised(bandit: Bandit, policy: Policy, actions: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the rewards minus β·k1, and log π, of the actions: (R, 1) each."""
    logp, log_ref = policy.log_probs()[actions], bandit.log_ref[actions]
    return bandit.reward[actions] - BETA * k1(logp, log_ref), logp


def ppo(bandit: Bandit, policy: Policy) -> None:
    """Makes one rollout and EPOCHS steps of PPO with a critic, k1 in the reward."""
    actions = policy.sample()
    rewards, logp = _penalised(bandit, policy, actions)
    mask = torch.ones_like(actions, dtype=torch.bool)
    old_value = policy.value.detach().expand_as(rewards)
    advantage, returns = gae(rewards, old_value, mask)
    for _ in range(EPOCHS):
        value = policy.value.expand_as(rewards)
        critic, _ = METHODS["ppo_value"](value=value, old_value=old_value, returns=returns, mask=mask)
        policy.learn(Objective("ppo"), actions, critic.mean(), advantage=advantage, old_logp=logp)


def rloo(bandit: Bandit, policy: Policy) -> None:
    """Makes one rollout and one step of RLOO, k1 in the reward."""
    actions = policy.sample()
    rewards, _ = _penalised(bandit, policy, actions)
    policy.learn(Objective("rloo"), actions, advantage=leave_one_out(rewards.view(GROUPS, GROUP)).flatten())


def grpo(bandit: Bandit, policy: Policy) -> None:
    """Makes one rollout and EPOCHS steps of GRPO, k1 in the reward."""
    actions = policy.sample()
    rewards, logp = _penalised(bandit, policy, actions)
    advantage = group_normalised(rewards.view(GROUPS, GROUP), scale=False).flatten()
    for _ in range(EPOCHS):
        policy.learn(Objective("grpo"), actions, advantage=advantage, old_logp=logp)


def grpo_k3(bandit: Bandit, policy: Policy) -> None:
    """Makes one rollout and one step of GRPO, k3 in the loss."""
    actions = policy.sample()
    advantage = group_normalised(bandit.reward[actions].view(GROUPS, GROUP), scale=False).flatten()
    # A group's mean includes the own reward, which scales the reward's gradient by (K − 1)/K, but not the KL's.
    advantage = advantage * GROUP / (GROUP - 1)
    policy.learn(Objective("grpo", beta=BETA), actions, advantage=advantage, ref_logps=bandit.log_ref[actions])


def dpo(bandit: Bandit, policy: Policy) -> None:
    """Samples pairs, draws preferences from a Bradley–Terry model of the rewards, and makes one step of DPO."""
    actions = policy.sample()
    a, b = actions.chunk(2)
    wins = (bandit.reward[a] - bandit.reward[b]).sigmoid()
    first = torch.rand(wins.shape, generator=policy.random, dtype=torch.float64) < wins
    pairs = torch.cat([torch.where(first, a, b), torch.where(first, b, a)])
    policy.learn(Objective("dpo", beta=BETA), pairs, ref_logps=bandit.log_ref[pairs][:, 0])


ALGORITHMS: dict[str, tuple[Callable[[Bandit, Policy], None], Callable[[Bandit], Tensor]]] = {
    "PPO": (ppo, Bandit.optimum),
    "GRPO, k1 in the reward": (grpo, Bandit.optimum),
    "RLOO": (rloo, Bandit.optimum),
    "iterative DPO": (dpo, Bandit.optimum),
    "GRPO, k3 in the loss": (grpo_k3, Bandit.forward_optimum),
}


def distance(p: Tensor, q: Tensor) -> float:
    """Returns the total variation ½ Σ |p − q|."""
    return 0.5 * float((p - q).abs().sum())


def run(name: str, seed: int, steps: int = STEPS) -> dict[str, Any]:
    """Trains one algorithm and returns the distances from its solution, during the run and at its end."""
    torch.manual_seed(seed)
    algorithm, goal = ALGORITHMS[name]
    bandit = Bandit(seed)
    policy, target, curve, mean = Policy(bandit, seed, steps), goal(bandit), [], torch.zeros(ACTIONS)
    for step in range(steps):
        if step % 10 == 0:
            curve.append(distance(policy.log_probs().exp(), target))
        algorithm(bandit, policy)
        policy.schedule.step()
        if step >= steps - steps // 4:
            mean = mean + policy.log_probs().exp() / (steps // 4)
    return {
        "algorithm": name,
        "seed": seed,
        "steps": steps,
        "start": curve[0],
        "distance": distance(mean, target),
        "distance_from_optimum": distance(mean, bandit.optimum()),
        "curve": curve,
    }


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Draws the distances by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for color, name in enumerate(ALGORITHMS):
        for k, r in enumerate([r for r in records if r["algorithm"] == name]):
            steps = range(0, r["steps"], 10)
            axes.semilogy(steps, r["curve"], f"C{color}", lw=1, alpha=0.8, label=None if k else name)
    axes.axhline(TOLERANCE, color="gray", ls=":", lw=1)
    axes.set(xlabel="step", ylabel="total variation from the known policy")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args(argv)
    records = [run(name, seed) for name in ALGORITHMS for seed in range(args.seeds)]
    if args.json:
        write_json(args.json, {"environment": environment(), "beta": BETA, "runs": records})
    if args.plot:
        plot(records, args.plot)
    rows = [
        [r["algorithm"], str(r["seed"]), *(f"{r[k]:.3f}" for k in ("start", "distance", "distance_from_optimum"))]
        for r in records
    ]
    print(table(["algorithm", "seed", "at the start", "at the end", "from ref·exp(r/β)"], rows))
    return int(any(r["distance"] > TOLERANCE for r in records))


if __name__ == "__main__":
    sys.exit(main())
