"""Compiling DeepSpeed's optimizer: where, with what, and what a killed run leaves behind."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import file_baton

from c4c.zero import compiling, patches

patches.quiet_libraries()
from deepspeed.ops.op_builder.fused_adam import FusedAdamBuilder  # noqa: E402  of GPUs

pytestmark = pytest.mark.slow  # imports DeepSpeed

PLAIN = file_baton.FileBaton if file_baton.FileBaton is not compiling.Baton else compiling.Baton.__base__
HOLDS = """
import sys
sys.path.insert(0, sys.argv[1])
from c4c.zero.compiling import Baton
assert Baton(sys.argv[2]).try_acquire()
print("has it", flush=True)
sys.stdin.read()
"""


def test_compiled_optimizers_are_shared_by_all_environments(monkeypatch, tmp_path):
    from torch.utils import cpp_extension

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")  # so that what is set below is taken back
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    assert not Path(cpp_extension.get_default_build_root()).is_relative_to(sys.prefix)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    compiling.choose_folder()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == f"{tmp_path}/torch_extensions"
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # whose optimizer has the same name
    for _ in range(2):  # a process hands its choice on to those that it starts
        compiling.choose_folder()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == f"{tmp_path}/torch_extensions/cpu"


@pytest.mark.parametrize("home", ["writable", "read-only"])
def test_an_environment_that_is_read_only_compiles_elsewhere(home, monkeypatch, tmp_path):
    own, temporary = tmp_path / "venv", tmp_path / "tmp"
    for folder in (own, temporary):
        folder.mkdir()
    read_only = [own] + ([tmp_path / "home"] if home == "read-only" else [])
    (tmp_path / "home").mkdir()
    monkeypatch.setattr(
        os, "access", lambda path, _: not any(Path(path).is_relative_to(folder) for folder in read_only)
    )
    monkeypatch.setattr(sys, "prefix", str(own))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / "cache"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    compiling.choose_folder()
    if home == "writable":  # torch's own choice
        assert "TORCH_EXTENSIONS_DIR" not in os.environ
        return
    chosen = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    assert chosen.parents[1] == temporary and chosen.name == "cpu"
    assert chosen.parent.stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setattr(os, "getuid", lambda: chosen.parent.stat().st_uid + 1)
    (temporary / f"c4c-torch-extensions-{os.getuid()}").mkdir()  # which another user, the one of before, made
    compiling.choose_folder()
    assert Path(os.environ["TORCH_EXTENSIONS_DIR"]).parent.name.startswith(f"c4c-torch-extensions-{os.getuid()}-")


def test_a_user_without_a_home_compiles_in_the_temporary_folder(monkeypatch, tmp_path):
    def nobody(uid):
        raise KeyError(uid)

    monkeypatch.chdir(tmp_path)  # where torch would make a folder called ~
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("HOME", "XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    compiling.choose_folder()
    assert Path(os.environ["TORCH_EXTENSIONS_DIR"]).parents[1] == tmp_path


def test_ninja_is_looked_for_on_path_alone(monkeypatch):
    from torch.utils import cpp_extension

    monkeypatch.setenv("PATH", "/nowhere")
    assert not cpp_extension.is_ninja_available()
    compiling.prepare()
    assert cpp_extension.is_ninja_available()


@pytest.fixture
def owner(tmp_path):
    """A lock and the process that has it."""
    lock = tmp_path / "lock"
    words = [sys.executable, "-c", HOLDS, str(Path(__file__).parents[3]), str(lock)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "has it\n"
        yield lock, process
        process.kill()


def test_a_lock_ends_with_its_owner(owner):
    lock, process = owner
    assert not PLAIN(str(lock)).try_acquire() and not compiling.Baton(str(lock)).try_acquire()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert lock.exists(), "torch's own lock would wait for this file to go"
    assert not PLAIN(str(lock)).try_acquire()
    compiling.Baton(str(lock)).wait()
    mine = compiling.Baton(str(lock))
    assert mine.try_acquire() and not compiling.Baton(str(lock)).try_acquire()
    mine.release()
    assert not lock.exists()
    compiling.Baton(str(lock)).wait()
    again = compiling.Baton(str(lock))
    assert again.try_acquire()
    again.release()


def test_a_file_system_without_locks_has_torchs_lock(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    lock = tmp_path / "lock"
    first, second = (compiling.Baton(str(lock)) for _ in range(2))
    assert first.try_acquire() and not second.try_acquire()
    first.release()
    second.wait()
    assert second.try_acquire()
    second.release()
    assert not lock.exists()


def test_what_the_processor_can_do_is_known_without_a_process(monkeypatch):
    import cpuinfo

    # by the package, or already by what is put in its place
    builder, asked = FusedAdamBuilder(), cpuinfo.get_cpu_info()
    expected = [builder.cpu_arch(), builder.simd_width()]
    monkeypatch.setattr(cpuinfo, "get_cpu_info", lambda: asked)
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.setattr(subprocess, "Popen", None)
    compiling.prepare()
    known = cpuinfo.get_cpu_info()
    if compiling.processor():
        assert known is not asked and known["arch"] == "X86_64" and {"sse2", "fpu"} <= set(known["flags"])
    assert [builder.cpu_arch(), builder.simd_width()] == expected


def test_compiling_takes_that_lock(tmp_path, monkeypatch):
    from torch.utils import cpp_extension

    monkeypatch.setattr(cpp_extension, "FileBaton", PLAIN)
    monkeypatch.setattr(file_baton, "FileBaton", PLAIN)
    monkeypatch.setenv("PATH", os.environ["PATH"])
    compiling.prepare()
    assert cpp_extension.FileBaton is file_baton.FileBaton is compiling.Baton


@pytest.mark.parametrize(
    "named, plain",
    [("9.0a", "9.0"), ("8.0 9.0a 10.0f+PTX", "8.0;9.0;10.0+PTX"), ("8.6;12.0a", "8.6;12.0"), ("9.0", "9.0")],
)
def test_architectures_with_letters(named, plain, monkeypatch):
    builder = FusedAdamBuilder()
    builder.jit_mode = True
    monkeypatch.setenv(compiling.ARCHITECTURES, named)
    if any(letter in named for letter in "af"):
        with pytest.raises(ValueError, match="invalid literal"):
            builder.compute_capability_args()
    monkeypatch.setenv("PATH", os.environ["PATH"])
    compiling.prepare()
    assert os.environ[compiling.ARCHITECTURES] == plain
    builder.compute_capability_args()
    assert os.environ[compiling.ARCHITECTURES].startswith(plain.partition(";")[0])
