"""docs/conversions.md, row by row: both sides computed on one batch, theirs by their own code.

Papers have no code here: their side is the printed formula, written out. TRL 1.16's and Liger 0.8.5's is what their
trainers and loss classes return on the same tensors.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

import xpo_fast as xf
from inputs import swapped
from peers import peer, trl, trl_cpo, trl_dpo, trl_kto
from test_policy import reduced
from test_policy import trainer_like as grpo_like

DOCS = Path(__file__).parents[1] / "docs" / "conversions.md"
WIDTH, VOCAB, PAIRS = 6, 11, 3
ROWS: dict[str, Callable[[], None]] = {}


def row(name: str):
    def register(fn: Callable[[], None]) -> Callable[[], None]:
        ROWS[name] = fn
        return fn

    return register


def same(ours: Tensor, theirs: Tensor) -> None:
    assert_close(ours, theirs.to(ours.dtype), rtol=2e-5, atol=2e-6)
    assert ours.isfinite() and theirs != 0


# --- Batches ---


def batch(lengths: tuple[int, ...]) -> SimpleNamespace:
    """Chosen and rejected completions of these lengths: hidden states, head, targets, and the log-probs of both."""
    generator = torch.Generator().manual_seed(sum(lengths))
    rows, longest = len(lengths), max(lengths)
    hidden, ref_hidden = (torch.randn(rows, longest, WIDTH, generator=generator) for _ in range(2))
    weight = torch.randn(VOCAB, WIDTH, generator=generator) / 2
    targets = torch.randint(0, VOCAB, (rows, longest), generator=generator)
    targets[torch.arange(longest) >= torch.tensor(lengths)[:, None]] = -100
    logp, ref_logp = (
        (h @ weight.T).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0].masked_fill(targets < 0, 0)
        for h in (hidden, ref_hidden)
    )
    given = {}
    for name, values in {"logp": logp.sum(1), "ref_logp": ref_logp.sum(1), "len": torch.tensor(lengths)}.items():
        given[name + "_w"], given[name + "_l"] = values.chunk(2)
    return SimpleNamespace(hidden=hidden, ref_hidden=ref_hidden, weight=weight, targets=targets, given=given)


RAGGED, EQUAL = batch((5, 2, 3, 4, 1, 5)), batch((4,) * 6)
LENGTH = 4  # of every completion in EQUAL
UNPAIRED = {
    "logp": torch.tensor([-10.0, -7.0, -30.0, -15.0]),
    "ref_logp": torch.tensor([-12.0, -6.0, -45.0, -13.0]),
    "length": torch.tensor([5, 2, 8, 4]),
    "desirable": torch.tensor([True, False, True, False]),
    "kl": torch.tensor(1.5),
}


def ours(name: str, given: dict = RAGGED.given, **hyper) -> Tensor:
    """A method's mean over these pairs or rows."""
    method = xf.METHODS[name]
    losses, _ = method(**{k: v for k, v in given.items() if k in method.inputs}, **hyper)
    tokens = {"units": len(losses), "tokens": given["len_w"].sum()} if "len_w" in given else {"units": len(losses)}
    return losses.sum() / tokens[method.denominator]


def differences(given: dict = RAGGED.given) -> tuple[Tensor, Tensor]:
    return tuple(given["logp_" + s] - given["ref_logp_" + s] for s in "wl")


def chunked_loss():
    """Liger's losses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever Liger and what it imports have to say on import
        return peer("liger_kernel.chunked_loss", "liger-kernel", "0.8.")


def liger(loss: str, b: SimpleNamespace = RAGGED, *args, **options) -> Tensor:
    """Liger's paired loss of a batch."""
    reference = {"ref_input": b.ref_hidden, "ref_weight": b.weight} if loss == "DPO" else {}
    loss = getattr(chunked_loss(), f"LigerFusedLinear{loss}Loss")(compiled=False, **options)
    return loss(b.weight, b.hidden, b.targets, *args, **reference)[0]


def trl_whole(trainer: str, b: SimpleNamespace, prompts: int = 1, **fields) -> Tensor:
    """The whole loss of TRL's CPOTrainer or ORPOTrainer, its NLL included, on a model that has this batch's logits.

    prompts: tokens of the prompt, of which all but the first are predicted.
    """
    cls = getattr(trl(), trainer)
    logits = F.pad(b.hidden @ b.weight.T, (0, 0, prompts - 1, 1))
    ids = F.pad(b.targets.clamp(min=0), (prompts, 0))
    labels, attention = (
        F.pad(b.targets, (prompts, 0), value=-100),
        F.pad((b.targets >= 0).long(), (prompts, 0), value=1),
    )
    inputs = {}
    for name, values in {"input_ids": ids, "attention_mask": attention, "labels": labels}.items():
        inputs["chosen_" + name], inputs["rejected_" + name] = values.chunk(2)
    inputs["prompt_input_ids"] = ids[:PAIRS, :prompts]
    trainer = cls.__new__(cls)  # its methods without a model, data and arguments to train with
    trainer.__dict__ |= {
        **{"is_encoder_decoder": False, "pad_token_id": 0, "aux_loss_enabled": False, "loss_type": "sigmoid"},
        **{"alpha": 0.0, "label_smoothing": 0.0, "cpo_alpha": 1.0, "padding_value": 0},
        "accelerator": SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x),
        **fields,
    }
    return trainer.get_batch_loss_metrics(lambda *_, **__: SimpleNamespace(logits=logits), inputs)[0]


# --- Pairwise, with a reference ---


@row("DPO: label smoothing")
def _():
    for theirs in (trl_dpo(RAGGED.given, "sigmoid", beta=0.3, label_smoothing=0.2),
                   liger("DPO", beta=0.3, label_smoothing=0.2)):  # fmt: skip
        same(ours("dpo", beta=0.3), theirs)
    cdpo = 0.8 * ours("dpo", beta=0.3) + 0.2 * ours("dpo", swapped(RAGGED.given), beta=0.3)
    same(ours("dpo", beta=0.3, label_smoothing=0.2), cdpo)


@row("robust DPO: ε")
def _():
    for theirs in (trl_dpo(RAGGED.given, "robust", beta=0.3, label_smoothing=0.2),
                   liger("DPO", loss_type="robust", beta=0.3, label_smoothing=0.2)):  # fmt: skip
        same(ours("robust_dpo", beta=0.3, label_smoothing=0.2), theirs)
    clean, flipped = ours("dpo", beta=0.3), ours("dpo", swapped(RAGGED.given), beta=0.3)
    same(ours("robust_dpo", beta=0.3, label_smoothing=0.2), (0.8 * clean - 0.2 * flipped) / 0.6)


@row("EXO: ε")
def _():
    for theirs in (trl_dpo(RAGGED.given, "exo_pair", beta=0.3, label_smoothing=0.01),
                   liger("DPO", loss_type="exo_pair", beta=0.3, label_smoothing=0.01)):  # fmt: skip
        same(ours("exo", beta=0.3, label_smoothing=0.01), theirs)


@row("IPO: β, per token")
def _():
    same(ours("ipo", beta=0.3), trl_dpo(RAGGED.given, "ipo", beta=0.3, label_smoothing=0.0))


@row("IPO: β, summed")
def _():
    won, lost = differences()
    same(ours("ipo", beta=0.3, variant="sum"), ((won - lost - 1 / 0.6) ** 2).mean())
    same(ours("ipo", EQUAL.given, beta=0.3, variant="sum"),
         LENGTH**2 * ours("ipo", EQUAL.given, beta=LENGTH * 0.3))  # fmt: skip


@row("GPO squared: β")
def _():
    same(ours("gpo", beta=0.3, f="squared"), 0.3**2 * ours("ipo", beta=0.15, variant="sum"))


@row("length-normalised DPO: β")
def _():
    same(ours("dpo_norm", beta=3.0), trl_dpo(RAGGED.given, "sigmoid_norm", beta=3.0, label_smoothing=0.0))
    same(ours("dpo_norm", EQUAL.given, beta=3.0), ours("dpo", EQUAL.given, beta=3.0 / LENGTH))


@row("SPPO: β")
def _():
    won, lost = differences()
    p, eta = torch.tensor([0.9, 0.4, 1.0]), 2.0
    printed = (won - eta * (p - 0.5)) ** 2 + (lost - eta * (0.5 - p)) ** 2
    same(ours("sppo", {**RAGGED.given, "prob_w": p}, beta=1 / eta), printed.mean())
    for theirs in (trl_dpo(RAGGED.given, "sppo_hard", beta=0.5, label_smoothing=0.0),
                   liger("DPO", loss_type="sppo_hard", beta=0.5)):  # fmt: skip
        same(ours("sppo", beta=0.5, variant="hard"), theirs)


@row("f-DPO: α")
def _():
    theirs = trl_dpo(RAGGED.given, "sigmoid", "alpha_divergence", alpha=0.7, beta=0.3, label_smoothing=0.0)
    same(ours("f_dpo", beta=0.3, divergence="alpha", alpha=0.3), theirs)
    # f′(u) = (1 − u^−α)/α, the paper's Table 1
    won, lost = ((1 - torch.exp(-0.3 * x)) / 0.3 for x in differences())
    same(ours("f_dpo", beta=0.3, divergence="alpha", alpha=0.3), -F.logsigmoid(0.3 * (won - lost)).mean())


@row("f-DPO: divergence")
def _():
    for name, theirs in {"reverse_kl": "reverse_kl", "forward_kl": "forward_kl", "js": "js_divergence"}.items():
        same(ours("f_dpo", beta=0.3, divergence=name),
             trl_dpo(RAGGED.given, "sigmoid", theirs, beta=0.3, label_smoothing=0.0))  # fmt: skip


@row("DiscoPOP: τ")
def _():
    for theirs in (trl_dpo(RAGGED.given, "discopop", tau=0.2, beta=0.3, label_smoothing=0.0),
                   liger("DPO", loss_type="discopop", discopop_tau=0.2, beta=0.3)):  # fmt: skip
        same(ours("discopop", beta=0.3, tau=0.2), theirs)


@row("RSO: γ")
def _():
    for theirs in (trl_dpo(RAGGED.given, "hinge", beta=0.3, label_smoothing=0.0),
                   liger("DPO", loss_type="hinge", beta=0.3)):  # fmt: skip
        same(ours("rso", beta=0.3), theirs)


@row("NCA, BCO, APO, AOT: β")
def _():
    for name, theirs in {
        "nca": "nca_pair",
        "bco_pair": "bco_pair",
        "apo_zero": "apo_zero",
        "apo_down": "apo_down",
    }.items():
        same(ours(name, beta=0.3), trl_dpo(RAGGED.given, theirs, beta=0.3, label_smoothing=0.0))
        same(ours(name, beta=0.3), liger("DPO", loss_type=theirs, beta=0.3))
    for name in ("aot", "aot_unpaired"):
        same(ours(name, beta=0.3, label_smoothing=0.1), trl_dpo(RAGGED.given, name, beta=0.3, label_smoothing=0.1))


@row("DPO with SFT: weight")
def _():
    both = ours("dpo", beta=0.3) + 0.7 * ours("sft")
    same(both, liger("DPO", beta=0.3, compute_nll_loss=True, alpha=0.7))
    parts = (trl_dpo(RAGGED.given, name, beta=0.3, label_smoothing=0.0) for name in ("sigmoid", "sft"))
    same(both, sum(weight * part for weight, part in zip((1.0, 0.7), parts)))


@row("R-DPO: sign of α")
def _():
    given = RAGGED.given
    won, lost = differences()
    printed = -F.logsigmoid(0.3 * (won - lost) - 0.1 * (given["len_w"] - given["len_l"]))
    same(ours("rdpo", beta=0.3, alpha=0.1, variant="survey"), printed.mean())
    lengths_exchanged = {**given, "len_w": given["len_l"], "len_l": given["len_w"]}
    same(ours("rdpo", lengths_exchanged, beta=0.3, alpha=0.1), printed.mean())


# --- Pairwise, without ---


@row("CPO: β")
def _():
    for smoothing in (0.0, 0.1):
        options = {"beta": 0.3, "label_smoothing": smoothing}
        same(ours("cpo", alpha=0.0, **options), trl_whole("cpo", RAGGED, cpo_alpha=0.0, **options))
        same(ours("cpo", alpha=0.0, **options), liger("CPO", alpha=0.0, **options))
    flat = {**RAGGED.given, "ref_logp_w": torch.full((PAIRS,), -9.0), "ref_logp_l": torch.full((PAIRS,), -9.0)}
    same(ours("cpo", beta=0.3, alpha=0.0), ours("dpo", flat, beta=0.3))


@row("CPO: weight of the NLL")
def _():
    for theirs in (trl_whole("cpo", RAGGED, cpo_alpha=0.5, beta=0.3), liger("CPO", alpha=0.5, beta=0.3)):
        same(ours("cpo", alpha=0.0, beta=0.3) + 0.5 * ours("sft"), theirs)
    for theirs in (trl_whole("cpo", EQUAL, cpo_alpha=0.5, beta=0.3), liger("CPO", EQUAL, alpha=0.5, beta=0.3)):
        same(ours("cpo", EQUAL.given, alpha=0.5, beta=0.3, nll="mean"), theirs)
        same(ours("cpo", EQUAL.given, alpha=0.5 / LENGTH, beta=0.3), theirs)


@row("SimPO: γ")
def _():
    for theirs in (trl_cpo(RAGGED.given, "simpo", beta=2.5, simpo_gamma=1.5),
                   liger("SimPO", beta=2.5, gamma=1.5, compute_nll_loss=False)):  # fmt: skip
        same(ours("simpo", beta=2.5, gamma=1.5), theirs)
        same(ours("simpo", beta=2.5, gamma_beta_ratio=0.6), theirs)


@row("SimPO: weight of an NLL")
def _():
    options = {"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 1.5}
    same(ours("simpo", beta=2.5, gamma=1.5), trl_whole("cpo", RAGGED, cpo_alpha=0.0, **options))
    for theirs in (trl_whole("cpo", RAGGED, **options), liger("SimPO", beta=2.5, gamma=1.5)):
        same(ours("simpo", beta=2.5, gamma=1.5) + ours("sft"), theirs)


@row("ORPO: λ")
def _():
    mean = RAGGED.given["logp_w"] / RAGGED.given["len_w"]
    ratio = ours("orpo", lam=0.4) + mean.mean()  # without its NLL, the mean of a completion's tokens
    same(ratio + ours("sft"), trl_whole("orpo", RAGGED, beta=0.4))
    same(ratio + ours("sft"), liger("ORPO", beta=0.4))
    for theirs in (trl_whole("orpo", EQUAL, beta=0.4), liger("ORPO", EQUAL, beta=0.4)):
        same(ours("orpo", EQUAL.given, lam=0.4), theirs)


@row("ORPO: tokens of the NLL")
def _():
    mean = RAGGED.given["logp_w"] / RAGGED.given["len_w"]
    ratio = ours("orpo", lam=0.4) + mean.mean()
    prompts = 2 * PAIRS  # two tokens a prompt are predicted, by a model whose logits there are all 0
    nll = prompts * torch.log(torch.tensor(float(VOCAB))) - RAGGED.given["logp_w"].sum()
    same(ratio + nll / (prompts + RAGGED.given["len_w"].sum()), trl_whole("orpo", RAGGED, prompts=3, beta=0.4))


# --- Unpaired ---


@row("KTO: weights")
def _():
    theirs = trl_kto(UNPAIRED, "kto", beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    same(ours("kto", UNPAIRED, beta=0.3, lambda_d=1.5, lambda_u=0.5), theirs)
    # λ_y − v(x, y), the paper's equation 8
    gain = 0.3 * (UNPAIRED["logp"] - UNPAIRED["ref_logp"] - UNPAIRED["kl"])
    value = torch.where(UNPAIRED["desirable"], 1.5 * torch.sigmoid(gain), 0.5 * torch.sigmoid(-gain))
    weight = torch.where(UNPAIRED["desirable"], 1.5, 0.5)
    same(ours("kto", UNPAIRED, beta=0.3, lambda_d=1.5, lambda_u=0.5), (weight - value).mean())


@row("KTO: reference point")
def _():
    b, kl = RAGGED, torch.tensor(0.4)
    given = {"logp": torch.cat([b.given["logp_w"], b.given["logp_l"]]), "kl": kl}
    given |= {"ref_logp": torch.cat([b.given["ref_logp_w"], b.given["ref_logp_l"]])}
    given |= {"desirable": torch.tensor([True, False, True, False, False, True])}
    loss = chunked_loss().LigerFusedLinearKTOLoss(compiled=False, use_ref_model=True, beta=0.3)
    reference = {"ref_input": b.ref_hidden, "ref_weight": b.weight, "kl": kl}
    theirs = loss(b.hidden, b.weight, b.targets, preference_labels=given["desirable"], **reference)[0]
    same(ours("kto", given, beta=0.3), theirs)
    options = {"beta": 0.3, "desirable_weight": 1.0, "undesirable_weight": 1.0}
    lengths = {"length": torch.cat([b.given["len_w"], b.given["len_l"]])}
    same(ours("kto", given, beta=0.3), trl_kto(given | lengths, "kto", **options))


@row("APO-zero, unpaired: weights")
def _():
    theirs = trl_kto(UNPAIRED, "apo_zero_unpaired", beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    same(ours("apo_zero_unpaired", UNPAIRED, beta=0.3, lambda_d=1.5, lambda_u=0.5), theirs)


@row("DRO: τ")
def _():
    given = {**UNPAIRED, "reward": torch.tensor([1.0, -1.0, 0.5, 0.0]), "value": torch.tensor([0.2, 0.1, -0.3, 0.4])}
    ratio = given["logp"] - given["ref_logp"]
    printed = (given["reward"] - given["value"] - 0.3 * ratio) ** 2 / 2
    same(ours("dro", given, beta=0.3, variant="square"), printed.mean())
    found = {}
    for variant in ("split", "square"):
        leaves = [given[k].clone().requires_grad_() for k in ("logp", "value")]
        loss = ours("dro", {**given, "logp": leaves[0], "value": leaves[1]}, beta=0.3, variant=variant)
        found[variant] = torch.autograd.grad(loss, leaves)
    assert_close(found["split"][0], found["square"][0] / 0.3)
    assert_close(found["split"][1], found["square"][1])


# --- Listwise ---


@row("PRO: weight of the SFT term")
def _():
    given = {
        "logps": torch.tensor([[-10.0, -7.0, -30.0], [-15.0, -20.0, -5.0]]),
        "lens": torch.tensor([[5, 2, 8], [4, 9, 3]]),
        "scores": torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.7, 0.4]]),
    }
    alpha, weight = 0.05, 0.05 * (3 - 1) ** 2
    authors = ours("pro", given, alpha=alpha, variant="authors")
    same(authors, weight * ours("pro", given, alpha=1 / weight, variant="survey"))


# --- Policy ---

SAMPLES = {  # ratios from 0.5 to 7 under advantages of either sign
    "old_logp": torch.tensor([[-2.0, -1.0, -3.0, -0.5], [-1.5, -2.5, -1.0, 0.0], [-0.7, -4.0, -2.5, 0.0]]),
    "token_logp": torch.tensor([[-1.6, -1.7, -2.9, -0.5], [-1.1, -3.2, -0.9, 0.0], [-0.4, -3.8, -0.55, 0.0]]),
    "ref_token_logp": torch.tensor([[-1.3, -1.9, -2.4, -0.9], [-1.0, -3.8, -0.7, 0.0], [-0.7, -3.7, -1.0, 0.0]]),
    "advantage": torch.tensor([1.5, -0.5, -2.0]),
    "mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0]]).bool(),
}
LONGEST = 9


def policy(name: str, **hyper) -> Tensor:
    method = xf.METHODS[name]
    optional = {"entropy"} | (set() if hyper.get("beta") else {"ref_token_logp"})
    given = {k: v for k, v in SAMPLES.items() if k in method.inputs and k not in optional}
    return reduced(name, method(**given, **hyper)[0], SAMPLES["mask"], LONGEST)


def policy_peers(
    loss_type: str, *, delta: float | None = None, sapo=(1.0, 1.05), vespo=(2.0, 3.0, 3.0, 2.0), **options
):
    """TRL's and Liger's mean loss of SAMPLES."""
    fields = {"epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.0, "importance_sampling_level": "token", **options}
    trl()
    from trl.trainer.grpo_trainer import GRPOTrainer

    stub, inputs = grpo_like(SAMPLES, GRPOTrainer, loss_type=loss_type, max_completion_length=LONGEST, **fields)
    names = dict(zip(("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"), vespo))
    names |= dict(zip(("sapo_temperature_pos", "sapo_temperature_neg"), sapo))
    vars(stub.args).update(delta=delta, **names)
    inputs |= {"old_per_token_logps": SAMPLES["old_logp"], "ref_per_token_logps": SAMPLES["ref_token_logp"]}
    yield GRPOTrainer._compute_loss(stub, None, inputs)
    mask = SAMPLES["mask"].float()
    loss, _ = chunked_loss().grpo_loss.LigerFusedLinearGRPOFunction.ppo_loss_fn(
        SAMPLES["token_logp"], mask, SAMPLES["advantage"], mask, SAMPLES["ref_token_logp"], SAMPLES["old_logp"],
        loss_type=loss_type, max_completion_length=LONGEST, delta=delta, **names, **fields,
    )  # fmt: skip
    yield loss


@row("PPO, GRPO: clip range")
def _():
    for theirs in policy_peers("dapo", epsilon_low=0.1, epsilon_high=0.3):
        same(policy("dapo", eps_low=0.1, eps_high=0.3), theirs)
    for theirs in policy_peers("dapo"):
        same(policy("ppo", eps=0.2), theirs)


@row("GRPO: β")
def _():
    for theirs in policy_peers("grpo", beta=0.04):
        same(policy("grpo", beta=0.04), theirs)


@row("PPO: dual clip")
def _():
    for theirs in policy_peers("dapo", delta=3.0):
        same(policy("ppo", dual_clip=3.0), theirs)
        assert not torch.isclose(policy("ppo"), theirs), "no ratio is beyond the clip"


@row("CISPO: cap")
def _():
    for theirs in policy_peers("cispo", epsilon_high=1.3):
        same(policy("cispo", cap=1.3), theirs)
        same(policy("cispo", eps=0.3), theirs)


@row("GSPO, LUSPO: ratio of a sequence")
def _():
    options = {"importance_sampling_level": "sequence", "epsilon_low": 0.1, "epsilon_high": 0.3}
    for theirs in policy_peers("grpo", **options):
        same(policy("gspo", eps_low=0.1, eps_high=0.3), theirs)
    for theirs in policy_peers("luspo", **options):
        same(policy("luspo", eps_low=0.1, eps_high=0.3), theirs)


@row("SAPO: τ")
def _():
    for theirs in policy_peers("sapo", sapo=(0.9, 1.2)):
        same(policy("sapo", tau_pos=0.9, tau_neg=1.2), theirs)


@row("VESPO: k, λ")
def _():
    for theirs in policy_peers("vespo", vespo=(1.5, 2.5, 3.5, 1.0)):
        same(policy("vespo", k_pos=1.5, lambda_pos=2.5, k_neg=3.5, lambda_neg=1.0), theirs)


@row("GRPO: what the mean is over")
def _():
    for name in ("grpo", "bnpo", "dr_grpo", "dapo"):
        for theirs in policy_peers(name):
            same(policy(name, **({"eps_high": 0.2} if name == "dapo" else {})), theirs)


@row("RLOO: ratio")
def _():
    trl()
    from trl.trainer.rloo_trainer import RLOOTrainer

    stub, inputs = grpo_like(SAMPLES, RLOOTrainer, epsilon_low=0.2, epsilon_high=0.2)
    inputs["old_logps"] = SAMPLES["old_logp"].sum(1)
    same(policy("rloo", variant="clipped"), RLOOTrainer._compute_loss(stub, None, inputs))
    gradients = []
    for variant in ("plain", "clipped"):
        leaf = SAMPLES["token_logp"].clone().requires_grad_()
        given = {k: SAMPLES[k] for k in ("advantage", "mask")} | {"token_logp": leaf, "old_logp": leaf.detach()}
        gradients += torch.autograd.grad(xf.METHODS["rloo"](**given, variant=variant)[0].sum(), leaf)
    assert_close(*gradients)


# --- Reward models ---


@row("Bradley–Terry: centre, margin")
def _():
    trl()
    from trl.trainer.reward_trainer import RewardTrainer

    given = {"reward_w": torch.tensor([2.0, -0.5, 3.0]), "reward_l": torch.tensor([1.0, 0.5, -1.0])}
    margin = torch.tensor([0.5, 0.25, 1.0])
    logits = torch.cat([given["reward_w"], given["reward_l"]])[:, None]
    inputs = {"input_ids": logits, "attention_mask": logits, "margin": margin}
    for center in (None, 0.02):
        trainer = SimpleNamespace(
            **{"_total_train_tokens": 0, "_metrics": {"eval": defaultdict(list)}},
            model=SimpleNamespace(training=False),
            args=SimpleNamespace(center_rewards_coefficient=center),
            accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        )
        theirs = RewardTrainer.compute_loss(trainer, lambda *_, **__: SimpleNamespace(logits=logits), inputs)
        same(ours("bradley_terry", given | {"margin": margin}, center=center or 0.0), theirs)


# --- All of them ---


@pytest.mark.parametrize("name", ROWS)
def test_row(name):
    ROWS[name]()


def test_every_row_is_computed():
    cells = [line.split("|")[1].strip() for line in DOCS.read_text(encoding="utf-8").splitlines() if line[:2] == "| "]
    named = [cell for cell in cells if cell not in ("---", "quantity")]
    assert named == list(ROWS), "docs/conversions.md and the rows computed here differ"
