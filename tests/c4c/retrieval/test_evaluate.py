"""Features of a split in its own order, whatever the batches; metrics over them. Several ranks: tests/launch."""

import json
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from c4c.models.heads.mean import MeanPooling
from c4c.retrieval import features as encoding
from c4c.retrieval.evaluate import _better, _of_pairs, evaluate, rerank_by_dsl
from c4c.retrieval.metrics import ScoreGrid
from c4c.retrieval.output import write_ranks, write_top
from c4c.retrieval.work import EvalWork
from pipelines.captions import texts_of
from pipelines.config import DataConfig
from tests.c4c.retrieval.score_matrix import of_matrix

pytestmark = pytest.mark.slow  # imports DALI

CAPTIONS = [["0"], ["1", "1", "1"], ["2", "2"], ["3"], ["4"]]  # each says which video it belongs to
CPU = torch.device("cpu")
TIMINGS = ["decode wait", "towers", "captions", "ranking"]


class Split:
    remote = None

    def __len__(self) -> int:
        return len(CAPTIONS)

    def captions(self, index: int) -> list[dict]:
        return [{"text": text} for text in CAPTIONS[index]]

    def video(self, index: int):
        return type("Video", (), {"key": f"v{index}", "id": f"v{index}"})

    def json(self, video) -> dict:
        return {}


class Reader:
    """Videos whose every pixel is their number, in batches of one, then of none."""

    closed = False

    def __init__(self, split, config, *, rank, world, device, raw, block, clip, bad):
        self.split = split
        self.shape = config.num_frames, 3, config.image_size, config.image_size

    def __iter__(self):
        for i in (0, 1, 2, 3, 4, None):
            n = 0 if i is None else 1
            yield (
                np.arange(5)[i : i + 1] if n else np.zeros(0, int),
                torch.full((n, *self.shape), float(i or 0)),
                torch.ones(n, 2).bool(),
            )

    def close(self):
        Reader.closed = True


def numbers(texts: list[str], max_words: int) -> torch.Tensor:
    """A tokenizer: the number that a text is, 7 for none."""
    return torch.tensor([[int(t) if t != "none" else 7] for t in texts])


class Model(torch.nn.Module):
    head = MeanPooling(8)
    spec: ClassVar[dict] = {"vision_cfg": {}, "text_cfg": {}}

    def forward(self, frames, mask, tokens):
        """One-hot features; never asked about no videos or no captions at all."""
        assert len(frames) and len(tokens)
        texts, videos = tokens[:, 0], frames[:, 0, 0, 0, 0].long()
        return torch.eye(8)[texts], torch.eye(8)[videos]


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    monkeypatch.setattr(encoding, "EvalLoader", Reader)


@pytest.mark.parametrize("size", [1, 3, 8, 50])
def test_every_video_and_caption_once_in_order(size):
    config = DataConfig(num_frames=2, image_size=4, eval_batch_size=size)
    model = Model()
    made = evaluate(model, model, Split(), config, EvalWork(CPU), tokenizer=numbers)
    assert made.video_of_text.tolist() == [0, 1, 1, 1, 2, 2, 3, 4]
    assert made.text_features.argmax(dim=1).tolist() == made.video_of_text.tolist() == list(map(int, made.texts))
    assert made.video_features.argmax(dim=1).tolist() == [0, 1, 2, 3, 4]
    assert Reader.closed


def test_the_right_answers_score_full_marks():
    model = Model()
    config = DataConfig(num_frames=2, image_size=4)
    found = evaluate(model, model, Split(), config, EvalWork(CPU), tokenizer=numbers)
    assert found.by_text.tolist() == [0] * 8 and found.by_video.tolist() == [0] * 5
    assert found.keys == ["v0", "v1", "v2", "v3", "v4"] and list(found.timings) == TIMINGS
    result = found.metrics
    assert (result["n_texts"], result["n_videos"]) == (8, 5)
    assert result["t2v"] == result["v2t"] == {"R1": 100.0, "R5": 100.0, "R10": 100.0, "MdR": 1.0, "MnR": 1.0}


def test_a_paragraph_is_one_text():
    class Paragraphs(Split):
        def captions(self, index: int) -> list[dict]:
            return [{"text": text} for text in (["1", "2"] if index == 3 else ["0"])]

    assert texts_of(Paragraphs(), 3, DataConfig(paragraph=True)) == ["1 2"]
    assert texts_of(Paragraphs(), 3, DataConfig()) == ["1", "2"]


def test_ranks_of_single_texts(tmp_path):
    class Ranked(Split):
        def json(self, video):
            return {"meta": {"pair": video.key}}

    write_ranks(tmp_path / "ranks.jsonl", Ranked(), DataConfig(), torch.arange(8))
    rows = [json.loads(line) for line in (tmp_path / "ranks.jsonl").read_text().splitlines()]
    assert [row["rank"] for row in rows] == list(range(1, 9))
    assert rows[3] == {"rank": 4, "video": "v1", "text": "1", "meta": {"pair": "v1"}}


def test_scores_that_are_no_numbers_are_null_in_what_was_found(tmp_path):
    class Found:
        texts, keys, video_of_text, by_text = ["a"], ["u", "v"], torch.tensor([0]), torch.tensor([1])

        def top(self, k):
            return torch.tensor([[1, 0]]), torch.tensor([[0.25, float("-inf")]])

    write_top(tmp_path / "top.jsonl", Found(), 2)

    def refuse(name):
        raise ValueError(name)

    row = json.loads((tmp_path / "top.jsonl").read_text(), parse_constant=refuse)
    assert row["found"] == [{"video": "v", "score": 0.25}, {"video": "u", "score": None}]


def test_dsl_of_a_head_without_cosines_does_not_depend_on_where_its_scores_lie():
    scores = torch.randn(9, 9, generator=torch.Generator().manual_seed(0)) + 5 * torch.eye(9)
    model, work = SimpleNamespace(head=SimpleNamespace(scaled=False)), EvalWork(torch.device("cpu"), ranks=False)
    for more in (0, -32):  # all below 0
        texts, videos, score = of_matrix(scores + more)
        found = SimpleNamespace(grid=ScoreGrid.of(texts, videos, torch.arange(9), score), rows={})
        rerank_by_dsl(found, model, work)
        assert found.rows["DSL"]["t2v"]["R1"] == found.rows["DSL"]["v2t"]["R1"] == 100


def test_the_line_of_the_checkpoint_names_a_better_one(tmp_path):
    rows = [{"step": step, "val/t2v_R1_pct": r1} for step, r1 in ((3, 30.0), (7, 20.0), (9, 10.0))]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in (7, 9):
        (tmp_path / "checkpoints" / f"step{step:08d}").mkdir(parents=True)
    seventh, ninth = "step00000007", "step00000009"
    assert f"(the best of the run's own validations is {seventh}: --tag best)" in _better(str(tmp_path), ninth, None)
    assert "step00000003 was better (30.0) and is gone" in _better(str(tmp_path), seventh, "best")
    assert _better(str(tmp_path), seventh, None) == _better("openai:ViT-B-32", None, None) == ""


@pytest.mark.parametrize(
    ("n_pairs", "said"),
    [(3, "its twin 40.0 % (guessing: 50 %)"), (0, "all of its twins 40.0 % (guessing: less than 50 %)")],
)
def test_what_a_guess_is_worth(n_pairs, said):
    """Among three videos that differ in order only, a guess is right once in three times."""
    (line,) = _of_pairs({"pairs": {"R1": 1.0, "own_first": 40.0, "n_texts": 6, "n_pairs": n_pairs}})
    assert line == f"order pairs 6 texts: R@1 1.0 %, own video above {said}"
