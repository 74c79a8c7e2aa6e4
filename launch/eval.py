"""Evaluate a run, or any checkpoint:  python launch/eval.py --ckpt runs/demo [--json out.json]

python launch/eval.py --ckpt openai:ViT-B-32 --data data/msrvtt/test [data.num_frames=8]
"""

import argparse
import json
import re
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Rank every test video for every caption, with a run's checkpoint or any other."
    )
    parser.add_argument(
        "--ckpt", required=True,
        help="a run folder; a file of weights (CLIP4Clip, mmaction2, OpenAI, open_clip, safetensors); or TAG:BACKBONE as "
        "open_clip names them, openai:ViT-B-32",
    )  # fmt: skip
    parser.add_argument("--tag", help="a checkpoint of the run: its name, or best (the latest)")
    parser.add_argument("--data", help="a packed split (the run's own data.test)")
    parser.add_argument("--json", type=Path, help="write the metrics here too")
    parser.add_argument("--ranks", type=Path, help="write each text's rank here, one JSON object a line")
    parser.add_argument("--device", help="cuda or cpu (cuda where there is one)")
    parser.add_argument(
        "overrides", nargs="*", metavar="data.key=value", help="data settings other than the checkpoint's"
    )
    args = parser.parse_intermixed_args()
    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def run(args: argparse.Namespace) -> int:
    """What can be refused is refused first, and what takes long is imported after that."""
    from c4c.config import from_dict, override_data
    from c4c.files import require_writable
    from c4c.run import is_run, read_config
    from pipelines.config import DataConfig
    from shards.dataset import Split
    from shards.storage import is_remote, place

    if args.device and not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        raise ValueError(f"--device {args.device}: must be cpu, cuda or cuda:N")
    for option, path in (("--json", args.json), ("--ranks", args.ranks)):
        if path:
            require_writable(option, path)
    words = [*args.overrides, *([f"data.test={args.data}"] if args.data else [])]
    named = from_dict(read_config(Path(args.ckpt))).data if is_run(args.ckpt) else DataConfig()
    asked = override_data(named, words)
    if not (test := asked.test):
        raise ValueError("--data is not given: name the folder of a packed split")
    if args.ranks and is_remote(place(test)):
        raise ValueError(f"--ranks {args.ranks}: {test} is remote; copy the split to a disk, which --ranks needs")
    split = Split(test, asked.local)

    import torch
    from rich.console import Console

    from c4c.engine import quiet_libraries
    from c4c.evaluate import evaluate, write_ranks
    from c4c.files import replace_text
    from c4c.pretrained import open_checkpoint
    from c4c.report import metrics_table

    quiet_libraries()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {args.device}: this machine has {torch.cuda.device_count()} GPUs that torch can use"
        )
    model, data = open_checkpoint(args.ckpt, args.tag)
    data = override_data(data, words)
    model.check_data(data, args.ckpt)
    model = model.to(device)
    result, found = evaluate(model, model, split, data, device)
    Console().print(metrics_table(result))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        replace_text({args.json: json.dumps(result, indent=2) + "\n"})
    if args.ranks:
        write_ranks(args.ranks, split, data, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
