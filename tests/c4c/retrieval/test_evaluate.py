"""Features of a split in its own order, whatever the batches; metrics over them. Several ranks: tests/launch."""

import json

import numpy as np
import pytest
import torch

from c4c.models.heads.mean import MeanPooling
from c4c.retrieval import evaluate as module
from c4c.retrieval.evaluate import evaluate, features
from pipelines.config import DataConfig

pytestmark = pytest.mark.slow  # imports DALI

CAPTIONS = [["0"], ["1", "1", "1"], ["2", "2"], ["3"], ["4"]]  # each says which video it belongs to
CPU = torch.device("cpu")


class Split:
    def __len__(self) -> int:
        return len(CAPTIONS)

    def captions(self, index: int) -> list[dict]:
        return [{"text": text} for text in CAPTIONS[index]]


class Reader:
    """Videos whose every pixel is their number, in batches of one, then of none."""

    closed = False

    def __init__(self, split, config, *, rank, world, device, raw):
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


class Model:
    head = MeanPooling(8)

    def __call__(self, frames, mask, tokens):
        """One-hot features; never asked about no videos or no captions at all."""
        assert len(frames) and len(tokens)
        texts, videos = tokens[:, 0], frames[:, 0, 0, 0, 0].long()
        return torch.eye(8)[texts], torch.eye(8)[videos]


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    monkeypatch.setattr(module, "EvalLoader", Reader)
    monkeypatch.setattr(
        module, "tokenize", lambda texts, words: torch.tensor([[int(t) if t != "none" else 7] for t in texts])
    )


@pytest.mark.parametrize("size", [1, 3, 8, 50])
def test_every_video_and_caption_once_in_order(size):
    config = DataConfig(num_frames=2, image_size=4, eval_batch_size=size)
    texts, videos, owner = features(Model(), Split(), config, CPU)
    assert owner.tolist() == [0, 1, 1, 1, 2, 2, 3, 4]
    assert texts.argmax(dim=1).tolist() == owner.tolist()
    assert videos.argmax(dim=1).tolist() == [0, 1, 2, 3, 4]
    assert Reader.closed


def test_the_right_answers_score_full_marks():
    model = Model()
    result, ranks = evaluate(model, model, Split(), DataConfig(num_frames=2, image_size=4), CPU)
    assert ranks.tolist() == [0] * 8
    assert (result["n_texts"], result["n_videos"]) == (8, 5)
    assert result["t2v"] == result["v2t"] == {"R1": 100.0, "R5": 100.0, "R10": 100.0, "MdR": 1.0, "MnR": 1.0}


def test_a_paragraph_is_one_text():
    class Paragraphs(Split):
        def captions(self, index: int) -> list[dict]:
            return [{"text": text} for text in (["1", "2"] if index == 3 else ["0"])]

    assert module.texts_of(Paragraphs(), 3, DataConfig(paragraph=True)) == ["1 2"]
    assert module.texts_of(Paragraphs(), 3, DataConfig()) == ["1", "2"]


def test_ranks_of_single_texts(tmp_path):
    class Ranked(Split):
        def video(self, index):
            return type("Video", (), {"key": f"v{index}", "id": f"v{index}"})

        def json(self, video):
            return {"meta": {"pair": video.key}}

    module.write_ranks(tmp_path / "ranks.jsonl", Ranked(), DataConfig(), torch.arange(8))
    rows = [json.loads(line) for line in (tmp_path / "ranks.jsonl").read_text().splitlines()]
    assert [row["rank"] for row in rows] == list(range(1, 9))
    assert rows[3] == {"rank": 4, "video": "v1", "text": "1", "meta": {"pair": "v1"}}
