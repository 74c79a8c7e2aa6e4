"""Predictions as text."""

from dataclasses import asdict

from c4c.config import Config
from c4c.performance.advice import advice, uncompiled
from c4c.performance.assumptions import Assumptions
from c4c.performance.predict import MOST_ROWS, Prediction

_NAME, _NUMBER = 22, 9  # columns


def text(prediction: Prediction, largest: int, config: Config, assumptions: Assumptions) -> str:
    """All about one kind of GPU. largest: see c4c.performance.predict.largest_batch."""
    p, shape = prediction, prediction.shape
    cut = f"{shape.rows} on each"
    if shape.passes > 1:
        cut += f", {shape.encoded} at once" + (" (gradient caching)" if shape.cached else " (accumulation)")
    every = ", which are all of a rank's" if shape.passes > 1 and largest >= shape.rows else ""
    note = uncompiled(p, config)
    waits = "" if p.loader_keeps_up else ": the step waits for the slowest"
    return "\n".join(
        [
            f"{p.gpus} x {p.gpu}, {shape.rows * shape.world} pairs a step ({cut}), {p.weights / 1e6:.1f} M weights, "
            f"ZeRO {shape.stage}, {p.flops / 1e12:.3g} TFLOP on each",
            "",
            f"step       {p.step_s * 1e3:.1f} ms, {p.clips_per_s:.0f} clips/s, MFU {p.mfu_pct:.1f} %",
            f"memory     {p.memory_gib:.1f} of {p.usable_gib:.1f} GiB{'' if p.fits else ': it does not fit'}; "
            f"a GPU can encode {_many(largest)} pairs at once{every}",
            f"loader     {p.loader_margin:.1f} times as fast as the step",
            f"limited by {advice(p, config, assumptions)}",
            *([f"note       {note}"] if note else []),
            "",
            "on the GPU, one after another (% of the step)",
            *_rows(asdict(p.seconds), "ms", 1e3, p.step_s),
            "on the host, beside it",
            *_rows({f"{p.launches} launches": p.launch_s}, "ms", 1e3, p.step_s),
            f"in the loader, beside both and each other ({p.cores} cores, --decoder {p.decoder}){waits}",
            *_rows(p.loader_s, "ms", 1e3, p.step_s),
            "memory of a GPU (% of what can be used)",
            *_rows(asdict(p.memory), "GiB", 1, p.usable_gib),
        ]
    )


def _rows(values: dict[str, float], unit: str, factor: float, whole: float) -> list[str]:
    """A line for each value that is not 0, with its share of `whole`."""
    return [
        f"  {name.replace('_', ' '):{_NAME}}{value * factor:>{_NUMBER}.1f} {unit:3} {100 * value / whole:5.0f} %"
        for name, value in values.items()
        if value
    ]


def table(predictions: list[tuple[Prediction, int]], config: Config) -> str:
    """A line for each kind of GPU: its prediction, and the largest batch that a GPU of it can encode at once."""
    first = predictions[0][0]
    heads = ("GPU", "ms/step", "clips/s", "MFU %", "GiB", "of", "fits", "most pairs", "loader", "limited by")
    widths = (9, 8, 8, 6, 6, 6, 5, 11, 7, 0)
    rows = [heads] + [
        (
            p.gpu, f"{p.step_s * 1e3:.1f}", f"{p.clips_per_s:.0f}", f"{p.mfu_pct:.1f}", f"{p.memory_gib:.1f}",
            f"{p.usable_gib:.1f}", "yes" if p.fits else "NO", _many(largest), f"{p.loader_margin:.1f}x",
            p.limit.replace("_", " "),
        )
        for p, largest in predictions
    ]  # fmt: skip
    lines = [
        "  ".join(
            cell.ljust(w) if i in (0, len(row) - 1) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    shape = first.shape
    note = uncompiled(first, config)
    title = f"{shape.world} GPUs each" if shape.world > 1 else "one GPU each"
    return "\n".join(
        [
            f"{title}, {shape.rows * shape.world} pairs a step, {first.cores} cores a GPU, --decoder {first.decoder}",
            "",
            *lines,
            "",
            "GiB: memory of a GPU. most pairs: that a GPU can encode at once. loader: how many times as fast as the step it is.",
            *([f"note: {note}"] if note else []),
        ]
    )


def _many(rows: int) -> str:
    return f"{MOST_ROWS}+" if rows >= MOST_ROWS else str(rows)
