"""A folder of files that appears whole, or not at all."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from c4c.files import with_usual_mode
from shards import first_line

# files that transformers and open_clip take for parts of a tokenizer, whichever lie in a folder
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
             "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model")  # fmt: skip


@contextmanager
def written(folder: Path) -> Iterator[Path]:
    """Gives a folder beside; what is written into it becomes `folder`, or replaces files of the same names in it.

    Raises OSError that names the folder.
    """
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir()
        yield beside
        for file in beside.iterdir():
            with_usual_mode(file)
        if folder.exists():
            for file in sorted(beside.iterdir()):
                os.replace(file, folder / file.name)
        else:
            os.replace(beside, folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and "write" not in str(error) and "space" not in str(error):
            raise
        reason = first_line(error)
        raise OSError(f"{folder} could not be written ({reason}): is there room on the disk?") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def drop_earlier(folder: Path, beside: Path, names: Iterable[str]) -> None:
    """Delete what an earlier export left in `folder` under these names and the one in `beside` does not replace: it would be read
    with the new files."""
    for name in names:
        if not (beside / name).exists():
            (folder / name).unlink(missing_ok=True)


def save_tensors(state: dict[str, Tensor], path: Path) -> None:
    """As safetensors; tensors that share memory are copied."""
    save_file({k: v.detach().cpu().clone().contiguous() for k, v in state.items()}, path, metadata={"format": "pt"})


def save_json(about: dict, path: Path) -> None:
    """With an indent, for people."""
    path.write_text(json.dumps(about, indent=2) + "\n")
