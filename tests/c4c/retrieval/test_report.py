"""The report without a browser: its numbers are the evaluation's, hostile captions stay text, and it needs nothing but itself."""

import base64
import hashlib
import io
import json
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from c4c.retrieval import published
from c4c.retrieval.metrics import ranks, report, summarize
from c4c.retrieval.report import gallery as galleries
from c4c.retrieval.report import near, summary, write_report
from c4c.retrieval.report.learning import learning
from c4c.retrieval.report.thumbnails import strip
from pipelines.eval_loader import EvalLoader
from shards.split import Split
from tests.c4c.retrieval import reports

pytestmark = pytest.mark.slow  # imports DALI


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    reports.make_split(folder)
    return Split(folder / "test")


@pytest.fixture
def write_page(split, tmp_path):
    """write_page(run, changes of the evaluation, options) -> (the page's text, its data)."""

    def write(run=None, changes=(), **options):
        path = tmp_path / "report.html"
        write_report(path, reports.evaluation(split, **dict(changes)), run, "runs/x/checkpoints/step000020", **options)
        text = path.read_text()
        return text, json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])

    return write


class Texts(HTMLParser):
    """The text of every cell of the tables, row by row, and all tags."""

    def __init__(self, page: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: list[tuple[str, dict]] = []
        self._in_cell = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self._in_cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        if tag in ("th", "td"):
            self._in_cell = False

    def handle_data(self, data):
        if self._in_cell:
            self.rows[-1][-1] += data

    def row(self, head: str) -> list[str]:
        return next(row[1:] for row in self.rows if row and row[0].strip().startswith(head))


def figures(metrics: dict) -> list[str]:
    return [f"{metrics[way][key]:.1f}" for way in ("t2v", "v2t") for key in ("R1", "R5", "R10", "MdR", "MnR")]


def test_numbers_are_those_of_the_evaluation(write_page, split):
    worse = {
        "t2v": dict.fromkeys(("R1", "R5", "R10", "MdR", "MnR"), 3.0),
        "v2t": dict.fromkeys(("R1", "R5", "R10", "MdR", "MnR"), 4.0),
    }
    rows = {
        "DSL": worse | {"sees_all_test_queries": True},
        "QB-Norm": {"t2v": worse["t2v"], "sees_all_test_queries": False, "bank_texts": 500},
    }
    page, data = write_page(changes={"rows": rows})
    texts, metrics = Texts(page), reports.evaluation(split).metrics
    assert texts.row("This checkpoint") == figures(metrics)
    assert texts.row("DSL") == figures(worse)
    assert texts.row("QB-Norm") == [*figures(worse)[:5], *["–"] * 5]
    assert "sees all test queries" in next(row[0] for row in texts.rows if row and row[0].startswith("DSL"))
    assert "a bank of 500 texts of training" in next(
        row[0] for row in texts.rows if row and row[0].startswith("QB-Norm")
    )
    recall = {row[0]: row[1:] for row in texts.rows if len(row) == 3}
    for k in (1, 5, 10):
        assert recall[str(k)] == [f"{metrics[way][f'R{k}']:.1f}" for way in ("t2v", "v2t")]
    for way in ("t2v", "v2t"):
        assert [q["rank"] for q in data[way]] == sorted((q["rank"] for q in data[way]), reverse=True)
    by_text = reports.evaluation(split).by_text
    assert {q["text"]: q["rank"] - 1 for q in data["t2v"]} == dict(enumerate(by_text.tolist()))


def test_what_queries_found(write_page, split):
    _, data = write_page()
    made = reports.evaluation(split)
    similarity = reports.score(made.text_features, made.video_features)
    for query in data["t2v"]:
        row = similarity[query["text"]]
        assert [v for v, _ in query["found"]] == row.argsort(descending=True)[:5].tolist()
        assert query["score"] == pytest.approx(float(row[query["video"]]), rel=1e-4)
    for query in data["v2t"]:
        column = similarity[:, query["video"]]
        assert [t for t, *_ in query["found"]] == column.argsort(descending=True)[:5].tolist()
        assert [own for *_, own in query["found"]] == [t == query["video"] for t, *_ in query["found"]]
        assert query["best"] == [query["video"], pytest.approx(float(column[query["video"]]), rel=1e-4)]


def test_hostile_text_stays_text(write_page):
    page, data = write_page(title=reports.HOSTILE)
    assert data["texts"]["1"] == reports.HOSTILE
    tags = Texts(page).tags
    assert not [tag for tag, attrs in tags if tag == "img" or any(name.startswith("on") for name in attrs)]
    assert sum(tag == "script" for tag, _ in tags) == 2
    assert unescape(re.search("<title>(.*?)</title>", page)[1]) == reports.HOSTILE
    assert "<script>alert" not in page and "<!--" not in page


def test_it_needs_nothing_but_itself(write_page, tmp_path):
    page, _ = write_page(reports.make_run(tmp_path / "run"))
    addresses = [
        value
        for _, attrs in Texts(page).tags
        for name, value in attrs.items()
        if name in ("src", "href", "srcset", "action", "data")
    ]
    assert addresses and all(value.startswith(("#", "data:")) for value in addresses)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)  # which is a name, not an address
    assert not re.search(r"@import|url\(|fetch\(|XMLHttp|innerHTML|eval\(", page)
    policy = re.search('Content-Security-Policy" content="(.*?)"', page)[1]
    policy = unescape(policy)
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy
    style, script = (
        re.search("<style>(.*?)</style>", page, re.S)[1],
        re.findall("<script>(.*?)</script>", page, re.S)[-1],
    )
    for text in (style, script):
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy


def test_pictures_are_the_frames_that_the_model_saw(write_page, split):
    _, data = write_page()
    made = reports.evaluation(split)
    for index in range(len(split)):
        video = data["videos"][str(index)]
        strip = Image.open(io.BytesIO(base64.b64decode(video["strip"].partition(",")[2])))
        assert strip.size == (video["n"] * reports.SIDE, reports.SIDE)
        assert video["n"] == video["seen"] == min(made.data.num_frames, 1 + index % 4)  # a frame a second
        assert np.abs(np.median(np.asarray(strip), axis=(0, 1)) - reports.colour(index)).max() < 12
    assert data["videos"]["3"]["key"] == "video3"


def test_of_many_frames_eight_are_kept(write_page, split):
    _, data = write_page(changes={"data": replace(reports.evaluation(split).data, num_frames=12, fps=6)})
    assert [(v["n"], v["seen"]) for _, v in sorted(data["videos"].items(), key=lambda item: int(item[0]))] == [
        (6, 6),
        (8, 12),
        (8, 12),
        (8, 12),
    ] * 3


@pytest.mark.parametrize(
    ("views", "words"),
    [((2, 1), "2 clips, which"), ((1, 3), "1 clip with 3 crops, which"), ((2, 3), "2 clips with 3 crops each, which")],
)
def test_several_views_of_a_video(write_page, views, words):
    page, data = write_page(views=views)
    assert "3 frames a clip (uniform)" in page and f"Each video is encoded as {words} are averaged." in page
    assert data["clips"] == views[0]


@pytest.mark.parametrize("clips", [1, 2])
def test_pictures_are_those_that_the_loader_gives(write_page, split, clips):
    _, data = write_page(views=(clips, 1))
    with EvalLoader(split, reports.evaluation(split).data, raw=True, clip=(0, clips)) as loader:
        for indices, frames, mask in loader:
            for index, pixels, filled in zip(indices.tolist(), frames.numpy(), mask.numpy(), strict=True):
                assert data["videos"][str(index)]["strip"] == strip(pixels[filled])


def test_size_is_bounded(write_page):
    page, data = write_page()
    without = len(page.encode()) - sum(len(video["strip"]) for video in data["videos"].values())
    size = without + 2_500
    small, data = write_page(most_bytes=size)
    assert len(small.encode()) <= size
    left = [video for video in data["videos"].values() if video["strip"] is None]
    assert 0 < len(left) < reports.VIDEOS
    assert f"{len(left)} videos of {reports.VIDEOS} have no picture here" in " ".join(small.split())
    assert data["videos"][str(data["t2v"][0]["video"])]["strip"]  # the worst come first
    with pytest.raises(ValueError, match="without any picture, and may have 1000"):
        write_page(most_bytes=1000)


def test_of_many_queries_the_worst_and_a_sample_are_shown(monkeypatch, write_page):
    monkeypatch.setattr(galleries, "ALL", 8)
    monkeypatch.setattr(galleries, "WORST", 5)
    monkeypatch.setattr(galleries, "SAMPLE", 3)
    page, data = write_page()
    assert {q["text"] for q in data["t2v"][:5]} == set(reports.WORST)
    assert len(data["t2v"]) == 8 and len({q["text"] for q in data["t2v"]}) == 8
    assert (
        "one word). This page shows 8 of the 12 queries: the 5 worst and a random sample of 3 of the others"
        in " ".join(page.split())
    )
    assert write_page()[1] == data


def test_several_captions_a_video(split, write_page):
    texts = ["a dog", "a cat", "the cats", *["a bird"] * 11]
    owner = torch.tensor([0, 1, 1, *range(1, 12)])
    text_features = torch.eye(12)[owner].roll(1, 1)  # each finds the video after its own
    by_text, by_video = ranks(text_features, torch.eye(12), owner, reports.score)
    changes = {"texts": texts, "video_of_text": owner, "text_features": text_features, "by_text": by_text, "by_video": by_video,
               "metrics": report(by_text, by_video)}  # fmt: skip
    page, data = write_page(changes=changes)
    assert "Videos have several captions" in page
    assert data["videos"]["1"]["own"] == [1, 2, 3]
    assert len(data["t2v"]) == 14 and len(data["v2t"]) == 12
    # "a bird" finds the next "a bird", which is no failure of sense; the last finds the dog
    assert [q["near"] is not None for q in sorted(data["t2v"], key=lambda q: q["text"])] == [
        False,
        False,
        False,
        *[True] * 10,
        False,
    ]


def test_scores_that_are_not_numbers(split, write_page):
    made = reports.evaluation(split)
    text_features = made.text_features.clone()
    text_features[0] = float("nan")
    by_text, by_video = ranks(text_features, made.video_features, made.video_of_text, reports.score)
    _, data = write_page(changes={"text_features": text_features, "by_text": by_text, "by_video": by_video})
    query = next(q for q in data["t2v"] if q["text"] == 0)
    assert query["rank"] == reports.VIDEOS and query["score"] is None
    assert [value for _, value in query["found"]] == [None] * 5


def test_one_step_and_one_validation(write_page, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0, "train/lr": 0.0}\n')
    (tmp_path / "eval.jsonl").write_text('{"step": 1, "val/t2v_R1": 0.0}\n')  # as runs of before wrote it
    page, _ = write_page(tmp_path)
    assert page.count('<svg class="chart"') == 4
    assert Texts(page).row("1") and learning(tmp_path, "x").t2v == [(1, 0.0)]
    assert not re.search(r"[^\w]nan[^\w]", page.partition("<script")[0].partition("<body>")[2])


def test_run_without_metrics(write_page, tmp_path):
    (tmp_path / "run").mkdir()
    for run in (None, tmp_path / "run"):
        page, _ = write_page(run)
        assert "Learning curves" not in page


def test_learning_curves(write_page, tmp_path):
    run = reports.make_run(tmp_path / "run")
    page, _ = write_page(run)
    assert "Learning curves" in page and page.count(">this checkpoint<") == 3
    curves = learning(run, "runs/x/checkpoints/step000020")
    assert curves.t2v == [(20, 20.0), (40, 40.0)] and curves.v2t == [(20, 10.0), (40, 20.0)]
    # the torn line and the one without a loss are left out
    assert len(curves.loss) == 39 and curves.loss[0] == (1, 5.0)
    assert (curves.steps, curves.marker) == (40, 20)
    assert (curves.step_s, curves.wait_s) == (pytest.approx(20), pytest.approx(4))
    assert "40 steps recorded, 20 s in all, of which 20.0 %" in " ".join(page.split())


def test_long_curves_are_averaged(tmp_path):
    rows = [{"step": i, "train/loss": float(i % 2), "train/lr": 1.0} for i in range(1, 1001)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[-1]]))
    curves = learning(tmp_path, "weights.pt")
    assert curves.steps == 1000 and curves.merged == 4 and curves.marker is None
    assert curves.loss == [(step, 0.5) for step in range(4, 1001, 4)]


def test_breakdown():
    lengths = np.array([2, 3, 4, 5, 6, 7, 8, 30])
    by_text = np.array([0, 0, 1, 9, 0, 0, 0, 7])
    bins = summary.word_bins(lengths.tolist())
    rows = summary.breakdown(bins, lengths, by_text, np.arange(8))
    assert sum(row.queries for row in rows) == 8
    assert [row.label for row in rows] == ["up to 3 words", "4–5 words", "6–7 words", "8 or more words"]
    assert [row.r1 for row in rows] == [100, 0, 100, 50] and [row.median for row in rows] == [1, 6, 1, 4.5]
    assert [row.median for row in summary.breakdown(bins, lengths, by_text, np.arange(8), True)] == [1, 2, 1, 1]
    for row in rows:
        assert row.low <= row.r1 <= row.high
    assert [b.label for b in summary.word_bins([4, 4, 4])] == ["any length"]
    assert [b.label for b in summary.duration_bins([3.0, 3.0])] == ["any duration"]
    seconds = [1.23, 4.56, 7.89, 101.0]
    of_durations = summary.breakdown(summary.duration_bins(seconds), np.array(seconds), np.zeros(4, int), np.arange(4))
    assert sum(row.queries for row in of_durations) == 4


@pytest.mark.parametrize("candidates", [1, 2, 7, 50, 1000, 4000])
def test_histogram_counts_every_query_once(candidates):
    r = np.random.default_rng(0).integers(0, candidates, 500)
    bars = summary.histogram(r, candidates)
    assert sum(n for _, n in bars) == 500
    assert bars[0] == ("1", int(np.sum(r == 0)))
    assert bars[-1][0].endswith(str(candidates))
    curve = summary.recall_curve(r, candidates)
    assert len(curve) == min(50, candidates)
    if candidates >= 10:
        assert [round(curve[k - 1], 4) for k in (1, 5, 10)] == [
            summarize(torch.from_numpy(r))[f"R{k}"] for k in (1, 5, 10)
        ]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("A man is playing the guitar.", "man playing guitar", True),
        ("a man rides a horse", "a man is riding horses", True),
        ("two people are playing chess in a park", "people playing chess in a park", True),
        ("a boy runs", "boys running", True),
        ("a ball moves from left to right", "a ball moves from right to left", False),
        ("a red ball rolls away", "a blue ball rolls away", False),
        ("a dog runs", "a dog runs fast", False),  # a word of three says much
        ("", "", False),
        ("собака бежит по парку зимой", "собака бежит по парку", True),
    ],
)
def test_nearly_equal(one, other, same):
    assert near.nearly_equal(near.normal(one), near.normal(other)) is same
    assert near.nearly_equal(near.normal(other), near.normal(one)) is same


class Listed:
    """A split of which only names and ids are known."""

    def __init__(self, name, ids):
        self.info, self.ids = {"name": name, "split": "test"}, ids

    def __len__(self):
        return len(self.ids)

    def video(self, index):
        return type("Video", (), {"id": self.ids[index]})


def test_published_rows_only_on_their_split():
    ids = [f"video{i}" for i in range(7010, 8010)]
    assert [row.name for row in published.published(Listed("msrvtt", ids), 1000)] == [
        "CLIP4Clip meanP",
        "CLIP4Clip seqTransf",
        "mmaction2, mean",
    ]
    assert published.published(Listed("msrvtt", ids), 20_000) == ()
    assert published.published(Listed("msvd", ids), 1000) == ()
    assert published.published(Listed("msrvtt", ids[1:]), 999) == ()
    assert published.published(Listed("msrvtt", ["video1", *ids[1:]]), 1000) == ()  # a training video


def test_published_rows_on_the_page(write_page, monkeypatch):
    page, _ = write_page()
    assert "Published on this split" not in page
    monkeypatch.setattr(published, "published", lambda split, n: published.MSRVTT_1K)
    page, _ = write_page()
    row = Texts(page).row("mmaction2, mean")
    assert row == ["43.1", "69.4", "78.9", "2.0", "16.8", *["–"] * 5]
    assert "What differs in the published rows" in page


def test_no_published_rows_beside_paragraphs(write_page, split, monkeypatch):
    """Many captions as one text say more than one does."""
    monkeypatch.setattr(published, "published", lambda split, n: published.MSRVTT_1K)
    data = replace(reports.evaluation(split).data, paragraph=True)
    page, _ = write_page(changes={"data": data})
    assert "mmaction2, mean" not in page


@pytest.mark.parametrize("views", [(2, 1), (1, 3)])
def test_no_published_rows_beside_several_views(write_page, views, monkeypatch):
    monkeypatch.setattr(published, "published", lambda split, n: published.MSRVTT_1K)
    page, _ = write_page(views=views)
    assert "CLIP4Clip meanP" not in page
