"""The report: one page, complete in itself, that shows what an evaluation found.

page        what template.html, page.css and page.js are given; c4c/pages fills them
summary     numbers that follow from ranks; learning: a run's curves
gallery     which queries are shown, and what they found; near: captions that say the same
thumbnails  moving pictures of the videos
"""

from collections.abc import Callable
from pathlib import Path

from c4c.files import replace_text
from c4c.retrieval.evaluation import Evaluation
from c4c.retrieval.report.page import ReportPage
from c4c.retrieval.report.thumbnails import Strips, strips

MOST_BYTES = 25_000_000  # of the page
_AROUND, _SENTENCES = 40, 1000  # bytes around each picture, and of the sentences about those left out


def write_report(
    path: Path,
    evaluation: Evaluation,
    run: Path | None,
    checkpoint: str,
    title: str | None = None,
    *,
    views: tuple[int, int] = (1, 1),
    most_bytes: int = MOST_BYTES,
    tell: Callable[[str, int, int], None] = lambda *_: None,
) -> None:
    """Write the report of an evaluation to `path`, an HTML file of at most `most_bytes`.

    run: the folder whose learning curves it shows, None for weights without one. checkpoint: what was evaluated, in words.
    views: clips and crops of each video. tell: called with "pictures", how many videos have theirs, and of how many. Raises OSError if the file cannot be written, ValueError if
    not even the page without pictures fits.
    """
    page = ReportPage(evaluation, run, checkpoint, title, views)
    bare = len(page.fill(Strips()))
    if bare > most_bytes:
        raise ValueError(f"the report would have {bare} bytes without any picture, and may have {most_bytes}")
    videos = page.shown.videos
    room = most_bytes - bare - _AROUND * len(videos) - _SENTENCES
    pictures = strips(evaluation.split, evaluation.data, videos, room, tell, views[0])
    replace_text({path: page.fill(pictures).decode()})
