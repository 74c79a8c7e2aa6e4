"""The samples in a tar, as far as the tar itself tells: their members, what their .json says, and where damage begins."""

import json
import os
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from crc32c import crc32c

from shards import ShardError
from shards.tar import key_to_name

_NEEDED = {
    "id", "captions", "meta", "codec", "width", "height", "rotation", "mirrored", "duration", "source_frames", "fps",
    "profile", "source", "cut", "frame_number", "frame_time",
}  # fmt: skip
_AT_ONCE = 16 << 20  # bytes in memory while a crc is computed
_FOREIGN = (
    "This tar is not a c4c shard, or one of another format. Unpack it, and pack the videos and captions with: "
    "python -m c4c.shard folder --help"
)


@dataclass(frozen=True)
class TarSample:
    """A sample of a tar: its key, and {extension: (offset, size)} of its members."""

    key: str
    members: dict[str, tuple[int, int]]

    @property
    def id(self) -> str:
        """The video's name in the data set."""
        return key_to_name(self.key)


def whole_samples(tar: Path) -> tuple[list[TarSample], str | None]:
    """The whole samples before the first damage, in order, and what the damage is (None if there is none).

    Raises ShardError if the file is no tar at all.
    """
    size, end, damage = tar.stat().st_size, 0, None
    samples: list[TarSample] = []
    try:
        with tarfile.open(tar, "r:") as archive:
            while (member := archive.next()) is not None:
                if member.offset_data + member.size > size:
                    damage = f"the file ends inside {member.name!r}"
                    break
                end = member.offset_data + member.size
                key, _, extension = member.name.partition(".")
                if not member.isreg() or not key or "/" in member.name:
                    raise ShardError(f"{tar} holds {member.name!r}, which the packer never writes. {_FOREIGN}")
                if not samples or samples[-1].key != key or extension in samples[-1].members:
                    samples.append(TarSample(key, {}))
                samples[-1].members[extension] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        if not samples and not end:
            raise ShardError(f"{tar} is not a tar ({error})") from error
        damage = f"from byte {end} on it cannot be read ({error})"
    if damage is None and not ends_well(tar, end):
        damage = f"what follows byte {end} is no header and no end of an archive"
    if damage and samples and (len(samples[-1].members) < 2 or "json" not in samples[-1].members):
        samples.pop()
    return samples, damage


def ends_well(tar: Path, end: int) -> bool:
    """Whether nothing but zeros, and at least two blocks of them, follows the last member's last byte `end`."""
    with open(tar, "rb") as file:
        file.seek(end)
        rest = file.read(4 * tarfile.RECORDSIZE)
        return len(rest) - (-end % tarfile.BLOCKSIZE) >= 2 * tarfile.BLOCKSIZE and not rest.strip(b"\0")


def description(tar: Path, sample: TarSample, file: BinaryIO) -> dict:
    """The sample's JSON member. Raises ShardError if the packer did not write it."""
    where = f"{tar}: sample {sample.id!r}"
    if "json" not in sample.members:
        raise ShardError(f"{where} has no .json member (only {', '.join(sample.members)}). {_FOREIGN}")
    try:
        described = json.loads(pread(file, *sample.members["json"]))
        missing = _NEEDED - described.keys()
    except (ValueError, AttributeError, RecursionError) as error:
        raise ShardError(f"{where}: its .json member cannot be read ({error}). Copy the tar again.") from error
    if missing:
        raise ShardError(f"{where}: its .json member lacks {', '.join(sorted(missing))}. {_FOREIGN}")
    if len(sample.members) != 2:
        raise ShardError(
            f"{where} has the members {', '.join(sample.members)}, not one video and its .json. {_FOREIGN}"
        )
    if sample.id != described["id"]:
        raise ShardError(
            f"{where} is called {str(described['id'])[:80]!r} in its .json member: the tar has been changed"
        )
    return described


def refuse_odd(described: dict) -> None:
    """Raises ValueError for values of the JSON member that fit their columns, but that the packer never writes."""
    if not re.fullmatch(r"[0-9]{1,10}/0*[1-9][0-9]{0,9}", str(described["fps"])):
        raise ValueError(f"fps {str(described['fps'])[:40]!r}")
    for name in ("duration", "width", "height", "source_frames"):
        value = described[name]
        if type(value) not in (int, float) or not 0 <= value < 2**31:
            raise ValueError(f"{name} {str(value)[:40]}")
    for name, kind in (("rotation", int), ("mirrored", bool)):
        if type(described[name]) is not kind:
            raise ValueError(f"{name} {str(described[name])[:40]}")
    captions, profile = described["captions"], described["profile"]
    if not captions or not all(c.keys() == {"text", "start", "end"} and type(c["text"]) is str for c in captions):
        raise ValueError("captions")
    if type(profile) is not dict or type(profile.get("name")) is not str:
        raise ValueError("profile")


def member_crc(file: BinaryIO, offset: int, size: int) -> int:
    """crc32c of bytes of a file, which are read in pieces."""
    crc = 0
    for at in range(offset, offset + size, _AT_ONCE):
        crc = crc32c(pread(file, at, min(_AT_ONCE, offset + size - at)), crc)
    return crc


def pread(file: BinaryIO, offset: int, size: int) -> bytes:
    """Bytes of a file, whose position stays."""
    return os.pread(file.fileno(), size, offset)
