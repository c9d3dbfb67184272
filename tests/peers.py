"""TRL 1.16, called on tensors: a stand-in for its trainers, and for a model with given log-probs."""

import functools
import importlib.metadata
import warnings
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F


def peer(module, distribution, series):
    """A peer's module. The test that asks is skipped without it, and fails with another series of versions: it calls
    internals, and constraints.txt pins them."""
    found = pytest.importorskip(module, reason="peers are an optional extra: pip install xpo_fast[bench]")
    version = importlib.metadata.version(distribution)
    if not version.startswith(series):
        pytest.fail(f"calls the internals of {distribution} {series}*, found {version}: install by constraints.txt")
    return found


@functools.cache
def trl():
    """TRL's trainers by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever TRL and what it imports have to say on import
        peer("trl", "trl", "1.16.")
        from trl.experimental.cpo import CPOTrainer
        from trl.experimental.orpo import ORPOTrainer
        from trl.trainer.dpo_trainer import DPOTrainer
        from trl.trainer.kto_trainer import KTOTrainer
    return SimpleNamespace(dpo=DPOTrainer, kto=KTOTrainer, cpo=CPOTrainer, orpo=ORPOTrainer)


def trainer_like(**fields):
    """What the trainers' loss methods read from `self`."""
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    metrics, model = defaultdict(lambda: defaultdict(list)), SimpleNamespace(training=False)
    fields |= {"aux_loss_enabled": False, "precompute_ref_logps": True, "_total_train_tokens": 0}
    return SimpleNamespace(accelerator=accelerator, model=model, _metrics=metrics, **fields)


def scored(logps, lengths):
    """A model whose completions have these summed log-probs (B,) and lengths (B,), and its batch."""
    mask = torch.arange(1, 1 + int(lengths.max())) <= lengths[:, None]
    log_probs = torch.where(mask, (logps / lengths)[:, None], 0.0)
    zeros = torch.zeros_like(log_probs)
    outputs = SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    completion_mask = F.pad(mask, (1, 0)).long()  # one prompt token
    ids = torch.zeros_like(completion_mask)
    inputs = {"input_ids": ids, "attention_mask": ids + 1, "completion_mask": completion_mask}
    return lambda **_: outputs, inputs


def trl_dpo(given, loss_type, divergence="reverse_kl", alpha=1.0, tau=0.05, **fields):
    """DPOTrainer's loss of these pairs, the mean over the batch."""
    model, inputs = scored(*(torch.cat([given[k + "_w"], given[k + "_l"]]) for k in ("logp", "len")))
    inputs |= {"ref_chosen_logps": given["ref_logp_w"], "ref_rejected_logps": given["ref_logp_l"]}
    fields |= {"loss_types": [loss_type], "loss_weights": [1.0], "use_weighting": False, "ld_alpha": None}
    fields |= {"f_divergence_type": divergence, "f_alpha_divergence_coef": alpha}
    trainer = trainer_like(args=SimpleNamespace(discopop_tau=tau), **fields)
    return trl().dpo._compute_loss(trainer, model, inputs, return_outputs=False)


def trl_kto(given, loss_type, **fields):
    """KTOTrainer's loss of these rows, the mean over the batch."""
    model, inputs = scored(given["logp"], given["length"])
    shifted = given["kl"].expand_as(given["logp"])  # mismatched pairs whose mean log-ratio is kl
    inputs |= {"label": given["desirable"], "ref_logps": given["ref_logp"], "ref_KL_logps": shifted * 0}
    fields |= {"loss_type": loss_type, "calculate_KL": loss_type == "kto"}
    trainer = trainer_like(_compute_kl_logps=lambda *_: shifted, **fields)
    return trl().kto._compute_loss(trainer, model, inputs, return_outputs=False)


def trl_cpo(given, loss_type, **fields):
    logps = [given["logp_" + s] / (given["len_" + s] if loss_type == "simpo" else 1) for s in "wl"]
    trainer = trainer_like(alpha=0.0, loss_type=loss_type, label_smoothing=0.0, **fields)
    return trl().cpo.cpo_loss(trainer, *logps)[0].mean()


def trl_orpo(given, beta):
    means = [given["logp_" + s] / given["len_" + s] for s in "wl"]
    return (-means[0] - trl().orpo.odds_ratio_loss(trainer_like(beta=beta), *means)[0]).mean()
