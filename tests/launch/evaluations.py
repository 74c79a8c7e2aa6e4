"""What launch/eval.py says and writes."""

import json
import re

from tests.launch.runs import lines


def without_progress(err: str) -> str:
    """Without the lines that tell, every few seconds, how far an evaluation is: how many depends on the machine."""
    return re.sub(r"(?m)^\d+ of \d+ (videos|clips|captions|texts)( of the bank)? (encoded|ranked), .*\n", "", err)


def validated(run, step: int) -> dict:
    """What the run itself wrote after `step`, in the shape that eval.py writes."""
    (line,) = (line for line in lines(run / "eval.jsonl") if line["step"] == step)
    units = {"R1": "pct", "R5": "pct", "R10": "pct", "MdR": "rank", "MnR": "rank"}
    result = {way: {k: line[f"val/{way}_{k}_{unit}"] for k, unit in units.items()} for way in ("t2v", "v2t")}
    return result | {"n_texts": line["val/n_texts"], "n_videos": line["val/n_videos"]}


def metrics_of(file) -> dict:
    """Of what eval.py wrote: without what was evaluated."""
    result = json.loads(file.read_text())
    return {key: result[key] for key in ("t2v", "v2t", "n_texts", "n_videos")}


def refused(outcome: tuple[int, str, str]) -> str:
    code, out, err = outcome
    assert (code, out) == (1, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line
