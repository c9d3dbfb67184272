"""TRL 1.16 on this engine: `install()` for the trainers on its fused head, subclasses for others.

    from xpo_fast.integrations.trl import install
    install()            # SFT, DPO, KTO, GRPO, RLOO, AsyncGRPO: log-probs and their statistics are this engine's
    install(layout="auto")  # and no padding, a common prompt read once: not for AsyncGRPO, but for reward models

`DPOTrainer` with `DPOConfig` (dpo.py) is TRL's with the pairwise methods of this project as further `loss_type`s.
`CPOTrainer`, `ORPOTrainer`, `TPOTrainer` and `OnlineDPOTrainer` (experimental.py) are TRL's experimental ones without
logits: the same losses and metrics. These five need no `install()`.

Not reached, and run as they are: GKD, GOLD, SDFT, SDPO and the distillation trainers, which compare whole distributions
of a teacher and a student; A2PO, which computes logits of its own. BCO is no longer in TRL: its pairwise form is DPO's
`bco_pair`, its unpaired one the method `bco` of `xpo_fast.trainer`.
"""

from .dpo import DPO_LOSS_TYPES, DPOConfig, DPOTrainer
from .experimental import CPOTrainer, OnlineDPOTrainer, ORPOTrainer, TPOTrainer
from .head import HeadFunction
from .install import install, uninstall
from .seams import installed

__all__ = [
    "DPO_LOSS_TYPES",
    "CPOTrainer",
    "DPOConfig",
    "DPOTrainer",
    "HeadFunction",
    "ORPOTrainer",
    "OnlineDPOTrainer",
    "TPOTrainer",
    "install",
    "installed",
    "uninstall",
]
