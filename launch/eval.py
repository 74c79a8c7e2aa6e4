"""Evaluate a run:  python launch/eval.py --ckpt runs/demo [--json out.json]"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from c4c.config import from_dict
from c4c.engine import quiet_libraries
from c4c.evaluate import evaluate, write_ranks
from c4c.model import CLIP4Clip
from c4c.report import metrics_table
from c4c.run import read_config
from shards.dataset import Split


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Rank every test video for every caption, with a run's ZeRO checkpoint."
    )
    parser.add_argument("--ckpt", type=Path, required=True, help="a run folder, as run.dir named it")
    parser.add_argument("--tag", help="a checkpoint in it (the latest)")
    parser.add_argument("--data", help="a packed split (the run's own data.test)")
    parser.add_argument("--json", type=Path, help="write the metrics here too")
    parser.add_argument("--ranks", type=Path, help="write each text's rank here, one JSON object a line")
    parser.add_argument("--device", help="cuda or cpu (cuda where there is one)")
    args = parser.parse_args()
    try:
        quiet_libraries()
        config = from_dict(read_config(args.ckpt))
        data = replace(config.data, test=args.data or config.data.test)
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        split = Split(data.test, data.local)
        model = CLIP4Clip.from_checkpoint(args.ckpt, tag=args.tag).to(device)
        result, found = evaluate(model, model, split, data, device)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    Console().print(metrics_table(result))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    if args.ranks:
        write_ranks(args.ranks, split, data, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
