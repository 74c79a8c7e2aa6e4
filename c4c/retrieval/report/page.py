"""The report's page: what its template shows and its script reads."""

import math
import time
from pathlib import Path

import numpy as np
from markupsafe import Markup

from c4c.pages.charts import Series, line_chart
from c4c.pages.filling import fill
from c4c.retrieval import published
from c4c.retrieval.evaluation import Evaluation
from c4c.retrieval.report import gallery as galleries
from c4c.retrieval.report import summary
from c4c.retrieval.report.learning import Learning, learning
from c4c.retrieval.report.thumbnails import Strips
from shards import count

_FOLDER = Path(__file__).parent
_METRICS = ("R1", "R5", "R10", "MdR", "MnR")
_WAYS = {"t2v": "text to video", "v2t": "video to text"}


class ReportPage:
    """An evaluation with all that the page says of it, but for the pictures."""

    def __init__(
        self, evaluation: Evaluation, run: Path | None, checkpoint: str, title: str | None, views: tuple[int, int]
    ):
        info = evaluation.split.info
        self.evaluation, self.checkpoint, self.views = evaluation, checkpoint, views
        self.title = title or f"{_last(checkpoint)} on {info.get('name', '')} {info.get('split', '')}".strip()
        self.shown, self.curves = galleries.gallery(evaluation), learning(run, checkpoint)
        self.ranks = {"t2v": evaluation.by_text.cpu().numpy(), "v2t": evaluation.by_video.cpu().numpy()}
        self.lengths = np.array([galleries.words(text) for text in evaluation.texts])
        self.seconds = np.array([evaluation.split.video(i).duration for i in range(len(evaluation.keys))])
        self.word_bins = summary.word_bins(self.lengths.tolist())
        self.duration_bins = summary.duration_bins(self.seconds.tolist())

    def fill(self, pictures: Strips) -> bytes:
        """The page with these pictures."""
        return fill(_FOLDER, self._context() | {"pictures": pictures}, self._data(pictures))

    def _data(self, pictures: Strips) -> dict:
        """What the page's script reads."""
        videos = {}
        for video in self.shown.videos:
            uri, frames, seen = pictures.of.get(video, (None, 0, 0))
            videos[video] = {
                "key": self.evaluation.keys[video],
                "s": float(self.seconds[video]),
                "own": self.shown.own[video],
                "strip": uri,
                "n": frames,
                "seen": seen,
            }
        bins = {
            name: [[one.label, one.low, None if math.isinf(one.high) else one.high] for one in found]
            for name, found in (("words", self.word_bins), ("durations", self.duration_bins))
        }
        return {
            "t2v": self.shown.t2v,
            "v2t": self.shown.v2t,
            "texts": self.shown.texts,
            "videos": videos,
            "clips": self.views[0],
        } | bins

    def _context(self) -> dict:
        """What the template shows without the script."""
        evaluation, split, data = self.evaluation, self.evaluation.split, self.evaluation.data
        n_texts, n_videos = len(evaluation.texts), len(evaluation.keys)
        seconds = sum(evaluation.timings.values())
        return {
            "title": self.title,
            "checkpoint": self.checkpoint,
            "ways": _WAYS,
            "metrics": evaluation.metrics,
            "columns": _METRICS,
            "rows": [(name, *_sees(row), row) for name, row in evaluation.rows.items()],
            "published": [(one, _figures(one)) for one in self._published()],
            "several": n_texts != n_videos,
            "split_name": f"{split.info.get('name', '')} {split.info.get('split', '')}".strip(),
            "split_path": str(split.path),
            "digest": split.digest,
            "clips": f"{count(data.num_frames, 'frame')} a {'video' if self.views == (1, 1) else 'clip'} ({data.sampling}), {data.image_size} × {data.image_size} pixels, "
            f"up to {data.max_words} tokens a text{', captions joined to paragraphs' if data.paragraph else ''}",
            "views": self.views,
            "recall": _recall(self.ranks, n_videos),
            "histogram": _histogram(self.ranks, n_videos),
            "breakdowns": self._breakdowns(),
            "learning": self.curves,
            "learning_charts": _learning_charts(self.curves),
            "timings": [
                (name.replace("_", " "), s, 100 * s / (seconds or 1)) for name, s in evaluation.timings.items()
            ],
            "seconds": seconds,
            "shown": self.shown,
            "totals": {"t2v": n_texts, "v2t": n_videos},
            "worst": galleries.WORST,
            "sample": galleries.SAMPLE,
            "seed": galleries.SEED,
            "date": time.strftime("%Y-%m-%d"),
        }

    def _published(self) -> tuple[published.Published, ...]:
        """What was published on the split; () where texts are paragraphs, or videos are seen in several clips or crops: there it is not."""
        if self.evaluation.data.paragraph or self.views != (1, 1):
            return ()
        return published.published(self.evaluation.split, len(self.evaluation.texts))

    def _breakdowns(self) -> list[tuple[str, str, str, list[summary.BinResult]]]:
        """(direction, the gallery's filter, heading, rows) by caption length, and by duration in both directions."""
        videos = {"t2v": self.evaluation.video_of_text.cpu().numpy(), "v2t": np.arange(len(self.seconds))}
        of_texts = self.seconds[videos["t2v"]]
        kinds = (
            ("t2v", "words", "Caption length", self.word_bins, self.lengths),
            ("t2v", "duration", "Video duration", self.duration_bins, of_texts),
            ("v2t", "duration", "Video duration", self.duration_bins, self.seconds),
        )
        lower = {"t2v": len(self.ranks["t2v"]) != len(self.ranks["v2t"]), "v2t": False}  # as in the table of metrics
        return [
            (
                way,
                control,
                f"{kind}, {_WAYS[way]}",
                summary.breakdown(bins, values, self.ranks[way], videos[way], lower[way]),
            )
            for way, control, kind, bins, values in kinds
        ]


def _last(checkpoint: str) -> str:
    """The run and the tag of RUN/checkpoints/TAG; else the last part of the name."""
    parts = [part for part in Path(checkpoint).parts if part != "checkpoints"]
    return "/".join(parts[-2:] if "checkpoints" in Path(checkpoint).parts else parts[-1:]) or checkpoint


def _sees(row: dict) -> tuple[str, bool]:
    """What a way of re-ranking looks at, and whether that is more than a search has."""
    if row.get("sees_all_test_queries", True):
        return "sees all test queries: not comparable with a search", True
    bank = f"{count(row['bank_texts'], 'text')} of training" if "bank_texts" in row else "training texts"
    return f"uses a bank of {bank}, no test query but its own", False


def _figures(one: published.Published) -> dict[str, dict]:
    """As `c4c.retrieval.metrics.report` has them."""
    return {
        way: dict(zip(_METRICS, row, strict=True)) if row else {} for way, row in (("t2v", one.t2v), ("v2t", one.v2t))
    }


def _recall(ranks: dict[str, np.ndarray], n_videos: int) -> dict:
    """The recall curves: a chart, and rows (K, t2v, v2t)."""
    curves = {way: summary.recall_curve(r, n_videos) for way, r in ranks.items()}
    points = {way: list(enumerate(curve, 1)) for way, curve in curves.items()}
    chance = [(k, 100.0 * k / n_videos) for k in range(1, len(curves["t2v"]) + 1)]
    chart = line_chart(
        "Recall at K, from 1 to 50, in both directions",
        [Series("chance", "c", chance), Series("video to text", "b", points["v2t"]), Series("text to video", "a", points["t2v"])],
        "K", "R@K, %", y_range=(0, 100),
    )  # fmt: skip
    return {"chart": chart, "rows": list(zip(range(1, len(chance) + 1), curves["t2v"], curves["v2t"], strict=True))}


def _histogram(ranks: dict[str, np.ndarray], n_videos: int) -> list[dict]:
    """Rows of the histogram of ranks, with shares in percent."""
    both = {way: summary.histogram(r, n_videos) for way, r in ranks.items()}
    return [
        {
            "label": label,
            **{way: both[way][i][1] for way in both},
            **{f"{way}_pct": 100 * both[way][i][1] / len(ranks[way]) for way in both},
        }
        for i, (label, _) in enumerate(both["t2v"])
    ]


def _learning_charts(curves: Learning) -> list[tuple[str, Markup]]:
    """(heading, chart) of each curve that the run has."""
    out = []
    if curves.t2v:
        series = [Series("video to text", "b", curves.v2t), Series("text to video", "a", curves.t2v)]
        out.append(
            ("Validation R@1, %", line_chart("R@1 of each validation", series, "step", "R@1, %", marker=curves.marker))
        )
    if curves.loss:
        out.append(
            (
                "Training loss",
                line_chart(
                    "Training loss by step", [Series("loss", "a", curves.loss)], "step", "loss", marker=curves.marker
                ),
            )
        )
    if curves.lr:
        series = [Series("learning rate", "a", curves.lr)]
        out.append(
            (
                "Learning rate",
                line_chart("Learning rate by step", series, "step", "learning rate", marker=curves.marker),
            )
        )
    return out
