"""What DeepSpeed's compiling of its fused Adam needs around it: a folder, headers, ninja, a lock that does not outlive its owner, GPUs
named as DeepSpeed reads them, and what the processor can do. All of it was seen with DeepSpeed 0.19.8 and torch 2.15."""

import fcntl
import os
import platform
import re
import sys
from pathlib import Path

import cpuinfo
from torch.utils import file_baton

from shards.storage import is_at
from shards.user_cache import own_temporary

ARCHITECTURES = "TORCH_CUDA_ARCH_LIST"


def choose_folder() -> None:
    """Called before DeepSpeed is imported: one folder of compiled optimizers an environment, and another one for CPUs.

    DeepSpeed's fused Adam has the same name on a GPU and on a CPU. In one folder, each would be compiled over the other, under the feet
    of a run that loads it.
    """
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    folder = Path(given) if given else _extensions_folder()
    if folder is not None and os.environ.get("DS_ACCELERATOR") == "cpu" and folder.name != "cpu":
        folder /= "cpu"
    if folder is not None:
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)


def _extensions_folder() -> Path | None:
    """A folder for compiled optimizers that can be written to; None for torch's own choice, ~/.cache/torch_extensions.

    By default all environments share that one, and each compiles them again. An environment of an image may be read-only, and
    so may a home.
    """
    own = Path(sys.prefix) / "torch_extensions"
    if sys.prefix != sys.base_prefix and os.access(own if own.exists() else sys.prefix, os.W_OK):
        return own
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    above = next(folder for folder in (cache, *cache.parents) if folder.exists())
    homeless = cache.parts[0] == "~"  # nobody knows the user but by number: torch would make a folder of that name here
    return None if os.access(above, os.W_OK) and not homeless else own_temporary("c4c-torch-extensions")


def prepare() -> None:
    """Called before anything is compiled, or loaded that was."""
    # an environment that is not activated has the `ninja` that DeepSpeed looks for on PATH beside its python
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    if named := os.environ.get(ARCHITECTURES):
        os.environ[ARCHITECTURES] = plain_architectures(named)
    if processor():
        cpuinfo.get_cpu_info = processor
    file_baton.FileBaton = Baton  # type: ignore[misc]
    if cpp_extension := sys.modules.get("torch.utils.cpp_extension"):
        cpp_extension.FileBaton = Baton  # type: ignore[attr-defined]


def processor() -> dict:
    """What DeepSpeed asks py-cpuinfo, which starts a process for a second at each of the two calls; {} where it is to be asked itself."""
    if platform.machine() != "x86_64" or not (file := Path("/proc/cpuinfo")).is_file():
        return {}
    flags = re.search(r"^flags\s*:(.*)$", file.read_text(), re.MULTILINE)
    return {"arch": "X86_64", "flags": flags[1].split()} if flags else {}


def plain_architectures(named: str) -> str:
    """`9.0a 10.0f+PTX` -> `9.0;10.0+PTX`: torch and images know GPUs' own forms of an architecture, DeepSpeed ends with a ValueError at
    their letters. Its kernels need none of what the letters stand for."""
    return ";".join(re.sub(r"(?<=\d)[a-z](?=\+|$)", "", name) for name in re.split(r"[;\s]+", named.strip()))


def show_headers(folders: list[Path]) -> None:
    """Let compilers look into these folders too, after those they know. torch.utils.cpp_extension shows them CUDA_HOME's alone."""
    known = [part for part in os.environ.get("CPATH", "").split(os.pathsep) if part]
    os.environ["CPATH"] = os.pathsep.join([*known, *(str(folder) for folder in folders if str(folder) not in known)])


class Baton(file_baton.FileBaton):
    """torch's lock of a folder in which something is compiled, held by the system.

    torch's own is a file that is there: where its owner was killed, every later run waits for ever for it to go, without a word. This one
    also locks the file, which ends with the process. A file that nobody has locked is left over, and taken.
    """

    _held: int | None = None

    def try_acquire(self) -> bool:
        """Whether this process has it now."""
        while True:
            try:
                fd, made = os.open(self.lock_file_path, os.O_CREAT | os.O_EXCL, 0o644), True
            except FileExistsError:
                try:
                    fd, made = os.open(self.lock_file_path, os.O_RDONLY), False
                except FileNotFoundError:  # its owner was done with it in the meantime
                    continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                return False
            except OSError:  # a file system without locks: it is held by who made it, as torch's is
                if not made:
                    os.close(fd)
                    return False
            else:
                if not is_at(fd, self.lock_file_path):  # it was removed in the meantime
                    os.close(fd)
                    continue
            self._held = fd
            return True

    def wait(self) -> None:
        """Until its owner is done or gone."""
        try:
            fd = os.open(self.lock_file_path, os.O_RDONLY)
        except FileNotFoundError:
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError:
            super().wait()
        finally:
            os.close(fd)

    def release(self) -> None:
        """Remove the file, for those who only look whether it is there, and then let go of it."""
        if self._held is None:
            super().release()
            return
        os.remove(self.lock_file_path)
        os.close(self._held)
        self._held = None
