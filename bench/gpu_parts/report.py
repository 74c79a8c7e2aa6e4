"""What the findings of the parts come to: the table, and what limits the step. Imports nothing heavy."""

import statistics
from collections.abc import Iterator

from bench import harness

KEEPS_UP, BUSY_PCT = 0.95, 85.0  # of the step alone; of a step's time
SPREAD_OF = ("clips_per_s", "frames_per_s")
# what a model of the step predicts, and the part that measures it
PREDICTED = {
    **dict.fromkeys(("step_s", "clips_per_s", "mfu_pct", "memory_gib"), "step"),
    **dict.fromkeys(("matrix_products_ms", "memory_bound_ms", "optimizer_ms", "launches"), "profile"),
}
ADVICE = {
    "matrix products": "Only a faster card, a smaller model or a lower precision makes it faster.",
    "element-wise and reductions": "They wait for memory: engine.compile=true fuses them.",
    "attention": "See the part `step plain attention` for what fused attention gains.",
    "optimizer": "A larger batch has fewer updates a clip.",
    "copies": "See the copies in the part `profile` for where they come from.",
}


def runs_of(report: dict, part: str) -> list[dict]:
    """The runs of a part that have findings."""
    return [run for run in report["parts"].get(part, {}).get("runs", []) if "left_out" not in run]


def values(report: dict, part: str, key: str) -> list[float]:
    """Every measurement of that figure: several runs, or several in one run."""
    found: list[float] = []
    for run in runs_of(report, part):
        given = run.get(key)
        found += given if isinstance(given, list) else [given] if isinstance(given, int | float) else []
    return found


def value(report: dict, part: str, key: str) -> float | None:
    """The median of the measurements; None: there is none."""
    found = values(report, part, key)
    return statistics.median(found) if found else None


def spread_pct(report: dict, part: str) -> float | None:
    """How far a part's rates lie apart, of their mean; None: there are not two."""
    for key in SPREAD_OF:
        if len(found := values(report, part, key)) > 1:
            return 100 * (max(found) - min(found)) / statistics.fmean(found)
    return None


def why_not(report: dict, part: str) -> str:
    """Why a part has no findings."""
    entry = report["parts"].get(part)
    if entry is None:
        return "it was not run"
    if "left_out" in entry:
        return entry["left_out"]
    return next((run.get("left_out") or run["ended"] for run in entry["runs"]), "it was not run")


# ---- the summary ----


def summary(report: dict) -> list[str]:
    """Sentences for people; the first says what limits the step."""
    return [
        limit(report),
        *_predicted(report),
        *_decoders(report),
        *_corruption(report),
        *_losses(report),
        *_warnings(report),
        *_failed(report),
    ]


def limit(report: dict) -> str:
    """What limits the step, in one sentence, and what to do."""
    alone, trained = value(report, "step", "clips_per_s"), value(report, "train intra", "clips_per_s")
    if alone is None:
        return f"What limits the step is not known: the part `step` has no result ({why_not(report, 'step')})."
    if trained is not None and trained < KEEPS_UP * alone:
        loader = value(report, "lane intra", "clips_per_s")
        rates = f"alone it handles {alone:.0f} clips/s, on the loader's batches {trained:.0f}"
        if loader is not None and loader > alone:
            return (
                f"The loader slows the step down although it is fast enough by itself ({loader:.0f} clips/s): {rates}; they "
                "compete for the device, the processor or Python's lock."
            )
        return f"Loading limits the step: {rates}" + (
            "." if loader is None else f", and the loader makes {loader:.0f}."
        )
    busy = value(report, "profile", "busy_pct")
    if busy is None:
        return (
            f"The step handles {alone:.0f} clips/s; what limits it is not known: the part `profile` has no figures of a "
            f"GPU ({_no_profile(report)})."
        )
    if busy < BUSY_PCT:
        launches = value(report, "profile", "launches") or 0
        waits = sum(
            wait["calls"] for run in runs_of(report, "profile")[:1] for wait in run["synchronisations"].values()
        )
        return (
            f"The host limits the step: for {100 - busy:.0f} % of it the GPU has nothing to do, with {launches:.0f} launches and "
            f"{waits:.0f} waits of the host a step."
        )
    return _kernels(report, busy)


def _no_profile(report: dict) -> str:
    found = runs_of(report, "profile")
    return found[0].get("left_out_here", found[0]["ended"]) if found else why_not(report, "profile")


def _kernels(report: dict, busy: float) -> str:
    found = runs_of(report, "profile")[0]
    kinds = found["kinds_ms"]
    kind, ms = max(kinds.items(), key=lambda item: item[1])
    more = ""
    rate, card = value(report, "step", "tflop_per_s"), value(report, "card", "tflops_bf16")
    if kind == "matrix products" and rate is not None and card is not None:
        more = f", at {rate * found['step_s'] * 1000 / ms:.0f} of the {card:.0f} TFLOP/s that the card reaches in bf16"
    share = 100 * ms / sum(kinds.values())
    first = f"{kind[0].upper()}{kind[1:]} limit the step: the GPU is busy for {busy:.0f} % of it, {share:.0f} % of that with them{more}."
    return f"{first} {ADVICE.get(kind, '')}".strip()


def _predicted(report: dict) -> Iterator[str]:
    for run in runs_of(report, "predicted")[:1] if report["machine"]["gpu"] != "cpu" else []:
        for key, part in PREDICTED.items():
            expected, measured = run.get(key), value(report, part, key)
            if expected and measured is not None:
                yield f"{key}: predicted {expected:.4g}, measured {measured:.4g}, {measured / expected:.2f} times that."
        if run.get("limit"):
            yield f"The model of a step expects that this takes longest: {run['limit']}."


def _decoders(report: dict) -> Iterator[str]:
    rates = {
        part: rate
        for part in report["parts"]
        if part.startswith("decode ") and (rate := value(report, part, "frames_per_s")) is not None
    }
    if rates:
        best = max(rates, key=lambda part: rates[part])
        yield f"Fastest decoder of stored JPEGs: `{best}`, {rates[best]:.0f} frames/s."


def _corruption(report: dict) -> Iterator[str]:
    ways = {
        "held": "behind queued work",
        "released": "if their memory is given back at once",
        "quiet": "without queued work",
    }
    for part in report["parts"]:
        for run in runs_of(report, part)[:1] if part.startswith("corruption ") else []:
            counts = [
                f"{run[f'{way}_differ']} of {run[f'{way}_compared']} {said}"
                for way, said in ways.items()
                if f"{way}_differ" in run
            ]
            if counts:
                yield f"`{part}`: batches that differ: {', '.join(counts)}."


def _warnings(report: dict) -> Iterator[str]:
    """What the loader warned of: another decoder was used than would have been."""
    said = {
        warning
        for part in report["parts"]
        for run in runs_of(report, part)
        for warning in run.get("warnings", [])
        if warning.startswith(("JPEGs on", "NVDEC on"))
    }
    yield from (f"The loader warned: {warning}" for warning in sorted(said))


def _losses(report: dict) -> Iterator[str]:
    pairs = [runs_of(report, part)[:1] for part in ("losses 16 bits", "losses fp32 on the CPU")]
    if all(found and "losses" in found[0] for found in pairs):
        (here,), (exact,) = pairs
        most = max(abs(a / b - 1) for a, b in zip(here["losses"], exact["losses"], strict=True))
        yield f"The losses of the first steps in 16 bits differ from fp32 on the CPU by at most {100 * most:.2g} %."


def _failed(report: dict) -> Iterator[str]:
    for part, entry in report["parts"].items():
        for run in entry.get("runs", []):
            if not run["ok"]:
                yield f"`{part}` failed: {run['ended']}. {last_line(run)}".strip()


def last_line(run: dict) -> str:
    """The line of stderr that tells most: where it crashed or hung, else the last one."""
    lines = run.get("stderr", [])
    stacks = [i for i, line in enumerate(lines[:-1]) if line.endswith("(most recent call first):")]
    return lines[stacks[-1] + 1].strip() if stacks else lines[-1] if lines else ""


# ---- the table ----

COLUMNS = {
    "clips_per_s": ("clips/s", ".0f"),
    "frames_per_s": ("frames/s", ".0f"),
    "step_s": ("step s", ".4f"),
    "mfu_pct": ("MFU %", ".1f"),
    "data_wait_pct": ("data wait %", ".1f"),
    "busy_pct": ("busy %", ".0f"),
    "host_cpu_pct": ("host CPU %", ".0f"),
    "psnr_db": ("PSNR dB", ".1f"),
}


def show(report: dict) -> None:
    """Print the parts, the card's ceilings, the kernels of a step, and the summary."""
    from rich.markup import escape

    alone, rows = value(report, "step", "clips_per_s"), []
    for part, entry in report["parts"].items():
        cells = [_cell(value(report, part, key), form) for key, (_, form) in COLUMNS.items()]
        clips = value(report, part, "clips_per_s")
        cells += [_cell(clips / alone if clips and alone else None, ".3f"), _cell(spread_pct(report, part), ".1f")]
        ended = entry.get("left_out") or ", ".join(
            dict.fromkeys(run.get("left_out") or run["ended"] for run in entry["runs"])
        )
        failed = any(not run["ok"] for run in entry.get("runs", []))
        rows.append([part, *cells, f"[red]{escape(ended)}[/]" if failed else escape(ended)])
    heads = ["part", *(name for name, _ in COLUMNS.values()), "of the step", "spread %", "ended"]
    harness.show(heads, rows, width=190)
    for run in runs_of(report, "card")[:1]:
        found = {key: run[key] for key in run if key.startswith(("tflops", "gb_per_s"))}
        rows = [[key, ", ".join(f"{x:.4g}" for x in given)] for key, given in found.items()]
        harness.show(["ceiling of the card", "measured"], rows, width=100)
    for run in runs_of(report, "profile")[:1]:
        table = [
            [row["name"][:100], f"{row['ms']:.3f}", f"{row['calls']:.0f}"]
            for row in run.get("kernels", run.get("operators", []))
        ]
        harness.show(["of a step", "ms", "calls"], table, width=140)
    for line in report["summary"]:
        print(line)


def _cell(number: float | None, form: str) -> str:
    return "" if number is None else format(number, form)
