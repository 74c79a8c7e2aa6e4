"""The search server on a real, tiny model: what it answers is what a Searcher finds alone."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from c4c.retrieval.search.searcher import Searcher
from tests.c4c.retrieval import encoders, searched
from tests.c4c.retrieval.serving import Served

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["meanP", "wti"])
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    encoder = encoders.encoder(folder / "model.safetensors", request.param)
    searched.make(folder / "my.index", encoder)
    it = Served(folder / "my.index", searcher=Searcher.open(folder / "my.index", device="cpu"))
    with it:
        yield it, folder


def same(rows: list[dict], results) -> None:
    assert [(row["video"], row["start"], row["end"]) for row in rows] == [(r.video, r.start, r.end) for r in results]
    assert [row["score"] for row in rows] == pytest.approx([result.score for result in results], abs=1e-6)


def test_many_sentences_at_once_find_what_each_finds_alone(case):
    it, _ = case
    sentences = [f"{sentence} {i}" for i in range(10) for sentence in encoders.SENTENCES]
    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda sentence: it.results(sentence, k=5), sentences))
    alone = Searcher.open(it.index, device="cpu").search(sentences, 5)
    for rows, results in zip(answers, alone, strict=True):
        same(rows, results)
    filtered = it.results(sentences[0], path="cooking/*", min_duration=10, per_video=False)
    same(filtered, it.searcher.search([sentences[0]], 24, path="cooking/*", min_duration=10, per_video=False)[0])


def test_a_picture_finds_what_it_finds_alone(case, tmp_path):
    it, _ = case
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)).save(path)
    answer = it.upload(path.read_bytes(), k=3)
    assert answer.status_code == 200, answer.text
    same(answer.json()["results"], it.searcher.by_image(path, 3))


def test_similar_segments_and_pictures(case):
    it, _ = case
    first = it.results("a red disc")[0]
    rows = it.get(f"/api/similar/{first['id']}", params={"k": 3}).json()["results"]
    same(rows, it.searcher.similar(f"{first['video']}#{int(first['start'] / 4):06d}", 3))
    assert Image.open(io.BytesIO(it.get("/" + first["thumbnail"]).content)).size == (64, 48)
    assert it.get("/" + first["media"]).status_code == 410  # these videos were never there


def test_notes(case):
    it, _ = case
    note = it.get("/api/search", params={"q": "собака ловит фрисби"}).json()["note"]
    assert note.startswith("The query is in Cyrillic letters") and note.endswith(".")
    assert "tokens" in it.get("/api/search", params={"q": "very " * 200 + "long"}).json()["note"]
