"""A progress bar over the stages of a long job, on a terminal only; its clock runs on while a stage works."""

from __future__ import annotations

import threading
from types import TracebackType

from tqdm import tqdm

PERIOD_SECONDS = 0.5


class Stages:
    """`with Stages(2) as stage: stage("capture"); ...; stage("native code"); ...`, shown on stderr."""

    def __init__(self, count: int) -> None:
        layout = "{desc:<24} {bar:20} stage {n_fmt}/{total_fmt} {elapsed}"
        self._bar = tqdm(total=count, disable=None, leave=False, bar_format=layout)
        self._over = threading.Event()
        self._clock = threading.Thread(target=self._tick, daemon=True)
        self._began = False

    def __enter__(self) -> Stages:
        if not self._bar.disable:
            self._clock.start()
        return self

    def __call__(self, name: str) -> None:
        """The stage before is done, this one begins."""
        if self._began:
            self._bar.update()
        self._began = True
        self._bar.set_description_str(name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._clock.is_alive():
            self._clock.join()
        self._bar.close()

    def _tick(self) -> None:
        while not self._over.wait(PERIOD_SECONDS):
            self._bar.refresh()
