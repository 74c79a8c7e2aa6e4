"""A tiny packed data set and finished runs on it, made once for all tests of this folder, in whatever process."""

import fcntl
import runpy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.launch.evaluations import without_progress
from tests.launch.forks import Forks
from tests.launch.runs import ROOT, Launcher, make_splits


@pytest.fixture(scope="session")
def shared(tmp_path_factory, worker_id) -> Callable[[str, Callable[[Path], None]], Path]:
    """shared(name, make) -> a folder that make(folder) has filled: once, though tests run in several processes."""
    base = tmp_path_factory.getbasetemp()
    base = base if worker_id == "master" else base.parent

    def made(name: str, make: Callable[[Path], None]) -> Path:
        folder, done = base / name, base / f"{name}.done"
        with open(base / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                folder.mkdir()  # fails, as it should, where another process has failed to fill it
                make(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def launcher(shared) -> Launcher:
    return Launcher(shared("launch", make_splits))


@pytest.fixture(scope="session")
def forks(launcher) -> Iterator[Forks]:
    """Starts ranks without importing anything anew, for the device that all launched runs compute on."""
    forks = Forks(**launcher.env)
    yield forks
    forks.close()


@pytest.fixture(scope="session")
def runs(launcher, forks, shared) -> dict[str, Path]:
    """Finished runs of two epochs that differ in nothing but ranks and ZeRO stage."""
    ways = {"1 rank": (1, 1), "2 ranks": (2, 1), "2 ranks, ZeRO 2": (2, 2), "2 ranks, ZeRO 3": (2, 3)}
    names = {name: f"run{i}" for i, name in enumerate(ways)}

    def make(folder: Path) -> None:
        def run(name: str) -> None:
            ranks, stage = ways[name]
            words = [f"run.dir={folder / names[name]}", f"engine.zero_stage={stage}"]
            if name == "2 ranks":
                code, out, err = launcher.finish(launcher.command(ranks, *words))
            else:
                code, out, err = forks.run(["launch/train.py", *launcher.words(*words)], ranks)
            assert code == 0, out + err

        with ThreadPoolExecutor(2) as pool:  # a launch is mostly one core importing
            list(pool.map(run, ways))

    folder = shared("runs", make)
    return {name: folder / names[name] for name in ways}


@pytest.fixture(scope="session")
def engines(forks, shared, request) -> Path:
    """What tests/launch/engines.py wrote: 2.json, 1.json, 4.json, one for each number of ranks."""
    nightly = any(i.get_closest_marker("nightly") for i in request.session.items if "engines" in i.fixturenames)

    def make(folder: Path) -> None:
        for ranks in (2, 1, 4):  # the later ones go on from checkpoints of the earlier
            words = ["tests/launch/engines.py", str(folder), *(["--whole"] if nightly else [])]
            code, out, err = forks.run(words, ranks)
            assert code == 0, out[-3000:] + err[-3000:]

    return shared("engines", make)


@pytest.fixture
def evaluate(launcher, monkeypatch, capsys):
    """Runs the script in this process, which has imported everything, on the device of the runs; an option among the words
    goes before. Returns (exit code, stdout, stderr)."""

    def evaluate(*words) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["launch/eval.py", "--device", launcher.device, *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "launch" / "eval.py"), run_name="__main__")
        out, err = capsys.readouterr()
        return ended.value.code, out, without_progress(err)

    return evaluate


@pytest.fixture(scope="module")
def model():
    """A small one, of seeded random weights."""
    import torch

    from c4c.models.clip4clip import CLIP4Clip

    torch.manual_seed(1)
    vision = {"image_size": 64, "patch_size": 16, "width": 64, "layers": 2, "head_width": 64}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
    spec = {"embed_dim": 64, "quick_gelu": False, "vision_cfg": vision, "text_cfg": text}
    return CLIP4Clip(spec, segments=5).eval()
