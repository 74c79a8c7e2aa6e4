"""`python -m c4c.backbones [NAME ...]`: the backbones that model.backbone takes, and what each brings along.

NAME: a name of open_clip, hf-hub:ID, local-dir:DIR, or a part of names (PE-Core, SigLIP2); none: all that open_clip knows, which takes
about a minute.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from c4c.errors import exit_code
from c4c.launched import seen_enough
from c4c.settings import names_weights

_COLUMNS = (
    ("name", 33),
    ("picture", 15),
    ("words", 5),
    ("weights M", 9),
    ("GFLOP a clip", 12),
    ("tokenizer", 34),
    ("use", 3),
)


@dataclass(frozen=True)
class BackboneRow:
    """A backbone. reason: why it cannot be used, '' if it can; then the numbers are None.

    image_size: pixels. resize_mode: see data.resize_mode. words: tokens of the longest caption. weights: numbers. gflop: of the forward
    pass of a clip and its caption, 1e9. tags: open_clip's weights; each with TAG:NAME as a checkpoint.
    """

    name: str
    reason: str
    image_size: int | None = None
    resize_mode: str | None = None
    words: int | None = None
    weights: int | None = None
    gflop: float | None = None
    tokenizer: str | None = None
    tags: tuple[str, ...] = ()


def describe(name: str, frames: int = 12) -> BackboneRow:
    """What a backbone is, on torch's meta device, where no weight takes memory."""
    import open_clip

    from c4c.models import backbone, towers
    from c4c.models.flops import count_towers, per_pair

    tags = tuple(open_clip.list_pretrained_tags_by_model(name))
    try:
        spec = backbone.named(name)
        clip = towers.build_on_meta(spec)
        words = towers.context_length(spec)
        if towers.is_plain(spec):
            flops = per_pair(spec, frames, words)
        else:
            picture, caption = count_towers(spec, words, clip)
            flops = frames * picture + caption
    except (ValueError, RuntimeError, TypeError, AssertionError, AttributeError, KeyError) as error:
        return BackboneRow(
            name, " ".join(str(error).removeprefix(f"model.backbone={name} cannot be used: ").split()), tags=tags
        )
    about = spec["tokenizer"]
    return BackboneRow(
        name, "", towers.image_size(spec), spec["preprocess_cfg"]["resize_mode"], words, sum(p.numel() for p in clip.parameters()),
        round(flops / 1e9, 1), about["name"] or "CLIP's", tags,
    )  # fmt: skip


def chosen(words: list[str]) -> list[str]:
    """The names that `words` mean, all of open_clip's for none. Raises ValueError for one that means nothing."""
    import open_clip

    import c4c.models.backbone  # noqa: F401  it tells open_clip of c4c's own

    known = open_clip.list_models()
    if not words:
        return known
    names: list[str] = []
    for word in words:
        hits = [word] if word in known or names_weights(word) else [n for n in known if word.lower() in n.lower()]
        if not hits:
            raise ValueError(
                f"{word}: open_clip knows no backbone with that in its name; python -m c4c.backbones lists all"
            )
        names += [name for name in hits if name not in names]
    return names


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m c4c.backbones",
        description="List the backbones that model.backbone takes: size of their pictures and how these are resized, tokens a caption, "
        "weights, operations of a clip's forward pass, tokenizer, whether they can be used, and open_clip's tags of weights.",
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="a name, a part of names, hf-hub:ID or local-dir:DIR (default: all)"
    )
    parser.add_argument("--frames", type=int, default=12, help="frames of a clip, for its operations (default: 12)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    args = parser.parse_args(argv)
    if args.frames < 1:
        parser.error(f"--frames {args.frames}: must be at least 1")
    return exit_code(lambda: _print(args))


def _print(args: argparse.Namespace) -> int:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with seen_enough():
        for line in _lines(args):
            print(line, flush=True)
    return 0


def _lines(args: argparse.Namespace) -> Iterator[str]:
    if not args.json:
        yield "  ".join(f"{title:<{width}}" for title, width in _COLUMNS) + "  tags of weights, or why not"
    for name in chosen(args.names):
        row = describe(name, args.frames)
        yield json.dumps(asdict(row)) if args.json else _line(row)


def _line(row: BackboneRow) -> str:
    if row.reason:
        blank = sum(width + 2 for _, width in _COLUMNS[1:-1])
        return f"{row.name:<33}  {'':{blank}}no   {row.reason}"
    assert row.weights is not None
    picture = f"{row.image_size} {row.resize_mode}"
    numbers = f"{row.words:>5}  {row.weights / 1e6:>9.1f}  {row.gflop:>12.1f}"
    return f"{row.name:<33}  {picture:<15}  {numbers}  {row.tokenizer:<34}  yes  {', '.join(row.tags) or '-'}"


if __name__ == "__main__":
    sys.exit(main())
