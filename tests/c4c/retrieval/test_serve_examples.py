"""Searching by an uploaded clip or picture: what is taken, what is refused, and that no file harms the server."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from tests.c4c.retrieval import stand_in
from tests.c4c.retrieval.serving import LIMIT_MB, Served, detail

pytestmark = pytest.mark.slow


def mp4(colour: str, tmp_path: Path, **words) -> bytes:
    return stand_in.film(tmp_path / "example.mp4", [colour], **words).read_bytes()


def test_a_clip_as_example(served, tmp_path):
    answer = served.upload(mp4("blue", tmp_path), k=2)
    assert answer.status_code == 200, answer.text
    assert {r["video"] for r in answer.json()["results"]} == {"scenes/blue.webm", "long/all.mp4"}
    assert served.upload(mp4("blue", tmp_path), path="scenes/r*").json()["results"][0]["video"] == "scenes/red.mp4"


def test_a_name_that_is_none_has_a_hint(served):
    note = "No name in the index matches 'red'; did you mean '*red*'?"
    segment = served.named("scenes/red.mp4")["id"]
    for answer in (
        served.get("/api/search", params={"q": "red", "path": "red"}), served.get(f"/api/similar/{segment}", params={"path": "red"}),
        served.upload(stand_in.jpeg(stand_in.COLOURS["red"]), path="red"),
    ):  # fmt: skip
        assert (answer.json()["results"], answer.json()["note"]) == ([], note), answer.text
    assert served.get("/api/search", params={"q": "red", "path": "*red*"}).json()["note"] == ""
    assert "names are like '" in served.get("/api/search", params={"q": "red", "path": "/etc/passwd"}).json()["note"]


def test_a_picture_as_example(served):
    assert served.upload(stand_in.jpeg(stand_in.COLOURS["yellow"]), k=1).json()["results"][0]["score"] > 0.9


def test_uploads_leave_nothing_behind(served, tmp_path):
    served.upload(mp4("red", tmp_path))
    served.upload(b"no video")
    assert not [path for path in served.engine._folder.path.iterdir() if path.name.startswith("upload")]


NO_VIDEOS = {
    "text": b"I am no video.\n" * 50,
    "empty": b"",
    "zeros": bytes(5000),
    "html": b"<html><script>alert(1)</script></html>",
    "playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
    "list": b"ffconcat version 1.0\nfile /etc/passwd\n",
    "dash": b'<?xml version="1.0"?><MPD><Period><BaseURL>file:///etc/passwd</BaseURL></Period></MPD>',
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "cut mp4": b"\0\0\0\x20ftypisom" + bytes(40),
    "cut jpeg": b"\xff\xd8\xff\xe0\0\x10JFIF\0",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\nshowpage\n",
    "zip": b"PK\x03\x04" + bytes(100),
    "gzip": b"\x1f\x8b\x08" + bytes(100),
    "elf": Path("/bin/true").read_bytes()[:50_000],
}


@pytest.mark.parametrize("kind", NO_VIDEOS)
def test_what_is_no_video(served, kind):
    answer = served.upload(NO_VIDEOS[kind])
    assert answer.status_code == 415
    assert (
        "passwd" not in detail(answer)
        and "Ghostscript" not in answer.text
        and str(served.engine._folder.path) not in answer.text
    )


def test_damaged_clips_end_no_server(served, tmp_path):
    rng, data = np.random.default_rng(0), mp4("red", tmp_path)
    for _ in range(8):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 60):
            damaged[place] ^= 1 << rng.integers(8)
        assert served.upload(bytes(damaged)).status_code in (200, 415)
    assert served.upload(data).status_code == 200


def test_a_picture_that_would_fill_the_memory(served):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)  # 4.8 GB of pixels
    png = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(100_000)))
        + chunk(b"IEND", b"")
    )
    answer = served.upload(png)
    assert answer.status_code == 415 and "too many pixels" in detail(answer)


def test_a_decoder_that_hangs(served, tmp_path, monkeypatch):
    monkeypatch.setattr("c4c.retrieval.serve.engine._DECODE_LIMIT_S", 0.001)
    answer = served.upload(mp4("red", tmp_path))
    assert answer.status_code == 415 and "took longer" in detail(answer)


def test_a_decoder_that_dies(served, tmp_path):
    served.upload(b"anything")
    for process in served.engine._examples._idle:
        process.kill()  # another is started
    assert served.upload(mp4("red", tmp_path)).status_code == 200


def test_an_upload_that_is_too_large(served):
    answer = served.upload(bytes(LIMIT_MB * 1_000_000 + 1))
    assert answer.status_code == 413 and f"{LIMIT_MB} MB" in detail(answer)

    def parts():
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
        for _ in range(40):
            yield bytes(100_000)
        yield b"\r\n--b--\r\n"

    headers = {"content-type": "multipart/form-data; boundary=b"}
    # a request that does not say how long it is
    answer = served.client.post("/api/search/example", content=parts(), headers=headers)
    assert answer.status_code == 413
    answer = served.client.post(
        "/api/search/example", content=b"", headers={**headers, "content-length": "99999999999999"}
    )
    assert answer.status_code == 413


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        ("application/json", b"{}", 415),
        ("multipart/form-data", b"", 415),
        ("multipart/form-data; boundary=" + "b" * 300, b"", 415),
        ("multipart/form-data; boundary=b", b"", 400),
        ("multipart/form-data; boundary=b", b"garbage without a boundary", 400),
        ("multipart/form-data; boundary=b", b"--b\r\nContent-Disposition: form-data; name=\"file\"\r\n\r\nabc", 400),
        ("multipart/form-data; boundary=b", b'--b\r\nContent-Disposition: form-data; name="other"\r\n\r\nabc\r\n--b--\r\n', 422),
        ("multipart/form-data; boundary=b", b"--b\r\nContent-Disposition: " + b"x" * 9999 + b"\r\n\r\na\r\n--b--\r\n", 400),
        ("multipart/form-data; boundary=b", b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\na\r\n' * 2 + b"--b--\r\n", 422),
        ("multipart/form-data; boundary=b", b"--b\r\n" + b"x" * 100_000, 400),
    ],
)  # fmt: skip
def test_damaged_forms(served, kind, body, status):
    answer = served.client.post("/api/search/example", content=body, headers={"content-type": kind})
    assert answer.status_code == status, answer.text
    detail(answer)


def test_a_setting_in_the_form_is_not_ignored(served, tmp_path):
    answer = served.client.post("/api/search/example", files={"file": ("x", mp4("red", tmp_path))}, data={"k": "2"})
    assert answer.status_code == 422 and "'k'" in detail(answer) and "address" in detail(answer)
    assert served.upload(mp4("red", tmp_path), K=2).status_code == 422


def test_without_the_checkpoint(served, tmp_path, monkeypatch):
    def by_frames(*_, **__):
        raise ValueError("/secret/run is not there")

    monkeypatch.setattr(served.searcher, "by_frames", by_frames)
    answer = served.upload(mp4("red", tmp_path))
    assert answer.status_code == 503 and "--ckpt" in detail(answer) and "secret" not in answer.text


def test_with_another_checkpoint(tmp_path, monkeypatch):
    """--ckpt was given, so the answer does not ask for it."""

    def by_frames(*_, **__):
        raise ValueError("/secret/run is not the model that made the index")

    with Served(stand_in.make(tmp_path, {"red.mp4": (["red"], {})}), checkpoint="/secret/run") as it:
        monkeypatch.setattr(it.searcher, "by_frames", by_frames)
        answer = it.upload(stand_in.jpeg(stand_in.COLOURS["red"]))
    assert answer.status_code == 503 and "secret" not in answer.text
    assert "The server's --ckpt names another, or cannot be read; its log says more." in detail(answer)


def test_damaged_forms_do_not_fill_the_log(served, caplog):
    headers = {"content-type": "multipart/form-data; boundary=b"}
    assert served.client.post("/api/search/example", content=b"garbage", headers=headers).status_code == 400
    assert [record.getMessage() for record in caplog.records if "multipart" in record.name] == []
