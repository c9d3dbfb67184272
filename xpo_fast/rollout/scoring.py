"""Log-probs of sampled completions by our head, token by token, and the padded batches that they are computed from.

Sampling draws token t of a completion from q = softmax(z/T) cut to its top k and top p and normalised again.
`Samples.logps` are log q where the sampler reports them; `sample_logps` are the log-probs of p = softmax(z/T) itself.
Without cuts the two agree. With cuts log p = log q + log p(kept) ≤ log q, token by token: a ratio π/π_old of two uncut
policies is then not the ratio to the distribution sampled from. exp(sample_logps − Samples.logps) is that ratio, and it
corrects only inside the tokens kept: there are no samples of the others. Train with top_p = 1 and no top_k, unless this
is intended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..data import pad_rows
from ..head import token_logps
from ..layouts import Inputs, LaysOut, side_by_side
from ..models import Head, install_fused_loss
from ..models.lm_head import unwrapped
from ..models.modes import evaluating
from .sampling import Samples


def sample_logps(
    model: nn.Module,
    samples: Samples,
    *,
    temperature: float = 1.0,
    batch_size: int = 8,
    backend: str = "auto",
    layout: str = "padded",
) -> Tensor:
    """Computes the log-prob of every token of the completions: (R, T) float32 on the CPU, 0 outside `samples.mask`.

    log softmax(z/temperature)[token] at 1F by the head, without a (tokens × vocabulary) tensor, in eval mode and
    without gradient; EOS and stop strings are scored, too. temperature: that of the sampling; for top_p and top_k see
    the top of this file. model: carries `install_fused_loss` or gets it; it may be wrapped (DDP, PEFT), its adapter
    stays as it is. In a mixed-precision run put its autocast around the call. layout: how the model reads the rows, see
    `score_tokens`. Raises ValueError for temperature 0, which is no distribution.
    """
    if not temperature > 0:
        raise ValueError(
            f"expected a temperature of more than 0, got {temperature!r}: greedy completions were not drawn from a "
            "distribution; their log-probs at temperature 1 may be what is meant"
        )
    install_fused_loss(unwrapped(model))

    def score(hidden: Tensor, head: Head, targets: Tensor) -> dict[str, Tensor]:
        return {"logps": token_logps(hidden, head, targets, temperature=temperature, backend=backend)}

    rows = list(zip(samples.prompt_ids, samples.completion_ids, strict=True))
    return score_tokens(model, rows, ("logps",), score, batch_size=batch_size, layout=layout)["logps"]


def score_tokens(
    model: nn.Module,
    rows: Sequence[tuple[list[int], list[int]]],
    names: Sequence[str],
    score: Callable[[Tensor, Head, Tensor], dict[str, Tensor]],
    *,
    batch_size: int,
    pad: int = 0,
    layout: str = "padded",
) -> dict[str, Tensor]:
    """Computes scores of every completion token by name: (R, C) float32 on the CPU each, 0 after a row's end.

    rows: R pairs (prompt ids, completion ids), the completions of at most C tokens. score(hidden, head, targets)
    returns (B, S) under each of `names`; it is called inside the forward of `model`, which carries
    `install_fused_loss`, in eval mode and without gradient. Rows of similar length share a batch, the longest first.
    layout: "padded", "packed" or "shared", in which rows of one prompt share a batch, and the prompt is read once.
    """
    device = next(model.parameters()).device
    found = {name: torch.zeros(len(rows), max((len(ids) for _, ids in rows), default=0)) for name in names}
    filled = [i for i, (_, ids) in enumerate(rows) if ids]
    if layout == "shared":
        order = [filled[k] for k in side_by_side([rows[i] for i in filled])]
    else:
        order = sorted(filled, key=lambda i: -len(rows[i][0]) - len(rows[i][1]))
    collate = LaysOut(lambda of: pad_rows(of, pad), layout)
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            at = order[start : start + batch_size]
            inputs = Inputs.of({k: v.to(device) for k, v in collate([rows[i] for i in at]).items()})
            scored = inputs.run(model, lambda hidden, head, t=inputs.targets: score(hidden, head, t))
            for name in names:
                for i, row in zip(at, scored[name].float().cpu(), strict=True):
                    first, count = len(rows[i][0]) - 1, len(rows[i][1])
                    found[name][i, :count] = row[first : first + count]
    return found
