"""The narrated demo set: the same bytes for a seed, nothing of the small set's test, and speech as noisy as promised."""

import io

import av
import pytest

from shards.demo.narrated import CHATTER_LINES, EVENTS, FPS, SECONDS, generate, narrated
from shards.demo.scenes import scenes


def test_no_event_of_the_small_sets_test_is_shown():
    small, videos = (20, 150), narrated(3, 250, (20, 150))
    hidden = {scene.event for scene in scenes(3, *small)["test"]}
    assert len(hidden) > 100
    assert not hidden & {scene.event for video in videos for scene in video.events}
    assert any(hidden & {scene.event for scene in some} for some in [scenes(3 + 1000, 1500, 0)["train"]]), "vacuous"


def test_speech_is_misaligned_wrong_and_idle_in_the_shares_promised():
    there = elsewhere = wrong = idle = 0
    for video in narrated(0, 200):
        starts = [caption.start for caption in video.captions]
        assert starts == sorted(starts) and len(starts) == 2 * EVENTS
        assert all(0 <= c.start < c.end <= EVENTS * SECONDS for c in video.captions)
        for caption in video.captions:
            of = [i for i, scene in enumerate(video.events) if caption.text in scene.captions]
            at = min(int((caption.start + caption.end) / 2 / SECONDS), EVENTS - 1)
            if caption.text in CHATTER_LINES:
                idle += 1
            elif not of:
                wrong += 1
            elif at in of:
                there += 1
            else:
                elsewhere += 1
    total = there + elsewhere + wrong + idle
    assert idle / total == pytest.approx(0.15, abs=0.03)
    assert wrong / total == pytest.approx(0.2, abs=0.03)
    assert 0.6 < elsewhere / there < 1.4


@pytest.mark.slow
def test_the_same_bytes_however_they_are_made(tmp_path):
    items = generate(tmp_path / "a", seed=1, videos=3, small=(4, 4), workers=1)
    again = generate(tmp_path / "b", seed=1, videos=3, small=(4, 4), workers=2)
    assert [i.path.read_bytes() for i in items] == [i.path.read_bytes() for i in again]
    kept = items[0].path.stat().st_mtime_ns
    generate(tmp_path / "a", seed=1, videos=3, small=(4, 4), workers=1)
    assert items[0].path.stat().st_mtime_ns == kept
    with pytest.raises(FileExistsError, match="holds another demo set"):
        generate(tmp_path / "a", seed=2, videos=3, small=(4, 4))
    with av.open(io.BytesIO(items[0].path.read_bytes())) as file:
        frames = sum(1 for _ in file.decode(video=0))
    assert frames == EVENTS * SECONDS * FPS
    assert items[0].meta["shown"][1][:2] == [SECONDS, 2 * SECONDS]
