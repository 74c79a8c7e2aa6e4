"""What a person sees: a live screen on a terminal, plain lines elsewhere; only rank 0 speaks."""

import sys
import time
from collections.abc import Iterable

from rich.console import Console
from rich.constrain import Constrain
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table

from shards import count

_LINE_EVERY_S = 5.0


class Report:
    """Shows a training run. Does nothing at all where `on` is false. validated: t2v R@1 of earlier validations."""

    def __init__(self, on: bool, total_steps: int, steps_per_epoch: int, done: int, validated: Iterable[float] = ()):
        self.console = Console(stderr=True, soft_wrap=True, quiet=not on)
        self._on, self._total, self._per_epoch, self._first = on, total_steps, steps_per_epoch, done
        self._started = self._last_line = time.monotonic()
        self._best = max(validated, default=float("-inf"))
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[after]}"),
            console=self.console, expand=True,
        )  # fmt: skip
        self._run = self._bars.add_task("", total=total_steps, completed=done, after="")
        self._epoch = self._bars.add_task("", total=steps_per_epoch, completed=done % steps_per_epoch, after="")
        self._live = Live(console=self.console, refresh_per_second=4) if on and sys.stderr.isatty() else None

    def __enter__(self) -> "Report":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, highlight=False, markup=False)

    def step(self, step: int, values: dict) -> None:
        """`step` steps are done; `values` are the metrics of the last."""
        if not self._on:
            return
        now = time.monotonic()
        eta = (now - self._started) / max(1, step - self._first) * (self._total - step)
        shown = self._shown(values)
        epoch = f"{min(self._total - 1, step - 1) // self._per_epoch + 1}/{-(-self._total // self._per_epoch)}"
        if self._live:
            self._live.update(self._screen(step, epoch, eta, shown))
        elif now - self._last_line > _LINE_EVERY_S or step == self._total or step == self._first + 1:
            self._last_line = now
            pairs = "  ".join(f"{k} {v}" for k, v in shown.items())
            self.say(f"epoch {epoch}  step {step}/{self._total}  {pairs}  ETA {span(eta)}")

    def _shown(self, values: dict) -> dict[str, str]:
        shown = {
            "loss": f"{values['train/loss']:.4f}",
            "lr": f"{values['train/lr']:.2e}",
            "scale": f"{values['train/logit_scale']:.1f}",
            "clips/s": f"{values['clips_per_s']:.1f}",
            "frames/s": f"{values['frames_per_s']:.0f}",
            "data wait": f"{values['data/wait_pct']:.1f}%",
            "memory": f"{values['memory_gib']:.1f} GiB",
        }
        if "train/logit_bias" in values:
            shown["bias"] = f"{values['train/logit_bias']:.2f}"
        if "mfu_pct" in values:
            shown["MFU"] = f"{values['mfu_pct']:.1f}%"
        if self._best > float("-inf"):
            shown["best R@1"] = f"{self._best:.1f}%"
        return shown

    def _screen(self, step: int, epoch: str, eta: float, shown: dict[str, str]) -> Constrain:
        of_epoch = (step - 1) % self._per_epoch + 1
        self._bars.update(self._run, completed=step, description=f"step {step}/{self._total}", after=f"ETA {span(eta)}")
        self._bars.update(
            self._epoch, completed=of_epoch, description=f"epoch {epoch}", after=f"{of_epoch}/{self._per_epoch}"
        )
        table = Table.grid(padding=(0, 2))
        table.add_row(*shown)
        table.add_row(*shown.values())
        screen = Table.grid(expand=True)
        screen.add_row(self._bars)
        screen.add_row(table)
        return Constrain(screen, self.console.width - len("^C") - 1)  # what a terminal echoes must not start a new line

    def summary(self, steps: int, bad: int, *commands: str) -> None:
        """The end of a completed run: its result, and what to do next."""
        best = f"; best t2v R@1 {self._best:.1f}" if self._best > float("-inf") else ""
        left_out = f"; {count(bad, 'step')} skipped" if bad else ""
        took = span(time.monotonic() - self._started)
        self.say(f"done: {count(steps, 'step')}, {took} for the last {steps - self._first}{best}{left_out}. Next:")
        for command in commands:
            self.say(f"    {command}")

    def validation(self, step: int, values: dict, averaged: bool = False) -> None:
        """Show the metrics of the validation after `step` steps. averaged: of the weights' average."""
        self._best = max(self._best, values["t2v"]["R1"])
        t2v, v2t = values["t2v"], values["v2t"]
        pairs = f"   own video above its twin {values['pairs']['own_first']:.1f} %" if "pairs" in values else ""
        self.say(
            f"validation after step {step}{', averaged weights' * averaged}: t2v R@1 {t2v['R1']:.1f}  R@5 {t2v['R5']:.1f}  R@10 {t2v['R10']:.1f}  "
            f"MdR {t2v['MdR']:.1f}   v2t R@1 {v2t['R1']:.1f}   best t2v R@1 {self._best:.1f}{pairs}"
        )


class EvalReport:
    """How far an evaluation is: bars on a terminal, a line every few seconds elsewhere. Does nothing where `on` is false."""

    def __init__(self, on: bool):
        self._console = Console(stderr=True, soft_wrap=True, quiet=not on)
        self._live = on and sys.stderr.isatty()
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[after]}"),
            console=self._console, transient=True, disable=not self._live,
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}
        self._began = self._last = self._last_line = time.monotonic()
        self.pace = ""  # of the videos, once all are encoded

    def __enter__(self) -> "EvalReport":
        self._began = self._last = self._last_line = time.monotonic()
        self._bars.start()
        return self

    def __exit__(self, *_) -> None:
        self._bars.stop()

    def tell(self, kind: str, done: int, total: int) -> None:
        """`done` of `total` videos, clips or captions (that is `kind`) are encoded, texts ranked, or pictures made."""
        if kind not in self._tasks:
            self._tasks[kind], self._began = self._bars.add_task(kind, total=total, after=""), self._last
        self._last = time.monotonic()
        seconds = max(self._last - self._began, 1e-9)
        after = f"{done / seconds:.1f}/s"
        self._bars.update(self._tasks[kind], completed=done, after=after)
        if kind in ("videos", "clips"):  # clips: several of each video
            self.pace = f"{done} {kind} in {seconds:.1f} s, {done / seconds:.1f} clips/s"
        if not self._live and self._last - self._last_line > _LINE_EVERY_S:
            self._last_line = self._last
            verb = {"texts": "ranked", "pictures": "made"}.get(kind, "encoded")
            self._console.print(f"{done} of {total} {kind} {verb}, {after}", highlight=False)


def metrics_table(result: dict) -> Table:
    """The table that launch/eval.py prints."""
    table = Table(title=f"{count(result['n_texts'], 'text')}, {count(result['n_videos'], 'video')}")
    for name in ("", "R@1 %", "R@5 %", "R@10 %", "MdR", "MnR"):
        table.add_column(name, justify="left" if not name else "right")
    for way, title in (("t2v", "text to video"), ("v2t", "video to text")):
        row = result[way]
        table.add_row(title, *(f"{row[k]:.1f}" for k in ("R1", "R5", "R10", "MdR", "MnR")))
        for method, rows in result.get("rerank", {}).items():
            if way in rows:
                sees = " (sees all queries)" if rows["sees_all_test_queries"] else ""
                table.add_row(
                    f"{title}, {method}{sees}", *(f"{rows[way][k]:.1f}" for k in ("R1", "R5", "R10", "MdR", "MnR"))
                )
    return table


def span(seconds: float) -> str:
    """As minutes and seconds, with hours if there are any."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
