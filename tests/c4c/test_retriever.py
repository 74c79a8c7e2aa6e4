"""c4c.Retriever: the example in its docstring runs, its vectors are those of the index, and two models are not mixed."""

import doctest
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import c4c
from c4c import retriever as module
from tests.c4c.retrieval.encoders import encoder, pixels, write
from tests.c4c.retrieval.searched import make, row
from tests.c4c.retrieval.test_encoder import as_run
from tests.c4c.retrieval.test_search import draw

pytestmark = pytest.mark.slow  # imports open_clip


@pytest.fixture(scope="module", params=["meanP", "wti"])
def folder(request, tmp_path_factory):
    """A folder with runs/x, my.index and clip.mp4, as the docstring has them."""
    folder = tmp_path_factory.mktemp("retriever")
    path = write(folder / "model.safetensors", request.param)
    as_run(path, folder / "runs" / "x")
    make(folder / "my.index", c4c_encoder(folder))
    draw(folder / "clip.mp4")
    return folder


def c4c_encoder(folder):
    from c4c.retrieval.encoder import Encoder

    return Encoder.load(str(folder / "runs" / "x"), device="cpu")


def test_the_docstrings_example(tmp_path, monkeypatch):
    """Its index holds what the sentence says: the random model's vector of it."""
    monkeypatch.chdir(tmp_path)
    as_run(write(tmp_path / "model.safetensors"), tmp_path / "runs" / "x")
    model = c4c_encoder(tmp_path)
    store = make(tmp_path / "my.index", model, {"cooking/soup.mp4": 8.0})
    frisbee = row(model, "dogs/frisbee.mp4", 28.0, 1)
    frisbee.vectors[1] = model.vectors(model.texts(["a dog catches a frisbee"]))[0]
    store.append([frisbee])
    draw(tmp_path / "clip.mp4")
    found = doctest.DocTestFinder().find(module.Retriever, globs={})
    runner = doctest.DocTestRunner()
    tried = sum(runner.run(test).attempted for test in found)
    assert (runner.summarize().failed, tried) == (0, 9)


def test_vectors_are_the_indexs(folder, monkeypatch):
    retriever = c4c.Retriever.load(folder / "runs" / "x", index=folder / "my.index", device="cpu")
    texts = retriever.embed_text(["a red disc", "two dogs"])
    assert (
        texts.dtype == np.float32
        and texts.shape == (2, retriever.width)
        and np.allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-5)
    )
    assert np.array_equal(retriever.embed_text("two dogs"), texts[1])
    video = retriever.embed_video(folder / "clip.mp4")
    assert (
        video.dtype == np.float32
        and video.shape == (retriever.width,)
        and np.linalg.norm(video) == pytest.approx(1, abs=1e-5)
    )
    found = retriever.search_like(folder / "clip.mp4", k=3)
    vector = retriever.searcher.store.vectors_of([found[0].id])[found[0].id]
    assert found[0].score == pytest.approx(float(vector @ video), abs=1e-5)
    one, many = retriever.search("a red disc", k=3), retriever.search(["a red disc", "x"], k=3, path="dogs/*")
    assert len(one) == 3 and len(many) == 2 and {result.video.split("/")[0] for result in many[0]} == {"dogs"}


def test_another_run_is_not_taken_for_the_one_that_made_the_index(folder, tmp_path):
    """Also where it has no checkpoint of the same name, and no file is at fault."""
    as_run(write(tmp_path / "other.safetensors", seed=1), tmp_path / "t1")
    with pytest.raises(
        ValueError, match=r"t1 is not the model that made .*my\.index \(.*checkpoint=\), or index again"
    ):
        c4c.Retriever.load(tmp_path / "t1", index=folder / "my.index", device="cpu")
    (tmp_path / "t1" / "checkpoints" / "step00000007").rename(tmp_path / "t1" / "checkpoints" / "step00000009")
    with pytest.raises(ValueError) as caught:
        c4c.Retriever.load(tmp_path / "t1", index=folder / "my.index", device="cpu")
    assert str(caught.value).startswith(
        f"{tmp_path / 't1'} is not the model that made {folder / 'my.index'}, or not any more"
    )
    assert f"checkpoint step00000007 of {folder / 'runs' / 'x'}" in str(caught.value)


def test_scores_are_the_heads(folder):
    retriever = c4c.Retriever.load(folder / "runs" / "x", device="cpu")
    Image.fromarray(pixels(1)[0]).resize((60, 40)).save(folder / "photo.png")
    sentences = ["a red disc", "two dogs", "x"]
    scores = retriever.similarity(sentences, [folder / "clip.mp4", folder / "photo.png"])
    assert scores.shape == (3, 2) and scores.dtype == np.float32
    videos = np.stack([retriever.embed_video(folder / "clip.mp4"), retriever.embed_video(str(folder / "photo.png"))])
    cosines = retriever.embed_text(sentences) @ videos.T
    assert np.allclose(scores, cosines, atol=1e-5) == (retriever._full_encoder.identity.head == "meanP")
    alone = retriever.similarity("a red disc", folder / "clip.mp4")
    assert alone.shape == (1, 1) and alone[0, 0] == pytest.approx(float(scores[0, 0]), abs=1e-5)
    assert retriever.similarity([], [folder / "clip.mp4"]).shape == (0, 1) and retriever.similarity(
        ["x"], []
    ).shape == (1, 0)


def test_an_index_alone_searches_and_finds_its_checkpoint(folder):
    alone = c4c.Retriever.load(index=folder / "my.index", device="cpu")
    both = c4c.Retriever.load(folder / "runs" / "x", index=folder / "my.index", device="cpu")
    assert alone.search("x", k=2) == both.search("x", k=2)
    assert np.array_equal(alone.embed_text(["x"]), both.embed_text(["x"]))
    assert np.array_equal(alone.embed_video(folder / "clip.mp4"), both.embed_video(folder / "clip.mp4"))


def test_mistakes(folder, tmp_path):
    with pytest.raises(ValueError, match="needs a checkpoint, an index, or both"):
        c4c.Retriever.load()
    with pytest.raises(ValueError, match="has no index"):
        c4c.Retriever.load(folder / "runs" / "x", device="cpu").search("x")
    with pytest.raises(ValueError, match="there is no index at"):
        c4c.Retriever.load(index=tmp_path / "none")
    encoder(tmp_path / "other.safetensors")
    other = write(tmp_path / "other.safetensors", seed=9)
    with pytest.raises(ValueError, match="is not the model that made"):
        c4c.Retriever.load(other, index=folder / "my.index", device="cpu")
    os.mkfifo(tmp_path / "pipe.mp4")
    for path, what in ((tmp_path / "pipe.mp4", "a device or a pipe"), (tmp_path, "a folder")):
        with pytest.raises(ValueError, match=f"is no video or picture: it is {what}"):
            c4c.Retriever.load(folder / "runs" / "x", device="cpu").embed_video(path)
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match=r"text\.mp4 is no video"):
        c4c.Retriever.load(folder / "runs" / "x", device="cpu").embed_video(tmp_path / "text.mp4")


def test_it_is_imported_when_asked_for():
    code = "import sys, c4c; print('torch' in sys.modules, 'Retriever' in c4c.__all__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False True\n", done.stderr
    assert c4c.Retriever is module.Retriever
