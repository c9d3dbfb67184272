"""Ends a run on Ctrl-C and SIGTERM, after its step or at once; keeps it alive when the reader of its output is gone."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Trainer


class Stopped(KeyboardInterrupt):
    """Ctrl-C, or the SIGTERM that a cluster sends before it kills.

    status: the exit status. told: the user has been told already.
    """

    def __init__(self, number: int, *, told: bool = False) -> None:
        super().__init__(number)
        self.status, self.told = 128 + number, told


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM raises Stopped, a KeyboardInterrupt with an exit status of its own."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped(number)

    with _handling(stop, signal.SIGTERM):
        yield


@contextlib.contextmanager
def _handling(handler: Any, *numbers: int) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield
        return
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, own in previous.items():
            signal.signal(number, own)


@contextlib.contextmanager
def stop_after_step(trainer: Trainer) -> Iterator[Sequence[int]]:
    """Inside, Ctrl-C and SIGTERM end training after the step under way, with a checkpoint; a second one ends it at
    once.

    Before the first step and after the last one, the first signal ends it at once, too. Yields a list that holds the
    signal's number once one has come. A run of several processes ends at once, because they would not stop after the
    same step.
    """
    from transformers import TrainerCallback

    stopped: list[int] = []
    stepping = False

    class Stop(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            nonlocal stepping
            stepping = True

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            nonlocal stepping
            stepping = False

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if stopped:
                control.should_save = control.should_training_stop = True

    def interrupt(number: int, frame: Any) -> None:
        if stopped or not stepping:
            raise Stopped(number)
        stopped.append(number)
        print("\nstopping after this step, with a checkpoint; Ctrl-C again stops at once", file=sys.stderr)

    if trainer.args.world_size > 1:
        yield stopped
        return
    trainer.add_callback(Stop())
    with _handling(interrupt, signal.SIGINT, signal.SIGTERM):
        yield stopped


class _Outliving:
    """A stream that drops text once its reader has closed the pipe."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._give_up()

    def _give_up(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())  # so does the rest of the buffers when Python ends
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def outliving_readers() -> Iterator[None]:
    """Inside, nothing fails because the reader of stdout or stderr is gone."""
    outliving: Any = [_Outliving(stream) for stream in (sys.stdout, sys.stderr)]
    with contextlib.redirect_stdout(outliving[0]), contextlib.redirect_stderr(outliving[1]):
        try:
            yield
        finally:
            for stream in outliving:
                stream.flush()
