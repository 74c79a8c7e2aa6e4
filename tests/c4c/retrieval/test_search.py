"""A search finds what looking at everything finds, for every kind of head, filter and example."""

import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from c4c.retrieval.encoder import Encoder
from c4c.retrieval.index.filters import Choice
from c4c.retrieval.index.names import hint
from c4c.retrieval.search.searcher import Searcher
from pipelines.example_clips import clip_of_file, clip_of_picture, clip_of_video
from tests import tiny_backbones
from tests.c4c.retrieval.encoders import FRAMES, SENTENCES, encoder, write
from tests.c4c.retrieval.searched import VIDEOS, best_of_each, everything, make, video_of

pytestmark = pytest.mark.slow  # imports open_clip


class Index:
    """An index, the model that made it, and a searcher."""

    def __init__(self, folder: Path, head: str):
        self.checkpoint = folder / f"{head}.safetensors"
        self.encoder = encoder(self.checkpoint, head)
        self.store = make(folder / f"{head}.index", self.encoder)
        self.searcher = Searcher.open(self.store.uri)


@pytest.fixture(scope="module", params=["meanP", "wti", "tightTransf", "TransformerAdapter"])
def each(request, tmp_path_factory) -> Index:
    return Index(tmp_path_factory.mktemp("index"), request.param)


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Index:
    return Index(tmp_path_factory.mktemp("index"), "meanP")


def test_the_best_segment_of_each_video(each):
    for sentence, results in zip(SENTENCES, each.searcher.search(SENTENCES, k=5), strict=True):
        scores = everything(each.store, each.encoder, sentence)
        assert [result.id for result in results] == best_of_each(scores)[:5]
        assert [result.score for result in results] == pytest.approx(
            [scores[result.id] for result in results], abs=1e-5
        )
        for result in results:
            own = each.store.segment(result.id)
            assert (
                own is not None and result.path == f"/videos/{result.video}" and result.duration == VIDEOS[result.video]
            )
            assert (result.start, result.end) == (own.start, own.end)
    assert len(each.searcher.search(["x"], k=100)[0]) == len(VIDEOS)


def test_one_query_and_many_give_the_same(each):
    many = each.searcher.search([*SENTENCES, *map(str, range(20))], k=4)
    assert [each.searcher.search([sentence], k=4)[0] for sentence in SENTENCES] == many[: len(SENTENCES)]


def test_several_segments_of_a_video_do_not_overlap(each):
    results = each.searcher.search(["a red disc"], k=1000, per_video=False)[0]
    scores = everything(each.store, each.encoder, "a red disc")
    kept: list = []
    for id in scores:  # the best first, without what overlaps a better one
        own = each.store.segment(id)
        if not any(own.video == other.video and own.start < other.end and other.start < own.end for other in kept):
            kept.append(own)
    assert [result.id for result in results] == [one.id for one in kept]
    assert len({result.video for result in results}) < len(results) < len(scores)


def test_as_many_results_as_there_are(index, monkeypatch):
    """One long video may have all of the best segments: the search goes on."""
    asked = []
    search = index.searcher.store.search

    def counting(vectors, k, **how):
        asked.append(k)
        return search(vectors, k, **how)

    monkeypatch.setattr(index.searcher.store, "search", counting)
    sentence = "a red disc"
    best = best_of_each(everything(index.store, index.encoder, sentence))
    for k in range(1, len(VIDEOS) + 2):
        assert [result.id for result in index.searcher.search([sentence], k=k)[0]] == best[:k]
    assert max(asked) > 4 * len(VIDEOS), "more than the first look was needed"


def test_few_candidates_of_a_late_head(tmp_path):
    late = Index(tmp_path, "wti")
    exact = late.searcher.search(["a red disc"], k=7)[0]
    rough = late.searcher.search(["a red disc"], k=2, candidates=8)[0]
    assert len(rough) == 2 and {result.id for result in exact}.issuperset(
        {result.video and result.id for result in rough} & {r.id for r in exact}
    )
    scores = everything(late.store, late.encoder, "a red disc")
    assert all(result.score == pytest.approx(scores[result.id], abs=1e-5) for result in rough)
    assert [r.score for r in rough] == sorted((r.score for r in rough), reverse=True)


def test_filters(each):
    scores = best_of_each(everything(each.store, each.encoder, "x"))

    def videos(**how) -> list[str]:
        return [result.video for result in each.searcher.search(["x"], k=50, **how)[0]]

    def expected(keep) -> list[str]:
        return [video_of(id) for id in scores if keep(video_of(id))]

    assert videos(path="cooking/*") == expected(lambda video: video.startswith("cooking/"))
    assert videos(path="cooking/*.mp4", max_duration=20) == expected(
        lambda v: v.startswith("cooking/") and VIDEOS[v] <= 20
    )
    assert videos(path="*'s [[]hot] 100%_.mp4") == ["cooking/it's [hot] 100%_.mp4"]
    assert videos(path="dogs") == expected(lambda video: video.startswith("dogs/"))
    assert videos(min_duration=12, max_duration=28) == expected(lambda video: 12 <= VIDEOS[video] <= 28)
    assert videos(path="none/*") == [] and videos(path="' OR 1=1 --") == []
    assert videos(path="Ünï/?.mp4") == ["Ünï/ü.mp4"]


def test_names_that_are_not_there_have_a_hint(index):
    for path, meant in (
        ("soup", "did you mean '*soup*'?"), ("./cooking/soup.mp4", "did you mean 'cooking/soup.mp4'?"),
        ("/home/me/videos/dogs/run.mp4", "did you mean 'dogs/run.mp4'?"), ("videos/dogs/", "did you mean 'dogs'?"),
        ("./dogs/*.mp4", "did you mean 'dogs/*.mp4'?"), ("/data/set::dogs%2Frun%2Emp4", "did you mean 'dogs/run.mp4'?"),
        ("DOGS/Run.mp4", "did you mean 'dogs/run.mp4'?"), ("elsewhere/soup", "did you mean '*soup*'?"),
        ("cats", "names are like '"), ("/", "names are like '"), ("it's", "did you mean \"*it's*\"?"),
    ):  # fmt: skip
        note = hint(index.store, Choice(path=path))
        assert note.startswith(f"no name in the index matches {path!r}; {meant}"), (path, note)
    for path in ("dogs", "cooking/*", "long.mp4", None):
        assert hint(index.store, Choice(path=path)) == ""


def test_similar(each):
    hit = each.store.segments_of("long.mp4")[3]
    results = each.searcher.similar(hit.id, k=20)
    vectors = each.store.vectors_of([h.id for v in each.store.videos() for h in each.store.segments_of(v)])
    scores = {id: float(vector @ vectors[hit.id]) for id, vector in vectors.items() if video_of(id) != "long.mp4"}
    scores = dict(sorted(scores.items(), key=lambda pair: (-pair[1], pair[0])))
    assert [result.id for result in results] == best_of_each(scores)
    own = each.searcher.similar(hit.id, k=2000, per_video=False, path="long.mp4")
    assert own and all(result.end <= hit.start or result.start >= hit.end for result in own)
    with pytest.raises(ValueError, match="has no segment none"):
        each.searcher.similar("none")


# ---- examples ----


def draw(path: Path, frames: int = 24, size: tuple[int, int] = (64, 48)) -> Path:
    """A video of ten frames a second."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for i in range(frames):
            picture = np.full((size[1], size[0], 3), (i * 10 % 256, 200 - i * 5, 60), np.uint8)
            picture[:, : size[0] * i // frames] = (250, 240, 0)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode(None))
    return path


def test_a_clip_as_an_example(each, tmp_path):
    clip = draw(tmp_path / "clip.mp4")
    pixels, mask = clip_of_video(clip, each.encoder.data)
    assert (
        pixels.shape == (FRAMES, *(tiny_backbones.SIZE,) * 2, 3)
        and mask.any()
        and len({p.tobytes() for p in pixels[mask]}) == mask.sum()
    )
    videos = each.encoder.videos(each.encoder.clips(pixels[None], mask[None]), mask[None])
    vector = each.encoder.video_vectors(videos)[0].numpy()
    results = each.searcher.by_video(clip, k=3)
    assert results == [type(results[0])(**vars(hit)) for hit in best_hits(each, vector)][:3]
    assert each.searcher.by_video(clip, k=3, path="dogs/*") == [
        r for r in each.searcher.by_video(clip, k=9) if r.video.startswith("dogs/")
    ]
    np.savez(tmp_path / "clip.npz", pixels=pixels, mask=mask)
    assert each.searcher.by_frames(tmp_path / "clip.npz", k=3) == results
    assert each.searcher.full_encoder.identity == each.encoder.identity


def best_hits(each, vector) -> list:
    out: dict = {}
    for hit in each.store.search(vector[None], 1000)[0]:
        out.setdefault(hit.video, hit)
    return list(out.values())


def test_a_picture_as_an_example(each, tmp_path):
    upright = Image.effect_mandelbrot((60, 40), (-2, -1, 1, 1), 50).convert("RGB")
    upright.save(tmp_path / "picture.png")
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown a quarter turned clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    pixels, mask = clip_of_picture(tmp_path / "picture.png", each.encoder.data)
    assert mask.tolist() == [True, False, False, False] and pixels[0].std() > 5 and not pixels[1:].any()
    assert np.array_equal(clip_of_file(tmp_path / "turned.png", each.encoder.data)[0], pixels)
    results = each.searcher.by_image(tmp_path / "picture.png", k=4)
    assert len(results) == 4 and results == each.searcher.by_image(tmp_path / "turned.png", k=4)
    assert [result.score for result in results] == sorted((result.score for result in results), reverse=True)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "I;16"])
def test_pictures_of_every_mode(mode, index, tmp_path):
    name = tmp_path / ("picture.tif" if mode in ("CMYK", "I;16") else "picture.png")
    picture = Image.new("RGB", (50, 40), (255, 255, 255))
    if mode == "I;16":
        Image.fromarray(np.full((40, 50), 65535, np.uint16)).save(name)
    else:
        picture.convert(mode).save(name)
    pixels, mask = clip_of_picture(name, index.encoder.data)
    assert mask.sum() == 1 and pixels[0].min() >= 254


def test_transparent_pictures_are_shown_on_white(index, tmp_path):
    Image.new("RGBA", (40, 40), (10, 10, 10, 0)).save(tmp_path / "clear.png")
    assert clip_of_picture(tmp_path / "clear.png", index.encoder.data)[0][0].min() == 255


def test_what_is_neither_video_nor_picture(index, tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty.jpg").touch()
    picture = tmp_path / "half.png"
    Image.effect_mandelbrot((200, 200), (-2, -1, 1, 1), 50).save(picture)
    picture.write_bytes(picture.read_bytes()[:2000])
    for name, search in (("text.mp4", index.searcher.by_video), ("text.mp4", index.searcher.by_image),
                         ("empty.jpg", index.searcher.by_image), ("half.png", index.searcher.by_image)):  # fmt: skip
        with pytest.raises(ValueError, match=r"no (video|picture) that can be read") as refused:
            search(tmp_path / name)
        assert name in str(refused.value) and "\n" not in str(refused.value)
    for search in (index.searcher.by_video, index.searcher.by_image):
        with pytest.raises(ValueError, match=r"none.mp4 is no .* (missing|No such file)"):
            search(tmp_path / "none.mp4")
    with pytest.raises(ValueError, match="is no video"):
        clip_of_file(tmp_path / "text.mp4", index.encoder.data)


# ---- which model ----


def test_a_search_of_sentences_needs_no_checkpoint_and_an_example_does(tmp_path):
    made = Index(tmp_path, "meanP")
    moved = tmp_path / "elsewhere" / "model.safetensors"
    moved.parent.mkdir()
    shutil.move(made.checkpoint, moved)
    clip = draw(tmp_path / "clip.mp4")
    searcher = Searcher.open(made.store.uri)
    assert searcher.search(["x"], k=1)[0]
    with pytest.raises(ValueError, match=r"needs the checkpoint that made the index.*--ckpt") as refused:
        searcher.by_video(clip)
    assert str(made.checkpoint) in str(refused.value)
    found = Searcher.open(made.store.uri, checkpoint=str(moved)).by_video(clip, k=2)
    assert len(found) == 2
    other = write(tmp_path / "other.safetensors", seed=5)
    with pytest.raises(ValueError, match=r"is not the model that made .*--ckpt"):
        Searcher.open(made.store.uri, checkpoint=str(other)).by_video(clip)


def test_settings_of_the_index_count(tmp_path):
    """The index was made with other settings than the checkpoint's own: an example is made as its segments were."""
    path = write(tmp_path / "model.safetensors")
    changed = Encoder.load(str(path), device="cpu", overrides=["data.interpolation=bilinear"])
    store = make(tmp_path / "my.index", changed, {"a.mp4": 8.0})
    searcher = Searcher.open(store.uri)
    assert searcher.by_video(draw(tmp_path / "clip.mp4"), k=1)[0].video == "a.mp4"
    assert (
        searcher.full_encoder.data.interpolation == "bilinear"
        and searcher.example_settings["interpolation"] == "bilinear"
    )


def test_a_text_tower_of_another_model_is_refused(tmp_path):
    made = Index(tmp_path, "meanP")
    other = encoder(write(tmp_path / "other.safetensors", seed=3))
    shutil.rmtree(Path(made.store.uri) / "text")
    other.save(Path(made.store.uri) / "text")
    with pytest.raises(ValueError, match="of another model than its vectors"):
        Searcher.open(made.store.uri).search(["x"])


# ---- queries ----


def test_queries_that_cannot_be(index):
    for sentence in ("", "   ", "\x00", "\t\n"):
        with pytest.raises(ValueError, match="is empty"):
            index.searcher.search(["fine", sentence])
    for k in (0, -1, 2.5, float("nan"), "3", None):
        with pytest.raises(ValueError, match=f"k={k}: must be a whole number, and at least 1"):
            index.searcher.search(["x"], k=k)
    with pytest.raises(ValueError, match="min_duration=-1"):
        index.searcher.search(["x"], min_duration=-1)
    with pytest.raises(TypeError):
        index.searcher.similar("x", colour="red")


def test_odd_queries(index):
    long = "a dog " * 1700
    for sentence in (
        long,
        "x" * 10_000,
        "🐕",
        "<|endoftext|>",
        "&lt;b&gt;",
        "a\x00b",
        "'; DROP TABLE segments; --",
        "\ud800 a dog",
    ):
        assert len(index.searcher.search([sentence], k=3)[0]) == 3
    assert "does not count" in index.searcher.note(long)
    assert "Cyrillic" in index.searcher.note("собака") and index.searcher.note("a dog") == ""
    assert index.searcher.search([]) == []


def test_an_empty_index(tmp_path):
    store = make(tmp_path / "empty.index", encoder(tmp_path / "model.safetensors"), {})
    searcher = Searcher.open(store.uri)
    assert searcher.search(["x", "y"]) == [[], []]
    assert searcher.search(["x"], path="a/*", min_duration=3) == [[]]
    assert searcher.ignored(Choice(path="a/*")) == ["no name in the index matches 'a/*'"]


def test_thumbnails(index):
    result = index.searcher.search(["x"], k=1)[0][0]
    assert index.searcher.thumbnail(result.id)[:2] == b"\xff\xd8"
    with pytest.raises(ValueError, match="no segment"):
        index.searcher.thumbnail("none")


def test_threads_share_a_searcher(index):
    from concurrent.futures import ThreadPoolExecutor

    searcher = Searcher.open(index.store.uri)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: searcher.search(["a red disc"], k=3), range(8)))
    assert all(one == found[0] for one in found)
    assert not torch.is_grad_enabled() or found


def test_more_than_there_are(index):
    for how in ({}, {"per_video": False}, {"path": "dogs/*"}):
        assert index.searcher.search(["x"], k=10**12, **how) == index.searcher.search(["x"], k=1000, **how)
