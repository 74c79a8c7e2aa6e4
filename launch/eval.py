"""Evaluate a run, or any checkpoint:  python launch/eval.py --ckpt runs/demo [--tag best] [--json out.json]

python launch/eval.py --ckpt openai:ViT-B-32 --data data/msrvtt/test [data.num_frames=8]
deepspeed launch/eval.py --ckpt runs/msrvtt          # several ranks share the videos; torchrun and srun start it as well
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # outside its environment too: then an error says what to do

from c4c.errors import exit_code
from c4c.launched import let_threads_sleep, quick_imports


def main() -> int:
    """The command; returns its exit code."""
    let_threads_sleep()
    parser = argparse.ArgumentParser(
        description="Evaluate a checkpoint, of a run or any other: how well captions find their videos in a test split, and "
        "videos their captions. Started by deepspeed, torchrun or srun, ranks share the work."
    )
    parser.add_argument(
        "--ckpt", required=True,
        help="a run folder; a file of weights (CLIP4Clip, mmaction2, OpenAI, open_clip, safetensors); or TAG:BACKBONE as "
        "open_clip names them, openai:ViT-B-32",
    )  # fmt: skip
    parser.add_argument(
        "--tag",
        help="a checkpoint of the run: its name, or `--tag best` for the best validated one (default: the latest)",
    )
    parser.add_argument("--data", help="a packed split (default: the run's own data.test)")
    parser.add_argument("--json", type=Path, help="write the metrics here too")
    parser.add_argument("--ranks", type=Path, help="write each text's rank here, one JSON object a line")
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # launchers pass it
    parser.add_argument(
        "overrides", nargs="*", metavar="data.key=value", help="data settings other than the checkpoint's"
    )
    args = parser.parse_intermixed_args()
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Evaluate. Mistakes are found first; what takes long to import comes after that."""
    from c4c.config import from_dict, override_data
    from c4c.files import require_writable
    from c4c.training.run_folder import is_run, read_config
    from pipelines.config import DataConfig
    from shards.split import Split
    from shards.storage import is_remote, place

    if args.device and not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        raise ValueError(f"--device {args.device}: must be cpu, cuda or cuda:N")
    for option in ("ckpt", "data"):
        if getattr(args, option) == "":
            raise ValueError(f"--{option} is empty: is a variable of the shell not set?")
    if args.json:
        require_writable(f"--json {args.json}", args.json, lambda start: b'"t2v"' in start)
    if args.ranks:
        require_writable(f"--ranks {args.ranks}", args.ranks, lambda start: start.startswith(b'{"rank"'))
        if args.json and args.json.resolve() == args.ranks.resolve():
            raise ValueError(f"--json and --ranks both name {args.ranks}: name two files")
    words = [*args.overrides, *([f"data.test={args.data}"] if args.data else [])]
    named = from_dict(read_config(Path(args.ckpt))).data if is_run(args.ckpt) else DataConfig()
    asked = override_data(named, words)
    if not (test := asked.test):
        raise ValueError("--data is not given: name the folder of a packed split")
    if args.ranks and is_remote(place(test)):
        raise ValueError(f"--ranks {args.ranks}: {test} is remote; copy the split to a disk, which --ranks needs")
    split = Split(test, asked.local)

    with quick_imports():
        from c4c.retrieval.evaluate import evaluate_checkpoint

    evaluate_checkpoint(args.ckpt, args.tag, split, words, args.device, args.json, args.ranks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
