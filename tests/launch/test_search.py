"""launch/search.py as a user types it, on a small index."""

import json
import runpy
import subprocess
import sys

import pytest
from PIL import Image

from tests.c4c.retrieval.encoders import encoder, write
from tests.c4c.retrieval.searched import VIDEOS, best_of_each, everything, make, video_of
from tests.c4c.retrieval.test_encoder import as_run
from tests.c4c.retrieval.test_search import draw
from tests.launch.runs import ROOT, own_environment

pytestmark = pytest.mark.slow  # imports open_clip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(the index's folder, its checkpoint, what `everything` says of a sentence)"""
    folder = tmp_path_factory.mktemp("search")
    model = encoder(folder / "model.safetensors")
    store = make(folder / "my.index", model)
    return store.uri, folder / "model.safetensors", lambda sentence: everything(store, model, sentence)


@pytest.fixture
def search(monkeypatch, capsys):
    """Runs the script in this process. Returns (exit code, stdout, stderr)."""

    def search(*words) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["launch/search.py", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "launch" / "search.py"), run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    return search


def test_the_best_videos_of_each_sentence(made, search):
    index, _, scores = made
    code, out, err = search(index, "a red disc", "two dogs", "-k", 3)
    assert (code, err) == (0, "")
    blocks = out.strip().split("\n\n")
    for sentence, block in zip(("a red disc", "two dogs"), blocks, strict=True):
        assert block.splitlines()[0] == sentence
        shown = [line.split("  ")[-1] for line in block.splitlines()[1:]]
        assert shown == [video_of(id) for id in best_of_each(scores(sentence))[:3]]


def test_json_lines(made, search, tmp_path):
    index, _, scores = made
    (tmp_path / "queries.txt").write_text("a red disc\n\ntwo dogs\nсобака\n")
    code, out, err = search(index, "--queries", tmp_path / "queries.txt", "--json", "-k", 2)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [row["query"] for row in rows] == ["a red disc", "two dogs", "собака"]
    for row in rows:
        assert [found["id"] for found in row["results"]] == best_of_each(scores(row["query"]))[:2]
        assert set(row["results"][0]) == {"video", "start", "end", "score", "path", "id"}
    assert err.count("note:") == 1 and "Cyrillic" in err
    file = tmp_path / "found.jsonl"
    assert search(index, "a red disc", "-k", 2, "--json", file)[:2] == (0, "")
    assert json.loads(file.read_text()) == rows[0]
    assert search(index, "two dogs", "-k", 2, "--json", file)[0] == 0, "our own file may be replaced"
    assert json.loads(file.read_text()) == rows[1]


def test_filters_and_segments(made, search):
    index, *_ = made

    def found(*words) -> list[dict]:
        return json.loads(search(index, "x", "-k", 100, *words, "--json")[1])["results"]

    assert {r["video"] for r in found("--path", "dogs/*")} == {"dogs/run.mp4", "dogs/frisbee.mp4"}
    assert {r["video"] for r in found("--min-duration", "20", "--max-duration", "40")} == {
        v for v, s in VIDEOS.items() if 20 <= s <= 40
    }
    assert len(found()) == len(VIDEOS) < len(found("--segments"))
    code, out, err = search(index, "x", "-k", 100, "--ann", "--json")
    assert (code, json.loads(out)["results"]) == (0, found()), "without an ANN index the search is exact"
    assert err.startswith(f"note: {index} has no ANN index, so the search is exact.") and err.count("\n") == 1
    assert "no video of the index passes" in search(index, "x", "--path", "none/*")[1]


def test_examples_and_the_page(made, search, tmp_path):
    index, checkpoint, _ = made
    picture = tmp_path / "photo.png"
    Image.effect_mandelbrot((60, 40), (-2, -1, 1, 1), 50).save(picture)
    code, out, err = search(index, "--image", picture, "-k", 2, "--html", tmp_path / "found.html", "--device", "cpu")
    assert code == 0 and len(out.splitlines()) == 4 and err == f"wrote {tmp_path / 'found.html'}\n"
    assert (tmp_path / "found.html").read_text().count("<img") == 2
    assert search(index, "--image", picture, "-k", 2, "--ckpt", checkpoint, "--device", "cpu")[1] == out


def test_a_video_of_the_index_is_most_like_itself(search, tmp_path, monkeypatch):
    """By `python -m c4c.index`, from plain files: an example is made as a whole video of the index is."""
    from c4c.index import main

    videos = tmp_path / "videos"
    videos.mkdir()
    for i in range(4):
        draw(videos / f"{i}.mp4", frames=12 + 9 * i, size=(48 + 32 * i, 80 - 16 * i))
    backbone = "ViT-demo-16-small"
    as_run(write(tmp_path / "model.safetensors", "wti", backbone), tmp_path / "run", backbone)
    words = [
        "--ckpt",
        tmp_path / "run",
        "--videos",
        videos,
        "--out",
        tmp_path / "my.index",
        "--segment",
        "0",
        "--runtime",
        "torch",
    ]
    monkeypatch.setattr("sys.argv", ["c4c.index", *map(str, words), "--device", "cpu"])
    assert main() == 0
    for i in range(4):
        code, out, _ = search(tmp_path / "my.index", "--video", videos / f"{i}.mp4", "--json", "--device", "cpu")
        first, *others = json.loads(out.splitlines()[-1])["results"]
        assert code == 0 and first["video"] == f"{i}.mp4" and first["score"] == pytest.approx(1, abs=1e-5)
        assert len(others) == 3 and all(other["score"] < 0.99999 for other in others)


def test_mistakes_are_told_in_a_sentence(made, search, tmp_path):
    index, *_ = made
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    (tmp_path / "mine.txt").write_text("notes")
    for words, told in (
        ([index], "nothing to search for"),
        ([index, ""], "is empty"),
        ([index, "x", "-k", 0], "-k 0: must be at least 1"),
        ([index, "x", "--min-duration", "-3"], "min_duration=-3.0"),
        ([index, "x", "--device", "gpu"], "--device gpu: must be cpu, cuda or cuda:N"),
        ([index, "x", "--device", "cuda:99"], "--device cuda:99: this machine has"),
        (
            [index, "--image", ROOT / "docs/images/loader.png", "--device", "cuda:99"],
            "error: --device cuda:99: this machine has",
        ),
        ([index, "x", "--path", ""], "the path to filter by is empty"),
        ([index, "x", "--json", tmp_path / "mine.txt"], "would replace a file of another kind"),
        ([index, "x", "--html", tmp_path / "none" / "a.html"], "there is no folder"),
        ([index, "x", "--html", tmp_path / "a", "--json", f"{tmp_path}/./a"], "--json and --html both name"),
        ([index, "--json", "a dog"], "--json took 'a dog' for the name of its file: put --json behind the sentences"),
        ([index, "--video", text], "is no video that can be read"),
        ([index, "--video", tmp_path / "none.mp4"], "there is no such file"),
        ([index, "x", "--video", text], "search for one of them at a time"),
        ([index, "x", "--ckpt", text], "is for --video and --image: sentences need the index alone"),
        ([tmp_path / "none.index", "x"], "there is no index at"),
        ([tmp_path, "x"], "is no index"),
        ([text, "x"], "is no index"),
    ):
        code, out, err = search(*words)
        assert (code, out) == (1, "") and told in err and err.startswith("error: ") and err.count("\n") == 1, (
            words,
            err,
        )
    assert (tmp_path / "mine.txt").read_text() == "notes"


def test_what_an_index_has_no_use_for_is_told(made, search):
    index, *_ = made
    plain = search(index, "x", "-k", 2)
    code, out, err = search(index, "x", "-k", 2, "--ann", "--candidates", 7)
    assert (code, out, plain[2]) == (0, plain[1], "")
    approximate, candidates = err.splitlines()
    assert "has no ANN index, so the search is exact" in approximate
    assert candidates == "note: --candidates 7 changes nothing: this model's vectors give the final scores"


def test_words_without_quotes_and_names_that_are_none_are_told(made, search):
    index, *_ = made
    code, _, err = search(index, "a", "red", "screen", "-k", 2, "--path", "soup")
    assert code == 0 and err.splitlines() == [
        'note: each of the 3 words is searched for by itself; a sentence stands in quotes: "a red screen"',
        "note: no name in the index matches 'soup'; did you mean '*soup*'?",
    ]
    assert search(index, "a red screen", "dogs", "--path", "dogs")[2] == search(index, "dogs")[2] == ""


def test_a_search_of_sentences_imports_no_video_tower_and_no_training(made):
    """In a process of its own, without a network: what is imported, and that the checkpoint's weights are not opened."""
    index, checkpoint, _ = made
    away = checkpoint.with_suffix(".away")
    checkpoint.rename(away)
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['launch/search.py', {index!r}, 'a red disc', '--json']\n"
        "try:\n    runpy.run_path('launch/search.py', run_name='__main__')\n"
        "except SystemExit as ended:\n    print(ended.code, *sorted(sys.modules))\n"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=own_environment() | {"HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
    finally:
        away.rename(checkpoint)
    found, modules = done.stdout.splitlines()
    assert len(json.loads(found)["results"]) == len(VIDEOS) and modules.split()[0] == "0", done.stderr
    # torchvision comes with open_clip, which asks for it
    heavy = {
        "deepspeed",
        "nvidia.dali",
        "onnxruntime",
        "onnx",
        "pipelines.loader",
        "pipelines.segment_frames",
        "tensorboard",
    }
    assert not heavy & set(modules.split()[1:])
    assert done.stderr == ""


def test_mistakes_are_found_before_anything_heavy_is_imported(tmp_path):
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['launch/search.py', {str(tmp_path)!r}, '']\n"
        "try:\n    runpy.run_path('launch/search.py', run_name='__main__')\n"
        "except SystemExit as ended:\n    print(ended.code, 'torch' in sys.modules, 'lancedb' in sys.modules, 'numpy' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=own_environment(), capture_output=True, text=True)
    assert done.stdout == "1 False False False\n" and "is empty" in done.stderr
