"""What `launch/train.py --help` and `--keys` print, and what several commands say of one option.

Imports nothing heavy: `--help` is for those who have installed nothing yet.
"""

import argparse
import textwrap
from pathlib import Path

from c4c.launched import missing_package

NO_EMA = "of a run with train.ema, take the weights of the last step (default: the averaged ones)"


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """`--ckpt`, `--tag`, `--no-ema` and `--backbone`: what `c4c.models.pretrained.open_checkpoint` takes."""
    add = parser.add_argument
    add(
        "--ckpt", required=True,
        help="a run folder; weights of any kind that c4c reads; local-dir:DIR, hf-hub:ID, or TAG:BACKBONE, openai:ViT-B-32",
    )  # fmt: skip
    add(
        "--tag",
        help="a checkpoint of the run: its name, or best: of those that it keeps, the one with the best validation (default: the latest)",
    )
    add("--no-ema", action="store_true", help=NO_EMA)
    add("--backbone", help="what a file's weights are of, where it does not say: one of open_clip's names")


def describe_recipes(folder: Path) -> str:
    """A line for each yaml file that launch/train.py takes: its name and its first comment."""
    texts = {path.name: _text(path) for path in sorted(folder.glob("*.yaml"))}
    lines = [
        f"  {name:25} {textwrap.shorten(text.partition(chr(10))[0].lstrip('# '), 90, placeholder=' …')}"
        for name, text in texts.items()
        if "\nstages:" not in text and "\ntables:" not in text  # which launch/stages.py and c4c.study run
    ]
    return (
        "recipes in launch/cfg:\n" + "\n".join(lines) + "\n\n"
        "keys: run.* data.* cache.* clips.* model.* train.* engine.* checkpoint.* deepspeed.*; --keys prints them all.\n"
        "For example: train.lr=1e-4 run.dir=runs/mine\n"
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError as error:
        return f"# cannot be read: {error.strerror}"


class PrintKeys(argparse.Action):
    """The option `--keys`: print every key of the configuration with its default, and exit."""

    def __call__(self, parser, *_) -> None:
        """What argparse calls where the option stands."""
        try:
            from c4c.config import describe_keys
        except ModuleNotFoundError as error:
            parser.exit(1, f"error: {missing_package(error)}\n")
        print(describe_keys())
        parser.exit()
