"""A study's tables as one Markdown text."""

import math
import re

from c4c.study.findings import interval_text, p_text
from c4c.study.outcomes import LOWER_IS_BETTER
from c4c.study.results import DONE, RowResult, StudyResult, TableResult, same_test
from c4c.study.statistics import Estimate

_SHOWN = {"t2v_R1": "R@1", "t2v_R5": "R@5", "t2v_R10": "R@10", "t2v_MdR": "MdR", "t2v_MnR": "MnR", "v2t_R1": "v2t R@1",
          "pairs_own_first": "order pairs"}  # fmt: skip
HOW_TO_READ = """\
R@k in per cent, of text to video unless the column says v2t; MdR and MnR are ranks from 1. ± is the sample standard deviation over seeds.
A mean is bold if it leads every other row of its table (or sweep) by more than the spread of both: the root of the sum of
their squared standard deviations. *Difference*: R@1 less the baseline's, paired by seed, with Student's 95 % interval. *p seeds*: would
other seeds say the same? (Student's paired t test.) *p texts*: would other test texts say the same? (Sign-flip test over test
texts, differences averaged over seeds.) No p is corrected for the number of rows. *order pairs*: how often the own video stands before a twin
that differs in order only; guessing gives 50, and less where more than two videos differ so. *Time*: all attempts of the row's own training or evaluation, without the training it starts from. *clips/s*: median over the steps without the first tenth.
*GiB*: the most that rank 0 used, of its GPU, or of the host without one. Time, clips/s and GiB are means over seeds.
"""


def markdown_of(result: StudyResult) -> str:
    """The whole study."""
    parts = [
        f"# {escaped(result.study.title)}\n",
        *(_table(table) for table in result.tables),
        f"## How to read this\n\n{HOW_TO_READ}",
    ]
    if result.about:
        parts.append("## About\n\n" + "".join(f"- {escaped(k)}: {escaped(v)}\n" for k, v in result.about.items()))
    return "\n".join(parts)


def _table(table: TableResult) -> str:
    notes: list[str] = []
    shown = [name for name in _SHOWN if name != "pairs_own_first" or any(row.estimate(name) for row in table.rows)]
    best = {(id(row), name) for name in shown for row in clear_best(table, name)}
    titles = [
        "row",
        "seeds",
        *(_SHOWN[name] for name in shown),
        "difference",
        "p seeds",
        "p texts",
        "time",
        "clips/s",
        "GiB",
        "published R@1",
    ]
    lines = [titles, ["---"] * 2 + ["---:"] * (len(titles) - 2)]
    for row in table.rows:
        cells = [_value(row.estimate(name), (id(row), name) in best) for name in shown]
        lines.append(
            [escaped(row.row.name), _seeds(row, notes), *cells, *_difference(row), *_costs(row), _published(row, notes)]
        )
    text = f"## {escaped(table.table.title)}\n\n"
    text += f"{escaped(table.table.about)}\n\n" if table.table.about else ""
    text += "".join(f"- {escaped(sentence)}\n" for sentence in table.findings) + "\n" * bool(table.findings)
    text += "".join(f"| {' | '.join(line)} |\n" for line in lines)
    text += "\n" + "".join(f"({i}) {escaped(note)}  \n" for i, note in enumerate(notes, 1)) if notes else ""
    return f"{text}\n{_commands(table)}"


def clear_best(table: TableResult, metric: str) -> list[RowResult]:
    """Rows that lead each other row of their group by more than the spread of both: the root of the sum of squared deviations. None where
    rows have other test texts."""
    found = []
    sign = -1 if metric in LOWER_IS_BETTER else 1
    for group in dict.fromkeys(row.row.group for row in table.rows):
        scored = [(e, row) for row in table.rows if row.row.group == group and (e := row.estimate(metric)) is not None]
        if len(scored) > 1 and all(same_test(row, scored[0][1]) for _, row in scored):
            best, row = max(scored, key=lambda pair: sign * pair[0].mean)
            if all(_leads(best, other, sign) for other, of in scored if of is not row):
                found.append(row)
    return found


def _leads(best: Estimate, other: Estimate, sign: int) -> bool:
    if best.sd is None or other.sd is None:
        return False
    return sign * (best.mean - other.mean) > math.hypot(best.sd, other.sd)


def _value(found: Estimate | None, is_best: bool) -> str:
    if found is None:
        return ""
    text = f"{found.mean:.1f}"
    text = f"**{text}**" if is_best else text
    return text if found.sd is None else f"{text} ± {found.sd:.1f}"


def _seeds(row: RowResult, notes: list[str]) -> str:
    """3/3, or 2/3 with the number of each note that says what is wrong or open."""
    marks = []
    for one in list({one.folder: one for one in reversed(row.seeds)}.values())[::-1]:
        if one.state != DONE or one.error:
            notes.append(f"{row.row.name}, seed {one.seed}: {one.state}{f': {one.error}' if one.error else ''}")
            marks.append(f"({len(notes)})")
    return " ".join([f"{len(row.done)}/{len({one.folder for one in row.seeds})}", *marks])


def _difference(row: RowResult) -> list[str]:
    found = row.versus.get("t2v_R1")
    if found is None:
        return ["", "", ""]
    interval = f" {interval_text(found)}" if found.low is not None else ""
    return [f"{found.mean:+.2f}{interval} (n={found.n})", p_text(found.p_seeds), p_text(found.p_texts)]


def _costs(row: RowResult) -> list[str]:
    wall, clips, memory = (row.cost(name) for name in ("wall_s", "clips_per_s", "memory_gib"))
    return [
        duration_text(wall.mean) if wall else "",
        f"{clips.mean:.1f}" if clips else "",
        f"{memory.mean:.1f}" if memory else "",
    ]


def duration_text(seconds: float) -> str:
    """42 s, 12.3 min, 4.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _published(row: RowResult, notes: list[str]) -> str:
    """R@1 of each published result, with the number of the note that names it."""
    shown = []
    for one in row.published:
        notes.append(f"{one.name}. {one.differs} Source: {one.source}.")
        value = one.metrics.get("t2v_R1")
        shown.append(f"{'' if value is None else f'{value:.1f} '}({len(notes)})")
    return ", ".join(shown)


def _commands(table: TableResult) -> str:
    """Fenced, so that they can be copied; the fence is longer than any in the commands."""
    lines = [line for row in table.rows if row.command for line in (f"# {_one_line(row.row.name)}", row.command)]
    if not lines:
        return ""
    longest = max((len(run) for run in re.findall("`+", "\n".join(lines))), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join((f"{fence}sh", *lines, fence, ""))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def escaped(text: str) -> str:
    """As a line of Markdown that shows the text as it is, in a table too."""
    return re.sub(r"([\\`*_|<>\[\]#~&$])", r"\\\1", _one_line(text))
