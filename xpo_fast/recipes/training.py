"""Training in one iteration: preference methods on the selected rows, adapters side by side, a reward model, RL."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from transformers import PrinterCallback, TrainerCallback

from .. import data
from ..data import KINDS
from ..files import appearing, finite, write_atomically, write_json
from ..models import merge, remove_fused_loss, saving_embeddings
from ..resume import last_checkpoint
from ..rewards.judges import FunctionJudge, text_of, win_rate
from ..rewards.spec import READS_SAMPLES, SOFT_LABELS
from ..rewards.trainer import RewardConfig, RewardTrainer
from ..rl import STATE_FILE, RLConfig, RLTrainer
from ..rl.sample_log import SAMPLES_FILE
from ..seeds import seed_of_repr
from ..trainer import XPOConfig, XPOTrainer
from .mixture import AgainstMixture, MixtureRollout
from .recipe import Recipe, Train
from .run_folder import read_blocks
from .setup import Policies, Policy, Row, Setup, arguments, columns, xpo_config

Write = Callable[[Path], Any]  # writes a model into a new folder


@dataclass(frozen=True)
class Iteration:
    """What one iteration trains on and from."""

    recipe: Recipe
    setup: Setup
    policies: Policies
    index: int
    folder: Path
    rows: list[Row]
    models: list[str]  # at the start and after each iteration so far; the last one is trained

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints during training."""
        return self.folder / "train"

    def config(self, kind: type, folder: Path, train: Train, k: int = 0, **further: Any) -> Any:
        """Returns the arguments, of the class `kind`, that method k is trained with."""
        cache = {"ref_cache_dir": str(self.setup.output / "reference")} if kind is XPOConfig else {}
        settings = {**cache, **self.setup.training, **further}
        seed = seed_of_repr(self.setup.seed, self.index, "train", k)
        settings |= {"method": train.method, "method_args": dict(train.args), "seed": seed}
        return arguments(kind, folder, settings)

    def start(self) -> tuple[Any, dict[str, Any]]:
        """Returns the model to train, and its tokenizer and adapter as a trainer takes them."""
        model, tokenizer = self.policies.take(self.models[-1])
        return model, {"processing_class": tokenizer, "peft_config": copy.deepcopy(self.setup.peft_config)}

    def fit(self, trainer: Any, train: Train, checkpoint: str | None) -> list[Any]:
        """Trains, from the checkpoint if there is one; returns the log."""
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_Progress(self.setup.say, f"iteration {self.index + 1}, {train}"))
        trainer.train(resume_from_checkpoint=checkpoint)
        return finite(trainer.state.log_history)


def train(it: Iteration) -> str:
    """Trains on the rows, unless that has been done; returns the folder of the trained model.

    Where nothing is trained, that is the last model's.
    """
    if not it.recipe.train:
        return it.models[-1]
    final, log = it.folder / "model", it.folder / "train_log.json"
    if not log.is_file():  # written last; the model itself may have been removed since
        if it.recipe.online:
            write, logs = _train_online(it)
        elif it.recipe.makes_reward_model:
            write, logs = train_reward(it)
        elif len(it.recipe.train) > 1:
            write, logs = _train_side_by_side(it)
        else:
            trainer, logs = _train_offline(it, 0, it.checkpoints)
            write = _merged(trainer)
        with appearing(final, sole_writer=True) as part:
            write(part)
        write_json(log, logs, ensure_ascii=False)
    shutil.rmtree(it.checkpoints, ignore_errors=True)
    return str(final)


def _train_offline(it: Iteration, k: int, folder: Path) -> tuple[XPOTrainer, list[Any]]:
    """Trains method k on the rows; returns its trainer and log."""
    method = it.recipe.train[k]
    model, about = it.start()
    dataset = with_reference(it, _dataset(it, method, about["processing_class"]), method)
    known = KINDS[it.recipe.kind(method)].reference[0] in dataset.column_names
    further = {"reference": "cached"} if known else {}  # not the model with its adapter switched off
    config, callbacks = it.config(XPOConfig, folder, method, k, **further), [L1(method.l1)] if method.l1 else None
    trainer = XPOTrainer(model, config, train_dataset=dataset, callbacks=callbacks, **about)
    return trainer, it.fit(trainer, method, last_checkpoint(folder))


def _dataset(it: Iteration, method: Train, tokenizer: Any) -> datasets.Dataset:
    """Returns the rows as token ids: the sampled ones, or the encoded text of the data's own completions."""
    kind = it.recipe.kind(method)
    if "prompt_ids" in it.rows[0]:
        # The sampled ids: a completion that was cut off has no EOS, and nothing is tokenized twice.
        kept = [n for n in it.rows[0] if n.endswith("_ids") or n in KINDS[kind].numbers]
        return datasets.Dataset.from_list([{name: row[name] for name in kept} for row in it.rows])
    how = xpo_config(it.setup).encoding()
    return data.encode(data.load(it.rows, kind=kind), tokenizer, kind=kind, **how)


def with_reference(it: Iteration, dataset: datasets.Dataset, method: Train) -> datasets.Dataset:
    """Returns the data, with the reference's log-probs if the reference is not the model that training begins with."""
    if it.recipe.reference not in ("fixed", "two") or len(it.models) == 1:
        return dataset
    fixed = _referenced(it, dataset, method, it.models[0])
    if it.recipe.reference == "fixed":
        return fixed
    previous = _referenced(it, dataset, method, it.models[-1])
    both = [[*own[:-1], last[-1]] for own, last in zip(fixed["ref_logp"], previous["ref_logp"])]
    return data.with_column(fixed.remove_columns(["ref_logp"]), "ref_logp", both)


def _referenced(it: Iteration, dataset: datasets.Dataset, method: Train, name: str) -> datasets.Dataset:
    """Returns the data with the log-probs of the model `name`."""
    model, tokenizer = Policy(it.setup, name).loaded
    config = it.config(XPOConfig, it.setup.output / "reference", method, reference="cached")
    trainer = XPOTrainer(model, config, train_dataset=dataset, processing_class=tokenizer)
    trainer.prepare()
    return trainer.train_dataset


def _train_side_by_side(it: Iteration) -> tuple[Write, list[Any]]:
    """Trains an adapter per method, all on the same base; then combines them into one and merges it into the base."""
    from peft import PeftModel

    names = [f"{k}-{method.method}" for k, method in enumerate(it.recipe.train)]
    paths, logs = [it.folder / f"adapter-{name}" for name in names], []
    for k, path in enumerate(paths):
        log = it.folder / f"{path.name}.json"
        if not path.is_dir():
            trainer, _ = _train_offline(it, k, it.checkpoints / str(k))
            # The log first: an adapter that exists is not trained again.
            write_json(log, trainer.state.log_history, ensure_ascii=False)
            with appearing(path, sole_writer=True) as part, saving_embeddings(trainer.model):
                trainer.model.save_pretrained(part)
        logs.append(json.loads(log.read_text(encoding="utf-8")))
    base, tokenizer = it.policies.take(it.models[-1])
    model: Any = PeftModel.from_pretrained(base, str(paths[0]), adapter_name=names[0])
    for name, path in zip(names[1:], paths[1:]):
        model.load_adapter(str(path), adapter_name=name)
    model.add_weighted_adapter(names, adapter_name="merged", **{"weights": [1.0] * len(names), **it.recipe.merge})
    return _writer(merge(model, ["merged"]), tokenizer), logs


def train_reward(it: Iteration) -> tuple[Write, list[Any]]:
    """Trains a reward model on the pairs without an empty completion; `rlp` and `meta` on the samples, too."""
    method = it.recipe.train[0]
    model, about = it.start()
    texts = ("prompt", "chosen", "rejected")
    # The judge's probabilities are soft labels for the methods that take them.
    kept = (*texts, data.TOOLS, data.KWARGS, *(["prob"] if method.method in SOFT_LABELS else []))
    pairs = [
        {name: row[name] for name in kept if name in row}
        for row in it.rows
        if all(text_of(row[name]).strip() for name in texts)
    ]
    if len(pairs) < len(it.rows):
        empty = len(it.rows) - len(pairs)
        it.setup.say(f"iteration {it.index + 1}: {empty} pairs with an empty completion are left out")
    if method.method in READS_SAMPLES:
        about["samples"] = samples_of(it)
    trainer = RewardTrainer(model, it.config(RewardConfig, it.checkpoints, method), train_dataset=pairs, **about)
    logs = it.fit(trainer, method, last_checkpoint(it.checkpoints))
    return trainer.reward_model().save, logs


def samples_of(it: Iteration) -> list[Row]:
    """Returns what has been sampled in this iteration, a row for each prompt, as `load_samples` reads it.

    The data's own answers and empty samples are left out. Raises ValueError if no other is there.
    """
    rows = []
    for line in read_blocks(it.folder, "samples"):
        drawn = zip(line["completions"], line["draw"], strict=True)
        texts = [completion for completion, draw in drawn if draw >= 0 and text_of(completion).strip()]
        about = {name: line[name] for name in ("prompt", data.TOOLS, data.KWARGS) if name in line}
        rows += [{**about, "completions": texts}] if texts else []
    if not rows:
        raise ValueError(
            f"recipe {it.recipe.name}: every sample is empty, and {it.recipe.train[0]} learns from them; {it.folder}"
        )
    return rows


def _train_online(it: Iteration) -> tuple[Write, list[Any]]:
    """Trains on samples as they are drawn and judged; the rows are prompts."""
    method, draw, judge = it.recipe.train[0], it.recipe.draws[0], it.setup.judge
    assert judge is not None
    sampling = draw.sampling(it.setup.sampling)
    model, about = it.start()
    drawn = {"num_generations": draw.n, **dataclasses.asdict(sampling)}
    config = it.config(RLConfig, it.checkpoints, method, **drawn)
    against = AgainstMixture(judge, sampling, config.seed)
    rewards: Any = judge if judge.scores else win_rate(judge)
    if it.recipe.draws_rivals:
        rewards = against
    elif isinstance(judge, FunctionJudge):
        rewards = judge.rewards
    prompts = [{name: row.get(name) for name in ("prompt", *columns(it.rows))} for row in it.rows]
    trainer = RLTrainer(model, rewards, config, train_dataset=prompts, **about)
    if it.recipe.draws_rivals:
        reference: Any = trainer.moving_reference
        how: Any = {"reference": reference.copy, "scoring": reference.scoring, "share": it.recipe.mix}
        how["chat_template_kwargs"] = config.chat_template_kwargs
        against.rollout = MixtureRollout(trainer.model, about["processing_class"], **how)
    logs = it.fit(trainer, method, last_checkpoint(config.output_dir, STATE_FILE))
    samples = it.checkpoints / SAMPLES_FILE
    if samples.is_file():
        write_atomically(it.folder / SAMPLES_FILE, samples.read_bytes())
    return _merged(trainer), logs


def _merged(trainer: Any) -> Write:
    """Returns a function that writes the trained model, an adapter merged into it."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    model = merge(model) if hasattr(model, "merge_and_unload") else model
    return _writer(model, trainer.processing_class)


def _writer(model: Any, tokenizer: Any) -> Write:
    """Returns a function that writes the model, as `transformers` loads it, and its tokenizer."""

    def write(path: Path) -> None:
        remove_fused_loss(model)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)

    return write


class L1(TrainerCallback):
    """Adds the gradient of λ‖θ‖₁, λ·sign(θ), to that of each trained weight before the step; it is not clipped."""

    def __init__(self, lam: float) -> None:
        self.lam = lam

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Adds λ·sign(θ) to the gradients."""
        for p in model.parameters():
            if p.grad is not None:
                p.grad.add_(p.detach().sign(), alpha=self.lam)


class _Progress(TrainerCallback):
    """Tells the loss at each log of the trainer, one line each."""

    def __init__(self, say: Callable[[str], Any], what: str) -> None:
        self.say, self.what = say, what

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            self.say(f"{self.what}: step {state.global_step} of {state.max_steps}, loss {logs['loss']:.4f}")
