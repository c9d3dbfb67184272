"""Several reward models, one for each domain, on one backbone, and a router that picks one for each prompt.

    prompt ── backbone, adapters off ── last hidden state h ── router W h + b ──▶ a domain for each prompt
    prompt, completion ── backbone with that domain's adapter ── its value head ──▶ reward

The experts are folders of `xpo-fast reward` with LoRA adapters on one base model; the router is trained afterwards, on
prompts whose domain is known. (Experts and gate trained together are the method `gated`, with a head for each expert.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..data import pad_rows
from ..files import write_atomically, write_json
from ..layouts import Inputs
from ..models import base_of, install_fused_loss
from ..models.modes import evaluating, without_adapter
from ..models.value_head import detach_value_head, load_value_head
from ..rollout import Prompt
from ..rollout.sampling import encode_prompts
from ..wording import did_you_mean
from .model import RewardModel
from .spec import SPEC_FILE, RewardSpec, load_spec

ROUTER_FILE, WEIGHTS_FILE = "router.json", "router.safetensors"
ROUTES = ("pick", "mix")
# Files of an expert's folder that belong to the model: not its logs, settings and checkpoints.
_OF_MODEL = ("adapter_", "value_head", "reward_model", "tokenizer", "special_", "added_", "chat_template", "vocab",
             "merges", "spiece")  # fmt: skip


def router_loss(
    logits: Tensor,  # (N, K)
    domains: Tensor,  # (N,) integer, each in [0, K)
    weight: Tensor,  # (K, D)
    l2: float,
) -> Tensor:
    """Computes a router's loss (): mean −log softmax(logits)_domain + l2/2 ‖W‖², convex in the router's weights."""
    return cross_entropy(logits, domains) + 0.5 * l2 * weight.square().sum()


def fit_router(
    states: Tensor,  # (N, D)
    domains: Tensor,  # (N,) integer, each in [0, K)
    count: int,
    *,
    l2: float = 1e-3,
    steps: int = 200,
) -> tuple[Tensor, Tensor]:
    """Fits a router by L-BFGS; returns W (K, D) and b (K,) in float32. count: K, the number of domains.

    The states are standardised for the fit, which the weights returned undo, so that l2 weighs every direction alike.
    Its minimum is the only one, so the result depends neither on a seed nor on the order of the rows. Raises ValueError
    for l2 that is not positive, and for a domain without a prompt.
    """
    if not l2 > 0:
        raise ValueError(f"expected l2 > 0, without which domains that a line parts have no finite router; got {l2!r}")
    if len(absent := set(range(count)) - set(domains.tolist())):
        raise ValueError(f"expected prompts of each of {count} domains; got none of domain {min(absent)}")
    x = states.double()
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0).clamp(min=1e-6)
    x = (x - mean) / std
    weight = torch.zeros(count, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=steps, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = router_loss(x @ weight.T + bias, domains, weight, l2)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # pyright: ignore[reportArgumentType]  # a closure of a tensor is what it takes
    weight, bias = weight.detach() / std, bias.detach()
    return weight.float(), (bias - weight @ mean).float()


class RoutedReward:
    """A scorer of completions by the reward model that a router picks for their prompt; used as a `RewardModel` is.

    experts: reward models by domain, which share one PEFT model with an adapter of each domain's name. weight (K, D),
    bias (K,): the router's, or None for one that is still to be trained (`train_router`). how: "pick", the reward of
    the likeliest expert alone; or "mix", the experts' rewards weighed by the router's softmax.
    """

    is_logit = True

    def __init__(
        self,
        experts: Mapping[str, RewardModel],
        sources: Mapping[str, Path],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        how: str = "pick",
    ) -> None:
        if how not in ROUTES:
            raise ValueError(f"how must be one of {', '.join(ROUTES)}, got {how!r}{did_you_mean(how, ROUTES)}")
        self.experts, self.sources, self.how = dict(experts), dict(sources), how
        self.weight, self.bias = weight, bias
        self.__name__ = "routed_reward"

    @property
    def domains(self) -> list[str]:
        """The experts' names, in the order of the router's outputs."""
        return list(self.experts)

    @property
    def model(self) -> Any:
        """The PEFT model that the experts share."""
        return next(iter(self.experts.values())).model

    @property
    def tokenizer(self) -> Any:
        """The first expert's tokenizer."""
        return next(iter(self.experts.values())).tokenizer

    @property
    def spec(self) -> RewardSpec:
        """The first expert's spec; setting it gives every expert its lengths and its length rule."""
        return next(iter(self.experts.values())).spec

    @spec.setter
    def spec(self, spec: RewardSpec) -> None:
        names = ("max_length", "max_prompt_length", "length_alpha", "length_target", "length_lam")
        for expert in self.experts.values():
            expert.spec = dataclasses.replace(expert.spec, **{name: getattr(spec, name) for name in names})

    # --- routing ------------------------------------------------------------------------------------------------------

    def states(self, prompts: Sequence[Prompt]) -> Tensor:
        """Returns the backbone's hidden state of each prompt's last token, adapters off: (R, D) float32 on the CPU."""
        first = next(iter(self.experts.values()))
        assert first.head is not None
        device, width = next(self.model.parameters()).device, first.head.weight.shape[1]
        ids = encode_prompts(prompts, self.tokenizer, first.spec.chat_template_kwargs)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        found = torch.zeros(len(ids), width)
        with evaluating(self.model), without_adapter(self.model):
            for start in range(0, len(order), first.batch_size):
                at = order[start : start + first.batch_size]
                rows = Inputs.of({k: v.to(device) for k, v in pad_rows([(ids[i], ids[i][-1:]) for i in at], 0).items()})

                def last(hidden: Tensor, _: Any, rows: Inputs = rows) -> dict[str, Tensor]:
                    ends = rows.attention_mask.sum(dim=1) - 1
                    return {"states": hidden[torch.arange(len(ends), device=ends.device), ends, :width]}

                found[at] = rows.run(self.model, last)["states"].float().cpu()
        return found

    def probabilities(self, prompts: Sequence[Prompt]) -> Tensor:
        """Returns the router's probability of each domain, (R, K). Raises ValueError before there is a router."""
        if self.weight is None or self.bias is None:
            raise ValueError("the router has not been trained: call train_router(prompts, domains) first")
        return (self.states(prompts) @ self.weight.T + self.bias).softmax(dim=1)

    def route(self, prompts: Sequence[Prompt]) -> list[str]:
        """Returns the domain that the router picks for each prompt."""
        return [self.domains[k] for k in self.probabilities(prompts).argmax(dim=1).tolist()]

    def train_router(self, prompts: Sequence[Prompt], domains: Sequence[str], *, l2: float = 1e-3) -> None:
        """Trains the router on prompts of known domains, see `fit_router`. Raises ValueError for an unknown domain."""
        numbers = {name: k for k, name in enumerate(self.domains)}
        for i, name in enumerate(domains):
            if name not in numbers:
                raise ValueError(
                    f"prompt {i} has the domain {name!r}, for which there is no expert"
                    f"{did_you_mean(str(name), self.domains)}; there are {', '.join(self.domains)}"
                )
        missing = [name for name in self.domains if name not in domains]
        if missing:
            raise ValueError(f"no prompt has the domain {missing[0]!r}: give some, or leave its expert out")
        wanted = torch.tensor([numbers[name] for name in domains])
        self.weight, self.bias = fit_router(self.states(prompts), wanted, len(self.domains), l2=l2)

    # --- scoring ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _active(self, name: str) -> Iterator[RewardModel]:
        """Yields an expert with its adapter on."""
        self.model.set_adapter(name, inference_mode=True)
        yield self.experts[name]

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Any]) -> Tensor:
        """Returns the reward of each completion, (R,) float32 on the CPU."""
        weights = self.probabilities(prompts)
        if self.how == "pick":
            weights = torch.zeros_like(weights).scatter(1, weights.argmax(dim=1, keepdim=True), 1.0)
        rewards = torch.zeros(len(prompts))
        for k, name in enumerate(self.domains):
            at = weights[:, k].nonzero().flatten().tolist()
            if at:
                with self._active(name) as expert:
                    found = expert.score([prompts[i] for i in at], [completions[i] for i in at])
                rewards[at] += weights[at, k] * found
        return rewards

    def compare(self, prompts: Sequence[Prompt], first: Sequence[Any], second: Sequence[Any]) -> Tensor:
        """Returns P(first beats second), (R,): σ of the difference of rewards."""
        return torch.sigmoid(self.score(prompts, first) - self.score(prompts, second))

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Any], **columns: Any) -> list[float]:
        """Returns the rewards as a reward function does."""
        return self.score(prompts, completions).tolist()

    # --- files --------------------------------------------------------------------------------------------------------

    @classmethod
    def of(cls, folders: Mapping[str, str | Path], *, how: str = "pick", batch_size: int = 16, **options: Any) -> Any:
        """Loads experts by domain, each a folder of `xpo-fast reward` with an adapter, onto one base model.

        options: of `RewardModel.load`. Raises ValueError for fewer than two, for a folder without an adapter or that is
        no reward model, for a preference model, and for experts on different base models.
        """
        sources = {name: Path(folder) for name, folder in folders.items()}
        if len(sources) < 2:
            raise ValueError(f"a router picks among two experts or more, got {', '.join(sources) or 'none'}")
        for name in sources:  # of an adapter, and of a folder
            if name == "default" or "." in name or name != Path(name).name:
                raise ValueError(f"an expert cannot be named {name!r}: take a word without . and /, other than default")
        bases = {name: _base_of(name, folder) for name, folder in sources.items()}
        (first, base), *others = bases.items()
        for name, other in others:
            if other != base:
                raise ValueError(
                    f"the experts are adapters on one base model; {first} is on {base!r}, and {name} on {other!r}"
                )
        experts: dict[str, RewardModel] = {}
        model: Any = None
        for name, folder in sources.items():
            if model is None:
                model = RewardModel.load(folder, **options).model
            result: Any = model.load_adapter(str(folder), adapter_name=name, is_trainable=False)
            lost = [key for key in getattr(result, "missing_keys", ()) if f".{name}." in key]
            if lost:
                raise ValueError(f"the adapter in {str(folder)!r} lacks weights: {lost[0]} and {len(lost) - 1} others")
            detach_value_head(model)
            head = load_value_head(model, folder)
            head.requires_grad_(False)
            experts[name] = RewardModel(model, _tokenizer_of(folder, options), load_spec(folder), batch_size=batch_size)
        detach_value_head(model)
        model.set_adapter(first, inference_mode=True)
        model.delete_adapter("default")
        install_fused_loss(model)
        return cls(experts, sources, how=how)

    def save(self, folder: str | Path) -> None:
        """Writes the router and a folder for each expert, which `load` reads. Raises ValueError without a router."""
        from safetensors.torch import save

        if self.weight is None or self.bias is None:
            raise ValueError("the router has not been trained: call train_router(prompts, domains) first")
        folder = Path(folder)
        for name, source in self.sources.items():
            target = folder / name
            target.mkdir(parents=True, exist_ok=True)
            for path in source.iterdir():
                if path.is_file() and path.name.startswith(_OF_MODEL) and path.parent != target:
                    shutil.copyfile(path, target / path.name)
        weights = {"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}
        write_atomically(folder / WEIGHTS_FILE, save(weights))
        write_json(folder / ROUTER_FILE, {"experts": self.domains, "how": self.how})

    @classmethod
    def load(cls, folder: str | Path, **options: Any) -> RoutedReward:
        """Loads a folder of `save`; options: of `RewardModel.load`. Raises ValueError for another folder."""
        from safetensors.torch import load_file

        folder = Path(folder)
        if not (folder / ROUTER_FILE).is_file():
            raise ValueError(f"no {ROUTER_FILE} in {folder}: expected a folder of `xpo-fast router`")
        about = json.loads((folder / ROUTER_FILE).read_text(encoding="utf-8"))
        made = cls.of({name: folder / name for name in about["experts"]}, how=about["how"], **options)
        found = load_file(folder / WEIGHTS_FILE)
        made.weight, made.bias = found["weight"], found["bias"]
        return made


def load_scorer(source: str | Path, **options: Any) -> RewardModel | RoutedReward:
    """Loads what scores completions: a router's folder, or whatever `RewardModel.load` takes; options: its own."""
    if (Path(source) / ROUTER_FILE).is_file():
        return RoutedReward.load(source, **options)
    return RewardModel.load(source, **options)


def _base_of(name: str, folder: Path) -> str:
    if not (folder / SPEC_FILE).is_file():
        raise ValueError(f"the expert {name}: no {SPEC_FILE} in {folder}; expected a folder of `xpo-fast reward`")
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"the expert {name} in {folder} is a whole model, and experts are adapters on one: train it with --lora"
        )
    if load_spec(folder).form == "preference":
        raise ValueError(f"the expert {name} in {folder} is a preference model, which has no reward of one completion")
    return base_of(str(folder))


def _tokenizer_of(folder: Path, options: dict[str, Any]) -> Any:
    from ..models.loading import load_tokenizer

    return load_tokenizer(folder, {k: v for k, v in options.items() if k not in ("dtype", "device", "layout")})
