"""Prints what a step sends between ranks, and how long that and the products take: the tables of docs/scale.md.

    python bench/scale.py

Arithmetic alone, from a model's shape and the assumptions below; nothing is run. docs/scale.md says what is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from xpo_fast.bench.measure import table

TOKENS = 8192  # per rank and step, in one micro-batch
FLOPS = 0.4 * 989e12  # an H100's dense bfloat16 products, at 40% of its rate
FLOP_PER_WEIGHT = 8  # and token: forward 2, backward 4, and the forward again by checkpointing 2
NETWORK = 400e9 / 8  # bytes per second and rank between machines, each rank with a network card of 400 Gb/s
NVLINK = 450e9  # and within a machine
NODE = 8
BF16, FLOAT32 = 2, 4


@dataclass(frozen=True)
class Shape:
    """A model: all weights, those that a token meets, vocabulary and width."""

    name: str
    weights: float
    active: float
    vocab: int
    width: int

    @property
    def compute_s(self) -> float:
        """Seconds of a step's products on one rank."""
        return FLOP_PER_WEIGHT * self.active * TOKENS / FLOPS


SHAPES = (
    Shape("Llama 3.1 8B", 8.03e9, 8.03e9, 128256, 4096),
    Shape("Llama 3.1 70B", 70.6e9, 70.6e9, 128256, 8192),
    Shape("Qwen3 30B-A3B", 30.5e9, 3.3e9, 151936, 2048),
)
# Float32 weights, two moments of Adam and a gradient, kept in parts; what else a rank holds is not in it.
STATE = 4 * FLOAT32


def sharded(shape: Shape, ranks: int) -> tuple[float, float, float]:
    """Returns bytes per rank between machines, bytes within one, and seconds: FSDP2 or ZeRO-3 over all ranks.

    Weights are gathered in bfloat16 for the forward and for the backward, gradients are reduced in bfloat16. A machine
    receives the parts of the others once, through the network cards of its eight ranks; within it, every rank receives
    all. Rings do both at a time.
    """
    total, machines = 3 * BF16 * shape.weights, ranks // NODE
    outside, inside = total * (machines - 1) / machines / NODE, total * (ranks - 1) / ranks
    return outside, inside, max(outside / NETWORK, inside / NVLINK)


def hybrid(shape: Shape, ranks: int) -> tuple[float, float, float]:
    """Returns the same for HSDP: parts within a machine; the gradients of copies are summed in rings of machines."""
    copies = ranks // NODE
    outside, inside = 2 * (copies - 1) / copies * BF16 * shape.weights / NODE, sharded(shape, NODE)[1]
    return outside, inside, outside / NETWORK + inside / NVLINK


LAYOUTS = (
    ("FSDP2 or ZeRO-3, 8 ranks", 8, 8, sharded),
    ("FSDP2 or ZeRO-3, 4 × 8 ranks", 32, 32, sharded),
    ("HSDP, 4 × 8 ranks", 32, NODE, hybrid),
)


def steps() -> str:
    """Returns the table of a step's bytes and seconds by model and layout, in Markdown."""
    header = ("model", "layout", "state per rank", "between machines", "within one", "sending", "products")
    rows = []
    for shape in SHAPES:
        for name, ranks, parts, sent in LAYOUTS:
            outside, inside, seconds = sent(shape, ranks)
            state = f"{STATE * shape.weights / parts / 1e9:.0f} GB"
            cells = (
                f"{outside / 1e9:.1f} GB",
                f"{inside / 1e9:.1f} GB",
                f"{seconds:.2f} s",
                f"{shape.compute_s:.2f} s",
            )
            rows.append((shape.name, name, state, *cells))
    return table(header, rows)


def head() -> str:
    """Returns the table of what the head costs, gathered once per call or split over the vocabulary, in Markdown."""
    header = (
        "model",
        "weight",
        "gathered, and its gradient reduced",
        "products, 3F",
        "of a step",
        "8 ranks, one sequence: whole | split",
    )
    rows = []
    for shape in SHAPES:
        weight = BF16 * shape.vocab * shape.width
        products = 6 * shape.vocab * shape.width * TOKENS / FLOPS
        rows.append(
            (
                shape.name,
                f"{weight / 1e9:.2f} GB",
                f"{1e3 * 2 * weight / NVLINK:.0f} ms",
                f"{1e3 * products:.0f} ms",
                f"{products / shape.compute_s:.0%}",
                f"{1e3 * products:.0f}, {1e3 * products / NODE:.0f} ms",
            )
        )
    return table(header, rows)


if __name__ == "__main__":
    print(steps())
    print()
    print(head())
