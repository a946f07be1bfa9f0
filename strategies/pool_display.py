"""How a person sees the attack pool: bars in a terminal, a log line now and then elsewhere."""

import logging
import time
from typing import TYPE_CHECKING

from strategies.attack_pool import PoolStatus, Running

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

log = logging.getLogger("fedattack.pool")


class PoolDisplay:
    """Shows a pool: `pool.drain(on_status=PoolDisplay())`. One bar for all jobs, and a line for each that runs.

    Where the console is no terminal it logs a line about every `log_seconds` instead.
    """

    def __init__(self, console: "Console | None" = None, *, log_seconds: float = 10.0) -> None:
        self._console, self._log_seconds = console, log_seconds
        self._logged: float | None = None
        self._bars: Bars | None = None
        self._overall: TaskID | None = None
        self._lines: dict[str, TaskID] = {}

    def __call__(self, status: PoolStatus) -> None:
        if self._console is None:
            from rich.console import Console

            self._console = Console(stderr=True)
        if self._console.is_terminal:
            self._draw(status, self._console)
        else:
            self._log(status)

    def close(self) -> None:
        """Take the bars away; a later call draws them anew."""
        if self._bars is not None:
            self._bars.stop()
        self._bars, self._overall, self._lines = None, None, {}

    def _log(self, status: PoolStatus) -> None:
        now = time.monotonic()
        ended = status.ended == status.total
        if not ended and self._logged is not None and now - self._logged < self._log_seconds:
            return
        self._logged = None if ended else now
        running = "; ".join(f"{item.job} {item.iteration}/{item.iterations} {_loss(item)}" for item in status.running)
        log.info("attacks: %d of %d ended, %d failed; %s", status.ended, status.total, status.failed, running or "idle")

    def _draw(self, status: PoolStatus, console: "Console") -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        if status.total == 0 or (status.ended == status.total and self._bars is None):
            return
        if self._bars is None or self._overall is None:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bars = Progress(*columns, TextColumn("{task.fields[text]}"), console=console)
            self._overall = self._bars.add_task("attacks", total=status.total, text="")
            self._bars.start()
        text = f"{status.failed} failed" if status.failed else ""
        self._bars.update(self._overall, completed=status.ended, total=status.total, text=text)
        for job in set(self._lines) - {item.job for item in status.running}:
            self._bars.remove_task(self._lines.pop(job))
        for item in status.running:
            if item.job not in self._lines:
                self._lines[item.job] = self._bars.add_task("  " + _short(item.job), total=None, text="")
            total = item.iterations or None
            self._bars.update(self._lines[item.job], completed=item.iteration, total=total, text=_loss(item))
        if status.ended == status.total:
            self.close()


def _loss(item: Running) -> str:
    return "" if item.loss is None else f"loss {item.loss:.3e}"


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-most // 2 :]}"
