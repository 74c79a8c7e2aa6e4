"""What a launcher told this process, and how to start it again. Imports nothing heavy: it is asked before torch is there."""

import codecs
import errno
import gc
import io
import json
import os
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import NoReturn, TextIO

_DEFAULT_PORT = "29500"  # of deepspeed's launcher


def let_threads_sleep() -> None:
    """Have threads of torch that wait for each other sleep, unless the environment says otherwise; before torch is imported.

    OpenMP's threads spin by default. As soon as another program, or decoding, wants the same core, each of a step's hundreds of waits
    then takes until the system interrupts the spinning: on two busy cores a step was 30 times slower.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import large packages inside without cyclic garbage collection, which takes a fifth of the time."""
    gc.disable()  # (not gc.freeze: then packages complain at exit of objects that nobody collected)
    try:
        yield
    finally:
        gc.enable()


class Lossy:
    """A text stream that drops what cannot be written: the terminal is gone, or the disk of the log is full."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what can be written; returns the length of all of it."""
        with suppress(OSError, ValueError, AttributeError):  # ValueError: it is closed
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, if that is possible."""
        with suppress(OSError, ValueError, AttributeError):
            self._stream.flush()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


def open_streams() -> None:
    """Give a process that was started without standard output or error somewhere to write: libraries do not ask. Errors and
    reports that nobody can read any more end no run, nor do names in letters that the terminal's encoding lacks."""
    nowhere = [name for name in ("stdout", "stderr") if getattr(sys, name) is None]
    for name in nowhere:
        setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 for as long as the process lives
    codecs.register_error("c4c-escape", _escaped)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # it is not, for instance, in a notebook
            stream.reconfigure(errors="c4c-escape")
    if not isinstance(sys.stderr, Lossy):
        sys.stderr = Lossy(sys.stderr)


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """For characters that a stream's encoding lacks: as in JSON, so that lines of JSON stay valid."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


@contextmanager
def seen_enough() -> Iterator[None]:
    """What is printed inside may end early: a reader such as `| head` has what it wants. What is printed later goes nowhere."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def own_rank() -> int:
    """This process's rank, 0 without a launcher."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))


def command_again(*words: str, port: int | str | None = None) -> str:
    """The command that started this rank, as a person would type it, with further words at its end.

    port: for the ranks to meet at; None: as before.
    """
    env, given = os.environ, [w for w in sys.argv if not w.startswith("--local_rank") and w not in words]
    local, world = env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", "1")), env.get("WORLD_SIZE", "1")
    start = "python"
    if "TORCHELASTIC_RUN_ID" in env:
        start = f"torchrun --nproc_per_node {local}"
        start += f" --master_port {port}" if port else ""
    elif "SLURM_STEP_NUM_TASKS" in env:
        start = f"MASTER_PORT={port} srun python" if port else "srun python"
    elif "LOCAL_SIZE" in env:
        start = "deepspeed" if local != world else f"deepspeed --num_accelerators {world}"
        if not port and local == world != "1":  # on several machines the person knows the options
            port = env.get("MASTER_PORT", _DEFAULT_PORT)
        start += f" --master_port {port}" if port and str(port) != _DEFAULT_PORT else ""
    more = "" if local == world or "srun" in start else "    (on the same machines as before)"
    return f"{start} {shlex.join([*given, *words])}{more}"


def beside_script(name: str) -> str:
    """The path, for a shell, of another script of launch/, written as this one was called."""
    own = Path(sys.argv[0])
    return shlex.quote(str(own.with_name(name) if own.parent.name == "launch" else Path("launch", name)))


def require_port() -> None:
    """On rank 0: raise ValueError if another program has the port at which the ranks are to meet; a single rank takes another."""
    env = os.environ
    meets_at_agent = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if own_rank() or meets_at_agent or "MASTER_PORT" not in env or is_free(port := int(env["MASTER_PORT"])):
        return
    free = next((p for p in range(port + 1, 65536) if is_free(p)), None) or free_port()
    if env.get("WORLD_SIZE") == "1":
        env["MASTER_PORT"] = str(free)
        return
    raise ValueError(
        f"port {port}, at which the ranks meet, is taken, perhaps by another training: name another one\n"
        f"    {command_again(port=free)}"
    )


def is_free(port: int) -> bool:
    """Whether no other program listens at a port of this machine."""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a run that has just ended does not hold it
        try:
            s.bind(("", port))
        except OSError as error:
            return error.errno != errno.EADDRINUSE
    return True


def free_port() -> int:
    """A TCP port that no process of this machine uses now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def leave(code: int, join_threads: bool = True) -> NoReturn:
    """End this process at once: a normal exit sometimes aborts while torch's threads wait for ranks that are gone.

    join_threads: wait for the threads that are not daemons before."""
    for thread in threading.enumerate() if join_threads else ():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def missing_package(error: ModuleNotFoundError) -> str:
    """What to do about it, in one sentence."""
    if sys.prefix != sys.base_prefix:
        return f"the package {error.name} is not installed in {sys.prefix}: pip install -r requirements.txt -c constraints.txt"
    activate = Path(__file__).parents[1] / ".venv" / "bin" / "activate"
    how = f"source {shlex.quote(str(activate))}" if activate.is_file() else "`make demo` makes it in .venv"
    return f"the package {error.name} is not installed for {sys.executable}: activate the environment first ({how})"


def explain_missing(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A `sys.excepthook` that tells of a missing package in one sentence."""
    if isinstance(error, ModuleNotFoundError):
        print(f"error: {missing_package(error)}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _explain() -> str | None:
    """What `explained_by` was given."""


@contextmanager
def explained_by(call: Callable[[], str | None]) -> Iterator[None]:
    """While ranks run: `call` tells why a launcher may be ending this one, None if it does not know."""
    global _explain
    before, _explain = _explain, call
    try:
        yield
    finally:
        _explain = before


class Starting:
    """`with Starting("before the first step")`: SIGTERM and SIGINT end the process at once, and rank 0 says so in one line.

    The process exits with 128 + the signal's number. A thread does it, since the main thread may be waiting in C code.
    `c4c.training.signals.Stop` takes over while steps are taken. Does nothing outside the main thread.
    """

    def __init__(self, when: str = ""):
        self._when, self._once = when, threading.Lock()
        self._before: dict = {}

    def __enter__(self) -> "Starting":
        if threading.current_thread() is threading.main_thread():
            self._reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            threading.Thread(target=self._wait, name="c4c-signals", daemon=True).start()
            self._before = {s: signal.signal(s, self._signalled) for s in (signal.SIGTERM, signal.SIGINT)}
            signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_) -> None:
        if self._before:
            signal.set_wakeup_fd(-1)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            os.close(self._writer)  # which ends the thread

    def _signalled(self, number: int, _frame) -> None:
        self._end(number, say=signal.set_wakeup_fd(-1) == self._writer)  # Stop, which resets it, has said all there is

    def _wait(self) -> None:
        while came := os.read(self._reader, 1):
            if came[0] in (signal.SIGTERM, signal.SIGINT):
                self._end(came[0], say=True)
        os.close(self._reader)

    def _end(self, number: int, say: bool) -> None:
        if not self._once.acquire(blocking=False):
            return  # the other thread is at it
        name = signal.Signals(number).name
        if say and own_rank() == 0:
            reason = f"error: {why}" if (why := _explain()) else f"stopped by {name} {self._when}".strip()
            print(reason if why else f"{reason}. Start again with\n    {command_again()}", file=sys.stderr, flush=True)
        os._exit(128 + number)
