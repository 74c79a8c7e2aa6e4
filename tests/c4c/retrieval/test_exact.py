"""The same bits whatever batches, threads, and where weights lie in memory. Several ranks: tests/launch/test_eval_outputs.py."""

import random

import pytest
import torch

from c4c.models.clip4clip import CLIP4Clip
from c4c.retrieval.evaluate import evaluate
from c4c.retrieval.work import EvalWork, aligned
from pipelines.config import DataConfig
from pipelines.tokens import Tokenizer
from shards.demo import shapes
from shards.packing.pack import pack
from shards.split import Split
from shards.video.profiles import Profile

pytestmark = pytest.mark.slow  # imports DALI

CPU = torch.device("cpu")
VISION = {"image_size": 64, "patch_size": 16, "width": 32, "layers": 1, "head_width": 32}
TEXT = {"context_length": 40, "vocab_size": 49408, "width": 40, "heads": 1, "layers": 1}
SPEC = {"embed_dim": 33, "quick_gelu": False, "vision_cfg": VISION, "text_cfg": TEXT}  # odd, as kernels dislike it


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Split:
    """17 videos of several captions each."""
    folder = tmp_path_factory.mktemp("exact")
    items = shapes.generate(folder / "source", seed=0, train=17, test=1, workers=1)["train"]
    pack(items, folder / "split", dataset="demo", split="train", profile=Profile(short_side=64), workers=1)
    return Split(folder / "split")


@pytest.fixture(autouse=True)
def threads():
    """As many as before, whatever a test sets."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def model_of(head: str, patch: str = "2d") -> CLIP4Clip:
    torch.manual_seed(1)
    return CLIP4Clip(SPEC, head, patch, segments=5).eval()


def found(model: CLIP4Clip, split: Split, threads: int = 1, **settings) -> list[torch.Tensor]:
    """Features, ranks and scores."""
    data = DataConfig(num_frames=5, image_size=64, max_words=20, threads=1, **settings)
    tokenizer = Tokenizer(model.spec.get("tokenizer"))
    torch.set_num_threads(threads)
    result = evaluate(model, model, split, data, EvalWork(CPU), tokenizer=tokenizer)
    return [result.text_features, result.video_features, torch.from_numpy(result.similarity()), result.by_text]


def different(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> list[int]:
    return [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if not torch.equal(a, b)]


@pytest.mark.parametrize("head", ["meanP", "seqLSTM", "tightTransf", "seqWTI", "TransformerAdapter 3d"])
def test_batches_and_threads_change_no_bit(split, head):
    model = model_of(*head.split())
    first = found(model, split, eval_batch_size=32)
    assert [len(part) for part in first] == [85, 17, 85, 85] and len(first[2][0]) == 17
    for threads, size in ((1, 1), (2, 3), (3, 8), (4, 17)):
        assert not different(found(model, split, threads, eval_batch_size=size), first), (threads, size)


def test_where_weights_lie_changes_no_bit():
    """As after DeepSpeed, which makes one flat tensor of all weights."""
    torch.manual_seed(0)
    layers, x = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)), torch.randn(1, 64)
    flat = torch.empty(2 * 64 * 65 + 1)
    torch.set_num_threads(1)
    with torch.no_grad():
        first, place = layers(x), 1
        for parameter in layers.parameters():
            parameter.data = flat[place : place + parameter.numel()].view_as(parameter).copy_(parameter.data)
            place += parameter.numel()
        assert all(p.data_ptr() % 64 for p in layers.parameters())
        with aligned(layers):
            assert not any(p.data_ptr() % 64 for p in layers.parameters())
            assert torch.equal(layers(x), first)
    parts = flat.data_ptr(), flat.data_ptr() + flat.nbytes
    assert all(parts[0] < p.data_ptr() < parts[1] for p in layers.parameters()), "they are put back"


def test_work_is_done_in_order_by_several_threads_of_one_thread_each():
    torch.set_num_threads(3)
    pieces = list(range(50))
    random.Random(0).shuffle(pieces)
    taken = []

    def source():
        for piece in pieces:
            taken.append(piece)
            yield piece

    with EvalWork(CPU) as work:
        results = work.map(lambda piece: (piece, torch.get_num_threads(), torch.is_grad_enabled()), source())
        assert next(results) == (pieces[0], 1, False)
        assert len(taken) <= 4, "no more are taken than threads can work on soon"
        assert [result[0] for result in results] == pieces[1:]
    assert torch.get_num_threads() == 3


def test_an_error_of_a_piece_is_the_callers():
    torch.set_num_threads(2)
    with pytest.raises(ZeroDivisionError), EvalWork(CPU) as work:
        list(work.map(lambda piece: 1 // piece, [1, 2, 0, 3, 4, 5, 6]))
    assert torch.get_num_threads() == 2
