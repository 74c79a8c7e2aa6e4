"""Evaluate a run, or any checkpoint:  python launch/eval.py --ckpt runs/demo [--tag best] [--json out.json]

python launch/eval.py --ckpt openai:ViT-B-32 --data data/msrvtt/test [data.num_frames=8]
python launch/eval.py --ckpt weights.safetensors --backbone ViT-B-32 --data data/msrvtt/test
python launch/eval.py --ckpt runs/msrvtt --report report.html --dump scores.npz --rerank dsl qbnorm
deepspeed launch/eval.py --ckpt runs/msrvtt          # several ranks share the videos; torchrun and srun start it as well
"""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # outside its environment too: then an error says what to do

from c4c.errors import exit_code
from c4c.helptext import NO_EMA
from c4c.launched import let_threads_sleep, open_streams, quick_imports


def main() -> int:
    """The command; returns its exit code."""
    let_threads_sleep()
    open_streams()  # for --help, too
    parser = argparse.ArgumentParser(
        description="Evaluate a checkpoint, of a run or any other: how well captions find their videos in a test split, and "
        "videos their captions. Started by deepspeed, torchrun or srun, ranks share the work."
    )
    parser.add_argument(
        "--ckpt", required=True,
        help="a run folder; a file of weights (CLIP4Clip, mmaction2, OpenAI, open_clip, transformers, safetensors); a folder "
        "of open_clip's or transformers', or local-dir:DIR, hf-hub:ID; or TAG:BACKBONE as open_clip names them, openai:ViT-B-32",
    )  # fmt: skip
    parser.add_argument(
        "--backbone",
        help="what a file's weights are of, where it does not say (open_clip's files do not): one of open_clip's names, ViT-B-32",
    )
    parser.add_argument(
        "--tag",
        help="a checkpoint of the run: its name, or `--tag best` for the best validated one (default: the latest)",
    )
    parser.add_argument("--no-ema", action="store_true", help=NO_EMA)
    parser.add_argument(
        "--data", nargs="+", action="append", metavar="SPLIT", help="packed splits (default: the run's own data.test)"
    )
    _add_outputs(parser)
    parser.add_argument("--clips", type=int, default=1, metavar="N", help="encode N evenly shifted clips of each video")
    parser.add_argument(
        "--crops", type=int, default=1, choices=(1, 3), help="3: the start, centre and end of the long side"
    )
    parser.add_argument(
        "--rerank", nargs="+", metavar="METHOD",
        help="rank with corrected scores too, in rows of their own: dsl (dual softmax, which sees all test queries) and qbnorm "
        "(querybank normalisation, with a bank of training captions)",
    )  # fmt: skip
    parser.add_argument("--bank", metavar="SPLIT", help="for qbnorm, whose captions (default: the run's data.train)")
    parser.add_argument(
        "--bank-videos", action="store_true", help="for qbnorm, encode its videos for video to text too"
    )
    parser.add_argument(
        "--merge", type=int, metavar="N", help="model.merge, other than the checkpoint's: tokens a frame that each block merges"
    )  # fmt: skip
    parser.add_argument("--merge-frames", metavar="BLOCKS", help="with --merge, as model.merge_frames: 8,10")
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # launchers pass it
    parser.add_argument(
        "overrides", nargs="*", metavar="data.key=value", help="data settings other than the checkpoint's"
    )
    args = parser.parse_intermixed_args()
    return exit_code(lambda: run(args))


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="write the metrics here too")
    add("--ranks", type=Path, metavar="FILE", help="write each text's rank here, one JSON object a line")
    add(
        "--dump", type=Path, metavar="FILE",
        help="write the scores here: .npz or .parquet, or .pkl as mmaction2's test dumps features",
    )  # fmt: skip
    add("--report", type=Path, metavar="FILE.html", help="write a page of evidence here")
    add("--topk", type=int, metavar="K", help="print the K best videos of each text, one JSON object a line")
    add("--topk-to", type=Path, metavar="FILE", help="write them here instead")


def run(args: argparse.Namespace) -> int:
    """Evaluate. Mistakes are found first; what takes long to import comes after that."""
    from c4c.retrieval.request import checked

    request = checked(args)
    with quick_imports():
        from c4c.retrieval.evaluate import evaluate_checkpoint

    evaluate_checkpoint(request)
    return 0


if __name__ == "__main__":
    sys.exit(main())
