"""What is recorded at every step and validation: JSON lines, TensorBoard's curves, and Weights & Biases if asked for."""

import json
import math
import os
import secrets
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from crc32c import crc32c

from c4c.files import is_up_to, lines_up_to, replace_text
from shards import count

_MOST_WAITING_BYTES = 64 << 20  # a step is about 3 kB


class Metrics:
    """RUN/metrics.jsonl, one object a step; RUN/eval.jsonl, one a validation; and both in TensorBoard.

    wandb: a project to send them to as well. config: the settings to show there. say: called with a message about what cannot be written.
    """

    def __init__(
        self, folder: Path, resumed_at: int, wandb: str = "", config: dict | None = None,
        say: Callable[[str], None] = lambda text: None,
    ):  # fmt: skip
        self._wandb = _start_wandb(folder, wandb, config) if wandb else None
        _forget_after(folder, resumed_at)
        self._steps = Appender(folder / "metrics.jsonl", say)
        self._evals = Appender(folder / "eval.jsonl", say)
        self._board = Board(folder / "tensorboard", resumed_at, say)

    def step(self, step: int, values: dict) -> None:
        """Record the metrics of a step."""
        self._write(self._steps, step, values)

    def validation(self, step: int, values: dict, ema: float = 0.0) -> None:
        """Record the metrics of the validation after `step` steps. ema: the decay of the averaged weights, if they are what is evaluated."""
        units = {"MdR": "rank", "MnR": "rank"}  # the others are per cent
        flat = {f"val/{way}_{k}_{units.get(k, 'pct')}": v for way in ("t2v", "v2t") for k, v in values[way].items()}
        if pairs := values.get("pairs"):
            flat |= {f"val/pairs_{name}_pct": pairs[name] for name in ("R1", "own_first")}
            flat |= {f"val/pairs_{name}": pairs[name] for name in ("n_texts", "n_pairs")}
        averaged = {"val/ema_decay": ema} if ema else {}
        counts = {"val/n_texts": values["n_texts"], "val/n_videos": values["n_videos"]}
        self._write(self._evals, step, flat | counts | averaged)

    def close(self) -> None:
        """Write what waits, and close all files."""
        self._steps.close()
        self._evals.close()
        self._board.close()
        if self._wandb:
            self._wandb.finish()

    def _write(self, file: "Appender", step: int, values: dict) -> None:
        # JSON has no NaN
        known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        row = {"step": step, **known, "time_unix_s": round(time.time(), 3)}
        file.add(json.dumps(row).encode() + b"\n")
        self._board.add(step, values)
        if self._wandb:
            self._wandb.log(values, step=step)


class Appender:
    """Appends records to a file, each whole or not at all.

    A record that cannot be written (a full disk) waits in memory, and every further record tries it again: training goes on.
    Beyond `most` waiting bytes the oldest are lost. Raises OSError if the file cannot be opened.
    """

    def __init__(self, path: Path, say: Callable[[str], None], most: int = _MOST_WAITING_BYTES):
        self._path, self._say, self._most = path, say, most
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = self._late = self._lost = 0

    def add(self, record: bytes) -> None:
        """Append a record, now or as soon as there is room."""
        self._waiting.append(record)
        self._waiting_bytes += len(record)
        self._flush()
        while self._waiting_bytes > self._most:
            self._waiting_bytes -= len(self._waiting.popleft())
            self._lost += 1

    def close(self) -> None:
        """Write what waits, if there is room now, and say what is lost."""
        self._flush()
        self._lost += len(self._waiting)
        if self._lost:
            self._say(
                f"warning: {count(self._lost, 'record')} of {self._path} could not be written and will be missing"
            )
        os.close(self._file)

    def _flush(self) -> None:
        try:
            while self._waiting:
                self._append(self._waiting[0])
                self._waiting_bytes -= len(self._waiting.popleft())
        except OSError as error:
            if not self._late:
                self._say(
                    f"warning: {self._path} cannot be written ({error.strerror}). Training goes on, and what belongs there is "
                    "kept in memory until there is room"
                )
            self._late = max(self._late, len(self._waiting))
            return
        if self._late:
            self._say(f"{self._path} can be written again; {count(self._late, 'record')} were written late")
            self._late = 0

    def _append(self, record: bytes) -> None:
        size = os.fstat(self._file).st_size
        try:
            while record:
                record = record[os.write(self._file, record) :]
        except OSError:
            os.ftruncate(self._file, size)
            raise


class Board:
    """A file of TensorBoard's in `folder`, for steps after `resumed_at`. Written at once, so that a kill loses nothing."""

    def __init__(self, folder: Path, resumed_at: int, say: Callable[[str], None]):
        from tensorboard.compat.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = Appender(folder / name, say)
        self._add(file_version="brain.Event:2")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(step=resumed_at + 1, session_log=start)  # from this step on, earlier files do not count

    def add(self, step: int, values: dict[str, float]) -> None:
        """Append a point to each of these curves."""
        scalars = [self._summary.Value(tag=name, simple_value=float(value)) for name, value in values.items()]
        self._add(step=step, summary=self._summary(value=scalars))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _add(self, **event) -> None:
        self._file.add(tf_record(self._event(wall_time=time.time(), **event).SerializeToString()))


def tf_record(data: bytes) -> bytes:
    """One record of TensorFlow's record files. tensorboard's own writer takes 0.2 s to import, for it imports boto3."""
    length = struct.pack("<Q", len(data))
    return b"".join((length, _masked_crc32c(length), data, _masked_crc32c(data)))


def _masked_crc32c(data: bytes) -> bytes:
    check = crc32c(data)
    return struct.pack("<I", ((check >> 15 | check << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _start_wandb(folder: Path, project: str, config: dict | None):
    import wandb

    known = folder / "wandb_id"  # a new run in the folder is another run there too
    if not known.exists():
        known.write_text(secrets.token_hex(8))
    return wandb.init(
        project=project, name=folder.name, id=known.read_text(), resume="allow", dir=str(folder), config=config or {}
    )


def last_step(folder: Path) -> int:
    """The last step of which the run folder holds metrics, 0 if there is none."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return 0
    return max((json.loads(line).get("step", 0) for line in lines_up_to(path, sys.maxsize)), default=0)


def _forget_after(folder: Path, step: int) -> None:
    """A resumed run writes the steps after its checkpoint anew."""
    paths = [folder / name for name in ("metrics.jsonl", "eval.jsonl", "bad_steps.jsonl")]
    replace_text({path: lines_up_to(path, step) for path in paths if path.exists() and not is_up_to(path, step)})
