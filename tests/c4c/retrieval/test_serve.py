"""The search server: its answers, and what it refuses. The model is a stand-in; the index and its videos are real."""

import io
import json
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import pytest
from PIL import Image

from c4c.retrieval.index.rows import Failure
from c4c.retrieval.index.store import About
from c4c.retrieval.serve import log
from c4c.retrieval.serve.app import PAGE
from c4c.retrieval.serve.batching import Recent
from c4c.retrieval.serve.names import from_name, to_name
from tests.c4c.retrieval import stand_in
from tests.c4c.retrieval.serving import Served, detail

pytestmark = pytest.mark.slow


# ---- searching ----


def test_a_sentence_finds_the_segments_it_names(served):
    answer = served.get("/api/search", params={"q": "  a red\twall ", "k": 3})
    found = answer.json()
    assert found["query"] == "a red wall" and found["note"] == "" and found["more"]
    assert [result["video"] for result in found["results"]][:2] in (
        ["long/all.mp4", "scenes/red.mp4"],
        ["scenes/red.mp4", "long/all.mp4"],
    )
    first = found["results"][0]
    assert first.keys() == {"id", "video_id", "video", "start", "end", "duration", "score", "thumbnail", "media"}
    assert (first["score"], found["results"][2]["score"]) == (pytest.approx(1.0), pytest.approx(0.4292, abs=1e-3))
    assert str(served.index.parent) not in answer.text  # names as the index knows them, never where they lie


def test_filters(served):
    assert {r["video"] for r in served.results("red", path="scenes/*")} == {"scenes/red.mp4", "scenes/blue.webm"}
    assert {r["video"] for r in served.results("red", min_duration=5)} == {"long/all.mp4"}
    assert "long/all.mp4" not in {r["video"] for r in served.results("red", max_duration=4)}
    assert len(served.results("red", path="long/*", per_video=False)) == 5
    assert served.results("red", path="nothing/*") == []


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        ({"q": ""}, 422, "empty"),
        ({"q": " \x00\t "}, 422, "empty"),
        ({}, 422, "q: field required"),
        ({"q": "x" * 10_001}, 422, "10001 characters"),
        ({"q": "a", "k": 0}, 422, "k: input should be greater"),
        ({"q": "a", "k": 10**6}, 422, "k: input should be less"),
        ({"q": "a", "k": "many"}, 422, "k: input should be a valid integer"),
        ({"q": "a", "min_duration": "nan"}, 422, "min_duration: "),
        ({"q": "a", "min_duration": -1}, 422, "min_duration: "),
        ({"q": "a", "min_duration": 9, "max_duration": 8}, 422, "No video lasts"),
        ({"q": "a", "path": "x" * 301}, 422, "path: "),
        ({"q": "a", "min_duraton": 5}, 422, "There is no parameter 'min_duraton'"),
    ],
)
def test_searches_that_are_refused(served, words, status, says):
    answer = served.get("/api/search", params=words)
    assert answer.status_code == status
    assert says in answer.json()["detail"]


@pytest.mark.parametrize(
    "query", ["x" * 10_000, "👍🏽 ‮ red \u200b", "' OR 1=1 --", '"red" % _ \\', "\x01red\x7f", "\ud800 red"]
)
def test_odd_sentences_are_answered(served, query):
    answer = served.get("/api/search", params={"q": query.encode("utf-8", "replace").decode()})
    assert answer.status_code == 200 and answer.json()["results"]


def test_a_note_about_the_script(served):
    assert "Latin script" in served.get("/api/search", params={"q": "一匹の犬"}).json()["note"]


def test_similar_segments(served):
    red = served.named("scenes/red.mp4")
    answer = served.get(f"/api/similar/{red['id']}", params={"k": 2}).json()
    assert answer["query"] == "scenes/red.mp4"
    assert answer["results"][0]["video"] == "long/all.mp4" and answer["results"][0]["id"] != red["id"]


def test_segments_of_a_video(served):
    video = served.named("long/all.mp4")["video_id"]
    found = served.get(f"/api/segments/{video}").json()
    assert (found["video"], found["duration"]) == ("long/all.mp4", 12.0)
    assert [(s["start"], s["end"]) for s in found["segments"]] == [(2.0 * i, 2.0 * i + 4) for i in range(5)]


def test_thumbnails_show_the_segment(served):
    for result in served.results("yellow", k=10):
        answer = served.get("/" + result["thumbnail"])
        assert answer.headers["content-type"] == "image/jpeg"
        assert np.asarray(Image.open(io.BytesIO(answer.content))).std() > 20


def test_a_video_with_an_odd_name(served):
    odd = served.named("odd/名前 ä&b#c.mp4")
    assert served.get("/" + odd["thumbnail"]).status_code == 200
    assert served.get("/" + odd["media"]).content[4:8] == b"ftyp"
    assert served.get(f"/api/segments/{odd['video_id']}").json()["video"] == odd["video"]


def test_videos_that_are_indexed_meanwhile_are_found(tmp_path):
    it = Served(stand_in.make(tmp_path, {"a.mp4": (["red"], {})}))
    with it:
        assert [r["video"] for r in it.results("green")] == ["a.mp4"]
        other = stand_in.StandIn(it.index).store  # as another process has it open
        new = stand_in.film(tmp_path / "videos" / "new.mp4", ["green"])
        other.append([stand_in.indexed(tmp_path / "videos", new, ["green"])])
        other.fail([Failure("/x.mp4", "no video", 1, 1)])
        assert [r["video"] for r in it.results("green")] == ["new.mp4", "a.mp4"]
        assert it.get("/api/info").json()["videos"] == 2


# ---- many at once ----


def test_sentences_that_come_together_go_through_the_text_tower_together(tmp_path):
    it = Served(stand_in.make(tmp_path, {"a.mp4": (["red"], {}), "b.mp4": (["blue"], {})}))
    gate = threading.Event()
    it.searcher.wait = lambda: gate.wait(30)
    sentences = [f"{colour} {i % 50}" for i in range(100) for colour in ("red", "blue")]
    with it, ThreadPoolExecutor(200) as pool:
        answers = [pool.submit(it.results, sentence) for sentence in sentences]
        threading.Timer(1.0, gate.set).start()  # by then most of them wait
        found = [answer.result() for answer in answers]
        alone = {colour: it.results(colour) for colour in ("red", "blue")}
    for sentence, results in zip(sentences, found, strict=True):
        assert results == alone[sentence.split()[0]]
    assert sorted(it.searcher.encoded) == sorted({*sentences, "red", "blue"})  # each once
    assert 1 < max(it.searcher.batches) <= 64


def test_an_error_of_the_model_is_told_without_its_words(served, capfd):
    def broken():
        raise ValueError("/secret/place is damaged")

    served.searcher.wait = broken
    try:
        answer = served.get("/api/search", params={"q": "never asked before"})
    finally:
        served.searcher.wait = None
    assert answer.status_code == 503 and "secret" not in answer.text
    assert "/secret/place is damaged" in capfd.readouterr().err
    assert served.results("never asked before")  # an error is not kept


def test_recent_values():
    kept: Recent[int, int] = Recent(2)
    kept.put(1, 1)
    kept.put(2, 2)
    assert kept.get(1) == 1
    kept.put(3, 3)
    assert (kept.get(1), kept.get(2), kept.get(3)) == (1, None, 3)


# ---- names ----

NAMES = [
    "..", "%2e%2e", "../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2fetc%2fpasswd", "/etc/passwd", "a%00b", "%00", "a b", "ä", "a=",
    "%", "%ff", "A" * 20_000, to_name("../../etc/passwd"), to_name("/etc/passwd"), to_name("scenes/red.mp4"),
    to_name("scenes/../scenes/red.mp4#000000"), to_name("scenes/red.mp4#000000\0"), to_name("scenes/red.mp4#999999"),
    to_name("' OR 1=1 OR '"), to_name("scenes/red.mp4#000000' OR '1'='1"), "file:", "-", "_", "AAAA", to_name("\ud800"),
]  # fmt: skip


@pytest.mark.parametrize("route", ["media", "thumbnail", "api/similar", "api/play"])
def test_names_of_no_segment(served, route):
    for name in NAMES:
        assert served.raw(f"/{route}/{name}") == 404, name[:80]


def test_names_of_no_video_or_page(served):
    for name in NAMES:
        if name != to_name("scenes/red.mp4"):
            assert served.raw(f"/api/segments/{name}") == 404
        for route in ("/page", "/page/..", "/static", "", "/."):
            assert served.raw(f"{route}/{name}") == 404, (route, name[:80])
    for path in (
        "/page/app.py",
        "/page/%2e%2e/app.py",
        "/page/..%2fapp.py",
        "/page//etc/passwd",
        "//etc/passwd",
        "/page/../engine.py",
    ):
        assert served.raw(path) == 404


def test_names_are_undone():
    for text in ("a", "ä/ö #000001", "x" * 500, "名前"):
        assert re.fullmatch(r"[\w-]+", to_name(text), re.ASCII) and from_name(to_name(text)) == text


# ---- pages ----


def test_pages_need_no_other_server(served):
    for path in sorted(PAGE.iterdir()):
        text = path.read_text()
        assert not re.findall(r"(?:https?:)?//[a-z][\w.-]*\.[a-z]+", text.replace("http://www.w3.org/2000/svg", "")), (
            path.name
        )
        assert "innerHTML" not in text and "eval(" not in text and not re.search(r"\son\w+=|style=", text), path.name
    for address in ("/", "/docs", "/page/app.js", "/page/style.css", "/page/icon.svg"):
        answer = served.get(address)
        assert answer.status_code == 200 and answer.content
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    for module in sorted(PAGE.glob("*.js")):
        for other in re.findall(r'from "\./([\w.]+)"', module.read_text()):
            assert served.get(f"/page/{other}").headers["content-type"].startswith("text/javascript")


def test_headers_of_every_answer(served):
    for address in ("/", "/api/search?q=a", "/api/search", "/nothing", "/healthz", "/media/x"):
        headers = served.get(address).headers
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        assert headers["x-frame-options"] == "DENY" and "server" not in headers
        assert headers["cache-control"] in ("no-store", "no-cache")


def test_openapi_describes_every_route(served):
    schema = served.get("/openapi.json").json()
    assert {
        "/api/search",
        "/api/search/example",
        "/api/similar/{id}",
        "/api/segments/{video_id}",
        "/media/{id}",
    } <= schema["paths"].keys()
    assert {"/thumbnail/{id}", "/healthz", "/readyz", "/metrics", "/api/play/{id}", "/api/info"} <= schema[
        "paths"
    ].keys()
    for methods in schema["paths"].values():
        assert all(about["description"] for about in methods.values())
    json.dumps(schema, allow_nan=False)


def test_monitors_may_ask_without_the_body(served):
    for address in ("/healthz", "/readyz", "/metrics"):
        answer, whole = served.client.head(address), served.get(address)
        assert answer.status_code == 200 and not answer.content
        assert answer.headers["content-type"] == whole.headers["content-type"]
        assert list(served.get("/openapi.json").json()["paths"][address]) == ["get"]


def test_wrong_methods(served):
    for method, address in (
        ("POST", "/api/search"),
        ("DELETE", "/api/info"),
        ("PUT", "/"),
        ("GET", "/api/search/example"),
    ):
        answer = served.client.request(method, address)
        assert answer.status_code == 405 and detail(answer)


# ---- operation ----


def test_metrics(served):
    before = served.get("/metrics").text
    served.get("/api/search", params={"q": "metric red"})
    served.get("/nothing/at/all")
    text = served.get("/metrics").text
    assert text != before
    for line in text.splitlines():
        assert re.fullmatch(r'# (HELP|TYPE) c4c_\w+ .+|c4c_\w+(\{(\w+="[^"\n]*",?)+\})? -?[\d.e+-]+', line), line
    assert re.search(r'c4c_requests_total\{method="GET",route="other",status="404"\} [1-9]', text)
    assert re.search(r'c4c_requests_total\{method="GET",route="/api/search",status="200"\} [1-9]', text)
    assert re.search(r"c4c_text_batch_size_count [1-9]", text) and "c4c_requests_in_flight 1" in text
    counts = [int(n) for n in re.findall(r'c4c_request_seconds_bucket\{route="/api/search",le="[^"]+"\} (\d+)', text)]
    assert counts == sorted(counts) and counts[-1] > 0


def test_health(tmp_path):
    it = Served(stand_in.make(tmp_path, {"a.mp4": (["red"], {})}))
    with it:
        assert it.get("/healthz").text == "ok\n" and it.get("/readyz").text == "ready\n"
        (it.index / "segments.lance").rename(tmp_path / "elsewhere")
        assert it.get("/readyz").status_code == 503 and it.get("/healthz").status_code == 200
        answer = it.get("/api/search", params={"q": "blue"})
        assert answer.status_code == 503 and str(tmp_path) not in answer.text
        (tmp_path / "elsewhere").rename(it.index / "segments.lance")
        assert it.results("blue")


def test_the_frames_of_a_clip_have_their_times(served):
    played = served.get(f"/api/play/{served.named('old/green.avi')['id']}").json()
    with av.open(io.BytesIO(served.get("/" + played["url"]).content)) as file:
        assert file.streams.video[0].codec_context.name == "h264"


def test_an_index_that_is_replaced(tmp_path, monkeypatch, capfd):
    """By one of the same model: it is searched. By another model's: scores would mean nothing, and there are none."""
    monkeypatch.setattr(log, "_told", {})
    mine = stand_in.make(tmp_path / "a", {"a.mp4": (["red"], {})})
    same = stand_in.make(tmp_path / "b", {"b.mp4": (["red"], {})})
    with monkeypatch.context() as context:
        context.setattr(stand_in, "About", lambda **words: About(**words | {"identity": {"digest": "1" * 64}}))
        other = stand_in.make(tmp_path / "c", {"c.mp4": (["red"], {})})
    with Served(mine) as served:
        for index, videos in ((None, ["a.mp4"]), (same, ["b.mp4"])):
            if index is not None:
                shutil.rmtree(mine)
                shutil.copytree(index, mine)
            assert [result["video"] for result in served.results("red")] == videos
        shutil.rmtree(mine)
        shutil.copytree(other, mine)
        assert served.get("/api/search?q=red").status_code == served.get("/readyz").status_code == 503
        assert "was replaced" in capfd.readouterr().err
        shutil.rmtree(mine)
        assert served.get("/api/search?q=red").status_code == served.get("/readyz").status_code == 503
        shutil.copytree(same, mine)
        assert [result["video"] for result in served.results("red")] == ["b.mp4"]
