"""What launch/eval.py is asked for, checked before anything is read that takes time. Imports nothing heavy."""

import re
from dataclasses import dataclass
from pathlib import Path

from c4c.config import from_dict, override_data
from c4c.files import require_writable
from c4c.merging import Merging
from c4c.option_checks import require_device, require_not_empty
from c4c.training.run_folder import is_run, located, read_config
from pipelines.config import DataConfig
from shards import ShardError
from shards.concat import open_splits
from shards.dataset import Dataset
from shards.split import Split
from shards.storage import is_remote, place

RERANK = ("dsl", "qbnorm")
DUMPS = (".pkl", ".pickle", ".parquet", ".npz")
_WORDS = ("ckpt", "tag", "backbone", "bank")  # options that take a word
SETTING = re.compile(r"[a-z_]+\.[a-z_]+=")
# first bytes of files that an option may replace
_OURS = {
    "json": lambda start: b'"t2v"' in start,
    "ranks": lambda start: start.startswith(b'{"rank"'),
    "topk_to": lambda start: start.startswith(b'{"text"'),
    "report": lambda start: start[:512].lstrip().lower().startswith((b"<!doctype html", b"<html")),
    ".pkl": lambda start: start.startswith(b"\x80"),
    ".pickle": lambda start: start.startswith(b"\x80"),
    ".parquet": lambda start: start.startswith(b"PAR1"),
    ".npz": lambda start: start.startswith(b"PK"),
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """An evaluation. ckpt, tag, ema, backbone: as `c4c.models.pretrained.open_checkpoint` takes them. words: `data.key=value`, over the
    checkpoint's own settings. device: cuda, cuda:N or cpu; None: cuda where there is one. clips, crops: see c4c.retrieval.views.
    rerank: of RERANK. bank: of QB-Norm, its captions, and with `bank_videos` its videos. merging: of tokens in the image tower; None: the
    checkpoint's own. What else is None is not wanted.
    """

    ckpt: str
    splits: list[Split]
    tag: str | None = None
    ema: bool = True
    backbone: str | None = None
    words: tuple[str, ...] = ()
    device: str | None = None
    json: Path | None = None
    ranks: Path | None = None
    dump: Path | None = None
    report: Path | None = None
    topk: int = 0
    topk_to: Path | None = None
    clips: int = 1
    crops: int = 1
    rerank: tuple[str, ...] = ()
    bank: Dataset | None = None
    bank_videos: bool = False
    merging: Merging | None = None


def checked(args) -> Request:
    """The request that a command line makes. Raises ValueError, or OSError, for what cannot be done."""
    require_device(args.device)
    words, places, methods = list(args.overrides), _own(args.data or []), _own([args.rerank or []])
    for taken in [*(args.data or []), args.rerank or []]:  # an option takes all words after it
        words += [word for word in taken if SETTING.match(word)]
    require_not_empty([*((name, getattr(args, name)) for name in _WORDS), *(("data", path) for path in places)])
    if args.data and not places:
        raise ValueError("--data is not given: name the folder of a packed split")
    _check_files(args)
    _check_numbers(args, methods)
    asked = data_of(args.ckpt, args.tag, not args.no_ema, words)
    tests = places or ([asked.test] if asked.test else [])
    if not tests:
        raise ValueError("--data is not given: name the folder of a packed split")
    _check_several(args, tests)
    try:
        splits = [Split(test, asked.local) for test in tests]
    except ShardError as error:
        if places:
            raise
        told = str(error).rstrip(".")
        raise ShardError(f"data.test of {args.ckpt}: {told}. If it lies elsewhere, name it with --data") from error
    return Request(
        ckpt=args.ckpt, splits=splits, tag=args.tag, ema=not args.no_ema, backbone=args.backbone, words=tuple(words), device=args.device,
        json=args.json, ranks=args.ranks, dump=args.dump, report=args.report, topk=args.topk or 0, topk_to=args.topk_to,
        clips=args.clips, crops=args.crops, rerank=tuple(dict.fromkeys(methods)),
        merging=_merging(args), bank=_bank(args, asked, splits) if "qbnorm" in methods else None, bank_videos=args.bank_videos,
    )  # fmt: skip


def data_of(ckpt: str, tag: str | None, ema: bool, words: list[str]) -> DataConfig:
    """The data settings of a run with `words` over them; of weights that are no run's, only those. Raises ValueError."""
    run, *_ = located(ckpt, tag, ema)
    return override_data(from_dict(read_config(Path(run))).data if is_run(run) else DataConfig(), words)


def _own(taken: list[list[str]]) -> list[str]:
    """The words that are an option's, without settings that followed them."""
    return [word for words in taken for word in words if not SETTING.match(word)]


def _merging(args) -> Merging | None:
    """What --merge and --merge-frames ask for. Raises ValueError."""
    if args.merge is None:
        if args.merge_frames is not None:
            raise ValueError(f"--merge-frames {args.merge_frames} says where --merge N joins frames: give --merge too")
        return None
    if args.merge < 0:
        raise ValueError(f"--merge {args.merge}: must be 0, which merges nothing, or more")
    blocks = (args.merge_frames or "").split(",") if args.merge_frames else []
    if not all(re.fullmatch(r"\d+", block.strip()) for block in blocks):
        raise ValueError(
            f"--merge-frames {args.merge_frames}: must be numbers of blocks with commas between them: 8,10"
        )
    return Merging(tokens=args.merge, joins=tuple(map(int, blocks)))


def _check_files(args) -> None:
    """That what is to be written can be, and no two options name one file."""
    written: dict[Path, str] = {}
    for name in ("json", "ranks", "dump", "report", "topk_to"):
        path: Path | None = getattr(args, name)
        if path is None:
            continue
        option = f"--{name.replace('_', '-')}"
        if name == "dump" and path.suffix not in DUMPS:
            raise ValueError(
                f"--dump {path}: the name must end with {', '.join(DUMPS[:-1])} or {DUMPS[-1]}, which says what to write"
            )
        if name == "report" and path.suffix not in (".html", ".htm"):
            raise ValueError(f"--report {path}: it is a page, so the name must end with .html")
        require_writable(f"{option} {path}", path, _OURS[path.suffix if name == "dump" else name])
        if (other := written.setdefault(path.resolve(), option)) != option:
            raise ValueError(f"{other} and {option} both name {path}: name two files")


def _check_numbers(args, methods: list[str]) -> None:
    if args.rerank is not None and not (methods and set(methods) <= set(RERANK)):
        raise ValueError(f"--rerank must be {' or '.join(RERANK)}, or both; got {' '.join(methods) or 'none'}")
    if args.topk is not None and not 1 <= args.topk <= 1000:
        raise ValueError(f"--topk {args.topk}: must be from 1 to 1000")
    if args.topk_to and not args.topk:
        raise ValueError(f"--topk-to {args.topk_to} says where --topk K writes: give --topk too")
    if not 1 <= args.clips <= 100:
        raise ValueError(f"--clips {args.clips}: must be from 1 to 100")
    if "qbnorm" not in methods:
        for option in ("bank", "bank_videos"):
            if getattr(args, option):
                raise ValueError(f"--{option.replace('_', '-')} is for --rerank qbnorm: give that too")


def _check_several(args, tests: list[str]) -> None:
    remote = next((test for test in tests if is_remote(place(test))), None)
    if args.ranks and remote:
        raise ValueError(f"--ranks {args.ranks}: {remote} is remote; copy the split to a disk, which --ranks needs")
    if len(tests) == 1:
        return
    if len({str(place(test)) for test in tests}) < len(tests):
        raise ValueError(f"--data names a split twice: {', '.join(tests)}")
    for name in ("ranks", "dump", "report", "topk"):
        if value := getattr(args, name):
            raise ValueError(
                f"--{name} {value} is of one split, and --data names {len(tests)}: evaluate them one at a time"
            )


def _bank(args, asked: DataConfig, splits: list[Split]) -> Dataset:
    where = args.bank or asked.train
    if not where:
        raise ValueError(
            f"--rerank qbnorm needs a bank of training captions, and {args.ckpt} names no data.train: give --bank SPLIT"
        )
    bank = open_splits(where, asked.local)
    for split in splits:
        if split.digest in {part.digest for part in bank.parts}:
            raise ValueError(
                f"--bank {where} is the split that is evaluated: its captions are the test queries; name a training split"
            )
    return bank
