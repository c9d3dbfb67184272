"""Goal-conditioned reward models: the contrast of states along completions, the goal, and Q-values of what is begun."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, logsigmoid, normalize

from .. import data
from ..files import write_atomically
from ..layouts import Inputs
from ..rollout import Prompt
from ..rollout.sampling import encode_prompts
from ..rollout.scoring import score_tokens
from ..types import IGNORE_INDEX
from .encoding import in_batches
from .judges import Completion, Judge
from .model import RewardModel

GOAL_FILE = "goal_state.safetensors"
STATES = 64  # of a completion that `contrast` pairs, at most; more are spaced evenly
_ROWS = 256  # whose last states make the goal, at most; of more every so many


def contrast(
    hidden: Tensor,  # (R, T, D)
    targets: Tensor,  # (R, T) aligned
    *,
    alike: bool,
) -> Tensor:
    """Computes the mean over pairs s < g of a row's states of −log σ(f), (R,) float32; f the cosine, or minus it.

    alike: whether states are to be alike (−log σ(cos)) or not (−log(1 − σ(cos)) = −log σ(−cos)). The states of a row
    are those that predict its targets, in order, and the one behind the last of them, so that a completion of one token
    has a pair; of more than `STATES`, these many evenly spaced, the first and the last among them. 0 for a row without
    targets.
    """
    scored = targets != IGNORE_INDEX
    count = scored.sum(dim=1)  # states but the last
    first = scored.int().argmax(dim=1)
    last = targets.shape[1] - 1 - scored.flip(1).int().argmax(dim=1) + 1
    most = min(STATES, targets.shape[1] + 1)
    # The k-th of `most` places between the first state and the last; rows with fewer states have each once.
    ranks = torch.arange(most, device=hidden.device)
    span = (last - first).clamp(min=0)
    few = span < most
    spaced = (ranks * span[:, None] + (most - 1) // 2) // max(most - 1, 1)
    at = first[:, None] + torch.where(few[:, None], ranks, spaced)
    # A place between targets that are not scored is no state of the completion.
    inside = at.clamp(max=targets.shape[1] - 1)
    exists = (at == last[:, None]) | ((at < last[:, None]) & scored.gather(1, inside))
    exists &= (count > 0)[:, None]
    kind = hidden.device.type
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext():
        states = normalize(hidden.gather(1, inside[..., None].expand(-1, -1, hidden.shape[2])).float(), dim=-1)
        f = states @ states.mT  # (R, S, S)
        pairs = (exists[:, :, None] & exists[:, None, :]).triu(diagonal=1)
        terms = -logsigmoid(f if alike else -f)
        return torch.where(pairs, terms, 0.0).sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)).clamp(min=1)


def goal_state(model: RewardModel, rows: Any) -> Tensor:
    """Computes the goal (D,), float32 on the CPU: the mean of the last hidden states of the rows' chosen completions.

    rows: encoded, with prompt_ids and chosen_ids; of more than 256, these many evenly spaced.
    """
    head = model.head
    assert head is not None
    step = -(-len(rows) // _ROWS)
    some = [rows[i] for i in range(0, len(rows), step)]
    features = [{name: row[name] for name in ("prompt_ids", "chosen_ids")} for row in some]

    def last(batch: Mapping[str, Any]) -> Tensor:
        inputs = Inputs.of(batch)

        def read(hidden: Tensor, _: Any) -> dict[str, Tensor]:
            states = model.spec.states(hidden, inputs.attention_mask, inputs.targets)
            return {"states": states[:, 0, : head.weight.shape[1]]}

        return inputs.run(model.model, read)["states"]

    return in_batches(features, model.model, model.tokenizer, model.batch_size, last).mean(dim=0)


def save_goal(goal: Tensor, folder: str | Path) -> None:
    """Writes the goal (D,) into folder/goal_state.safetensors, which appears complete."""
    from safetensors.torch import save

    write_atomically(Path(folder) / GOAL_FILE, save({"goal": goal.contiguous()}))


def load_goal(folder: str | Path) -> Tensor:
    """Returns the goal (D,) of a folder. Raises ValueError if it has none."""
    from safetensors.torch import load_file

    path = Path(folder) / GOAL_FILE
    if not path.is_file():
        raise ValueError(
            f"no {GOAL_FILE} in {folder}: expected the folder of a reward model that goal_conditioned has trained "
            "(xpo-fast reward --method goal_conditioned)"
        )
    return load_file(path)["goal"]


class GoalJudge(Judge):
    """A judge by Q-values, of completions that are finished or only begun: Q(h_t) = cos(h_t, goal), in [−1, 1].

    model: a reward model trained by goal_conditioned. goal: (D,), `goal_state` of it. The score of a completion is the
    Q-value of its last token; text is read as it stands, without EOS, as a sampler goes on from it.
    """

    def __init__(self, model: RewardModel, goal: Tensor) -> None:
        width = None if model.head is None else model.head.weight.shape[1]
        if width is None or goal.shape != (width,):
            raise ValueError(f"expected a goal ({width},), of the width of the model's states, got {tuple(goal.shape)}")
        self.model, self.goal = model, goal

    @classmethod
    def load(cls, folder: str | Path, **options: Any) -> GoalJudge:
        """Returns the judge of a folder of `xpo-fast reward --method goal_conditioned`, see `RewardModel.load`."""
        goal = load_goal(folder)
        return cls(RewardModel.load(folder, **options), goal)

    def q_values(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Tensor]:
        """Returns the Q-value of each token of each completion, (tokens,) float32 on the CPU.

        A completion without a token has the Q-value of its prompt's last token, (1,).
        """
        tokenizer, kwargs = self.model.tokenizer, self.model.spec.chat_template_kwargs
        fronts = encode_prompts(prompts, tokenizer, kwargs)
        texts = [c if isinstance(c, str) else data.words(c[-1]) for c in completions]
        begun = [data.tokenize_after(tokenizer, text) if text else [] for text in texts]
        # What is scored is the state in front of a token: behind the last there is one more, which is not read.
        rows = [(front, [*ids, front[-1]]) for front, ids in zip(fronts, begun, strict=True)]
        goal = self.goal.to(next(self.model.model.parameters()).device)

        def score(hidden: Tensor, head: Any, targets: Tensor) -> dict[str, Tensor]:
            return {"q": cosine_similarity(hidden[..., : len(goal)].float(), goal, dim=-1)}

        found = score_tokens(self.model.model, rows, ("q",), score, batch_size=self.model.batch_size)["q"]
        return [q[1 : 1 + len(ids)] if ids else q[:1] for q, ids in zip(found, begun, strict=True)]

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion], **columns: Any) -> Tensor:
        """Returns the Q-value of each completion's last token, (R,) float32."""
        return torch.stack([q[-1] for q in self.q_values(prompts, completions)]) if len(prompts) else torch.zeros(0)

    def kept(self, prompts: Sequence[Prompt], begun: Sequence[Completion], share: float = 0.5) -> Tensor:
        """Returns which of the completions begun for each prompt to go on with, (R,) bool: the filter at decoding.

        share: of each prompt's completions, those of the highest Q-values, one at least; prompts that are equal are one
        prompt. Of equal Q-values the earlier completion is kept. Raises ValueError for a share outside (0, 1].
        """
        if not 0 < share <= 1:
            raise ValueError(f"expected a share of the completions in (0, 1], got {share!r}")
        scores = self.score(prompts, begun)
        groups: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            groups.setdefault(repr(prompt), []).append(i)
        keep = torch.zeros(len(prompts), dtype=torch.bool)
        for group in groups.values():
            best = sorted(group, key=lambda i: -float(scores[i]))
            keep[best[: max(round(share * len(group)), 1)]] = True
        return keep
