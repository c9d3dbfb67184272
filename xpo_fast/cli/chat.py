"""`xpo-fast chat`: talks to the policy before training and after it, side by side."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..files import saving
from . import loading, options, policies, training
from .columns import Columns
from .parser import UsageError

_COMMANDS = "/reset forgets the conversation, /system TEXT begins one with instructions, /quit or Ctrl-D ends"


def add_parser(commands: Any) -> None:
    """Adds `xpo-fast chat`."""
    parser = commands.add_parser(
        "chat",
        help="talk to the policy before and after training, side by side",
        description="Talk to what a run trained and to what it began with, side by side: an adapter switched on and "
        "off, or the trained model and its base. Each side has its own conversation. In it, /reset forgets the "
        "conversation, /system TEXT begins one with instructions, /quit or Ctrl-D ends; Ctrl-C ends an answer.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("folder", metavar="RUN", help="--output-dir of xpo-fast train, rl or recipe")
    add = options.adder(parser)
    add("--prompt TEXT", "answer this and end; may be repeated, and then each is a conversation of its own", [])
    add("--system TEXT", "instructions that conversations begin with")
    add("--before MODEL", "the policy to compare with, where the run does not tell, or another one")
    about = "--output-dir of xpo-fast recipe bpo, or its model: it rewrites what is asked before both sides read it"
    add("--rewriter RUN", about)
    about = "a reward model by goal_conditioned: answers are sampled block by block, and what has begun best by its "
    add("--goal FOLDER", f"{about}Q-value goes on, on both sides; needs a --temperature above 0")
    add("--goal-candidates N", "with --goal: how many beginnings are sampled, of which one goes on (4)", type=int)
    add("--goal-block TOKENS", "with --goal: tokens between two choices (16)", type=int)
    add("--json", "write one JSON object per answer: prompt, rewritten, before, after, finish", False)
    add(
        "--save",
        "append the answers to a conversation's first message to answers.jsonl in RUN, which `xpo-fast report` shows",
        False,
    )
    add("--max-new-tokens N", "longest answer", 256)
    add("--temperature X", "0: the most likely token each time", 0.0)
    add("--top-p P", "draw from the most likely tokens with this share of the probability", 1.0)
    add("--top-k K", "draw from the K most likely tokens (default: all)", type=int)
    add("--stop TEXT", "a text that ends an answer; may be repeated", [])
    add("--seed N", "seed of what is drawn, the same on both sides", 42)
    add("--dtype", f"dtype of the weights; auto: {options.AUTO_DTYPE.rstrip(',')}", "auto", choices=options.DTYPES)
    add("--trust-remote-code", "run code that comes with a model of the hub", False)
    options.add_device(parser, "run")


@dataclass
class Side:
    """One of the two policies: its sampler, the context in which it answers, and its conversation."""

    name: str
    rollout: Any
    context: Callable[[], Any]
    templated: bool  # whether it has a chat template
    messages: list[dict[str, str]] = field(default_factory=list)

    def prompt(self, request: str | None = None) -> Any:
        """Returns the conversation as the sampler takes it: messages, or their texts where there is no template.

        request: what the last message says instead.
        """
        turns = [*self.messages[:-1], {**self.messages[-1], "content": request}] if request else list(self.messages)
        return turns if self.templated else "\n".join(m["content"] for m in turns)


def run(args: argparse.Namespace) -> int:
    """Answers the prompts of the command line, or those that are typed."""
    from ..rollout import Sampling

    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.top_k, tuple(args.stop))
    if not 0 <= args.seed < 2**32:
        raise UsageError(f"--seed must be from 0 to 2**32 - 1, got {args.seed}")
    if any(not text.strip() for text in args.prompt):
        raise UsageError("--prompt is empty: write what is to be answered")
    _check_goal(args)
    trained = policies.find(args.folder)
    if trained.is_reward_model:
        raise UsageError(f"{trained.folder} holds a reward model, which gives scores and no answers: name another run")
    training.quiet(args)
    rewriter, towards_goal = _rewriter(args), _towards_goal(args)
    sides = _sides(args, trained)
    for side in sides:
        side.rollout = towards_goal(side.rollout)
    talk = _Talk(args, sides, sampling, rewriter)
    if args.prompt:
        for text in args.prompt:
            talk.reset()
            talk.answer(text)
        return 0
    _converse(talk, args)
    return 0


def _sides(args: argparse.Namespace, trained: policies.Trained) -> tuple[Side, Side]:
    """Loads the policies, both in one model where an adapter tells them apart."""
    from ..models.modes import without_adapter
    from ..rollout import GenerateRollout

    for note in trained.notes:
        print(f"xpo-fast: {note}", file=sys.stderr)
    further: dict[str, Any] = {"trust_remote_code": True} if args.trust_remote_code else {}
    models, contexts = [_placed(args, str(trained.folder), further)], [contextlib.nullcontext]
    if trained.is_adapter and args.before is None:
        model = models[0][0]
        models, contexts = [models[0], models[0]], [lambda: without_adapter(model), contextlib.nullcontext]
    else:
        before = args.before or trained.before
        if not before:
            raise UsageError(f"{args.folder} does not tell which model it began with: name it, --before MODEL")
        try:
            models, contexts = [_placed(args, before, further), *models], [contextlib.nullcontext] * 2
        except ValueError as error:
            raise UsageError(f"the model before training, {before!r}: {error}; --before MODEL names it") from error
    kwargs = trained.options.get("chat_template_kwargs") or None
    made = []
    for name, (model, tokenizer), context in zip(("before", "after"), models, contexts, strict=True):
        rollout = GenerateRollout(model, tokenizer, chat_template_kwargs=kwargs)
        made.append(Side(name, rollout, context, bool(tokenizer.chat_template)))
    if args.system and not all(side.templated for side in made):
        raise UsageError("--system: the tokenizer has no chat template, so there are no instructions in a conversation")
    return made[0], made[1]


def _check_goal(args: argparse.Namespace) -> None:
    """Raises UsageError for options of a goal that is not given, and where candidates would not differ."""
    for option, value in {"--goal-candidates": args.goal_candidates, "--goal-block": args.goal_block}.items():
        if value is not None and not args.goal:
            raise UsageError(f"{option} goes with --goal FOLDER: leave it out")
        if value is not None and value < 1:
            raise UsageError(f"{option} must be at least 1, got {value}")
    if args.goal and not args.temperature:
        raise UsageError("--goal chooses between answers that are drawn: give a --temperature above 0, 1 for example")


def _towards_goal(args: argparse.Namespace) -> Callable[[Any], Any]:
    """Returns a function that filters what a sampler begins by the goal of --goal; without one it changes nothing."""
    if not args.goal:
        return lambda rollout: rollout
    from ..rewards.goals import GoalJudge
    from ..rollout import FilteredRollout

    judge = GoalJudge.load(args.goal, device=loading.device_of(args))
    judge.model.model.to(loading.accelerator_of(args))
    how = {"candidates": args.goal_candidates, "block": args.goal_block}
    given: Any = {name: value for name, value in how.items() if value is not None}
    return lambda rollout: FilteredRollout(rollout, judge.score, **given)


def _rewriter(args: argparse.Namespace) -> Any:
    """Returns the function of prompts that --rewriter names; None without one."""
    if not args.rewriter:
        return None
    from ..recipes import Rewriter
    from ..rollout import GenerateRollout

    found = policies.find(args.rewriter)
    run, further = Path(args.rewriter) / "run.json", {}
    if run.is_file():
        recipe = json.loads(run.read_text(encoding="utf-8"))["recipe"]
        if not recipe.get("task"):
            raise UsageError(f"--rewriter {args.rewriter} is a run of {recipe['name']}, which rewrites no prompts")
        further["task"] = recipe["task"]
    model, tokenizer = _placed(args, str(found.folder), {"trust_remote_code": True} if args.trust_remote_code else {})
    return Rewriter(GenerateRollout(model, tokenizer), chat=bool(tokenizer.chat_template), **further)


def _placed(args: argparse.Namespace, name: str, further: dict[str, Any]) -> tuple[Any, Any]:
    from ..models import load_model

    model, tokenizer = load_model(name, dtype=args.dtype, device=loading.device_of(args), merge=False, **further)
    move: Any = model.to
    return move(loading.accelerator_of(args)), tokenizer


class _Talk:
    """Two conversations that are given the same messages."""

    def __init__(self, args: argparse.Namespace, sides: tuple[Side, Side], sampling: Any, rewriter: Any = None) -> None:
        self.args, self.sides, self.sampling, self.rewriter = args, sides, sampling, rewriter
        self.system = args.system
        self.turn = 0
        self.reset()

    def reset(self) -> None:
        """Forgets both conversations, except for the instructions."""
        self.turn = 0
        for side in self.sides:
            side.messages = [{"role": "system", "content": self.system}] if self.system else []

    def answer(self, text: str, *, stoppable: bool = False) -> None:
        """Writes both answers. stoppable: Ctrl-C ends the answer that is being written, and not the program."""
        found: dict[str, Any] = {"prompt": text}
        finish, held = {}, [list(side.messages) for side in self.sides]
        request = None
        if self.rewriter is not None:
            (request,) = self.rewriter([text], seed=self.args.seed + self.turn)
            found["rewritten"] = request
            if not self.args.json:
                print(f"rewritten: {request}", flush=True)
        with contextlib.nullcontext() if self.args.json else Columns(("before", "after")) as columns:
            try:
                for k, side in enumerate(self.sides):
                    side.messages.append({"role": "user", "content": text})
                    add = (lambda piece, k=k: columns.add(k, piece)) if columns is not None else (lambda piece: None)
                    said, finish[side.name] = self._one(side, add, stoppable, request)
                    found[side.name] = said
                    # A conversation goes on in turns: without an answer the question is taken back.
                    side.messages = [*side.messages, {"role": "assistant", "content": said}] if said else held[k]
            except BaseException:
                for side, messages in zip(self.sides, held, strict=True):
                    side.messages = messages
                raise
        if self.args.json:
            print(json.dumps({**found, "finish": finish}, ensure_ascii=False), flush=True)
        if self.args.save and self.turn == 0:
            from ..report.run import ANSWERS

            path = Path(self.args.folder) / ANSWERS
            with saving(path), path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**found, "finish": finish}, ensure_ascii=False) + "\n")
        self.turn += 1

    def _one(
        self, side: Side, add: Callable[[str], Any], stoppable: bool, request: str | None = None
    ) -> tuple[str, str]:
        """Returns a side's answer and how it ended: "stop", "length", or "interrupted"."""
        streamer = _streamer(side.rollout.tokenizer, add)
        prompt = side.prompt() if request is None else side.prompt(request)
        if not self.args.goal:  # with one, tokens are drawn that no answer has
            side.rollout.streamer = streamer
        try:
            with side.context():
                samples = side.rollout.generate([prompt], sampling=self.sampling, seed=self.args.seed + self.turn)
        except KeyboardInterrupt as stop:
            if not stoppable or hasattr(stop, "status"):  # SIGTERM, which is not about an answer
                raise
            streamer.end()  # the word that was not whole yet
            add(" (stopped)")
            return "".join(streamer.pieces).strip(), "interrupted"
        (completion,), (finish,) = samples.completions, samples.finish
        answer = completion if isinstance(completion, str) else completion[0]["content"]
        if self.args.goal:
            add(answer)
        if finish == "length" or not answer:
            add(" (cut off)" if answer else "(no answer)")
        return answer, finish


def _streamer(tokenizer: Any, add: Callable[[str], Any]) -> Any:
    """Returns a streamer that calls add(piece) with the text of an answer, and keeps the pieces."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.pieces: list[str] = []

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                self.pieces.append(text)
                add(text)

    return Streamer()


def _converse(talk: _Talk, args: argparse.Namespace) -> None:
    """Reads messages and commands until the end of the input."""
    from ..rollout import RolloutError

    with contextlib.suppress(ImportError):  # not on Windows; lines can be edited and come again with the arrows
        import readline  # noqa: F401
    typed = sys.stdin.isatty()
    if typed:
        print(f"{args.folder}: {_COMMANDS}; Ctrl-C ends an answer", file=sys.stderr)
    for line in _typed(typed):
        command, _, rest = line.strip().partition(" ")
        if command in ("/quit", "/exit"):
            return
        if command == "/reset":
            talk.reset()
        elif command == "/system":
            if rest.strip() and not all(side.templated for side in talk.sides):
                print("xpo-fast: the tokenizer has no chat template, so there are no instructions", file=sys.stderr)
                continue
            talk.system = rest.strip() or None
            talk.reset()
        elif line.startswith("/"):
            print(f"xpo-fast: no command {command}: {_COMMANDS}; a space before / makes it text", file=sys.stderr)
        elif line.strip():
            try:
                talk.answer(line.strip(), stoppable=True)
            except (ValueError, RolloutError) as error:
                print(f"xpo-fast: {error}; /reset begins anew", file=sys.stderr)


def _typed(asked: bool) -> Iterator[str]:
    """Yields the lines of stdin. asked: it is a terminal, where Ctrl-C drops the line."""
    while True:
        try:
            yield input("> " if asked else "")
        except EOFError:
            return
        except KeyboardInterrupt as stop:
            if not asked or hasattr(stop, "status"):
                raise
            print("\n/quit or Ctrl-D ends", file=sys.stderr)
