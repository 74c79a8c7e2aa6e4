"""The settings of the loss in a training step: plain, with gradient caching and accumulated, on one rank and on two."""

import tempfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from c4c.config import Config
from c4c.decorrelation import decorrelation
from c4c.models.clip4clip import CLIP4Clip
from c4c.objective import LossOptions
from c4c.retrieval.feature_file import FeatureFile, FeatureHeader, write_features
from c4c.settings import TrainConfig
from c4c.training import step
from c4c.training.step import Learner
from c4c.training.stored_teacher import StoredTeacher
from c4c.training.teacher import Teacher
from tests.c4c.models.plain_engine import ROWS, SPEC, WAYS, Engine, Taken, by_formula, on_two_ranks, same, taken
from tests.c4c.pretend_split import PretendSplit

pytestmark = pytest.mark.slow

CAPTIONS, FRAMES = 3, 2
SIZES = [3, 1, 2, 3, 1, 3, 2, 0]  # captions of each video; the last row is padding
SMOOTH, EQUAL, ALONE = {"label_smoothing": 0.1}, {"mask_equal_captions": True}, {"decorrelation": 0.02}
# of cases whose name begins with it: by a teacher with the head wti
TAUGHT = {"teacher_weight": 0.7, "teacher_temperature": 2.0}
# name: (loss, captions a row, options, heads)
CASES = {
    "captions": ("cross_entropy", CAPTIONS, {}, ["meanP", "wti", "tightTransf"]),
    "captions, all": ("cross_entropy", CAPTIONS, SMOOTH | EQUAL | ALONE, ["seqTransf", "wti", "seqWTI"]),
    "smooth": ("cross_entropy", 1, SMOOTH, ["meanP"]),
    "equal": ("cross_entropy", 1, EQUAL, ["wti"]),
    "decorrelated": ("cross_entropy", 1, ALONE, ["meanP", "wti"]),
    "sigmoid": ("sigmoid", 1, EQUAL | ALONE, ["meanP", "wti"]),
    "taught": ("cross_entropy", 1, TAUGHT, ["meanP", "wti"]),
    "taught, captions, all": ("cross_entropy", CAPTIONS, TAUGHT | SMOOTH | EQUAL | ALONE, ["meanP"]),
    "taught from a file": ("cross_entropy", 1, TAUGHT, ["meanP"]),
    "taught from a file, captions": ("cross_entropy", CAPTIONS, TAUGHT, ["meanP"]),
    "taught from a file in part": ("cross_entropy", 1, TAUGHT, ["wti"]),
    "taught from a file in part, captions": ("cross_entropy", CAPTIONS, TAUGHT, ["meanP"]),
}
UNREADABLE = [0, 5]  # videos that such a file knows nothing of
RUNS = [(name, head, way) for name, case in CASES.items() for head in case[3] for way in WAYS]


def learner(name: str, head: str) -> Learner:
    one = Learner(drawn(head, 5), CASES[name][0], -3.0, LossOptions(**CASES[name][2]))
    if name.startswith("taught from a file"):
        one.teacher = stored(drawn("wti", 6), UNREADABLE if "in part" in name else [])
        one.unreadable = UNREADABLE if "in part" in name else []
    elif name.startswith("taught"):
        one.teacher = Teacher("wti", drawn("wti", 6))
    return one


def stored(model: CLIP4Clip, unreadable: list[int]) -> StoredTeacher:
    """The videos of `batch` in a file, the last one first, and the captions of each: the row says nothing by itself. unreadable: of them."""
    whole = batch(CAPTIONS)
    videos = range(ROWS - 1)
    with torch.no_grad():
        text, video = model(whole.frames, whole.frame_mask, whole.tokens)
    texts = torch.cat([text[v, : SIZES[v]] for v in reversed(videos)])
    captions = {f"v{v}": [f"{i} of v{v}" for i in range(SIZES[v])] for v in videos}
    crcs = [zlib.crc32(caption.encode()) for name in reversed(captions) for caption in captions[name]]
    counts = [len(captions[name]) for name in reversed(captions)]
    about = {"unreadable": [ROWS - 2 - v for v in unreadable]}
    header = FeatureHeader(
        list(reversed(captions)), counts, crcs, model.scale().item(), model.head, {"width": model.head.width}, about
    )
    video[unreadable] = torch.randn(video[unreadable].shape, generator=torch.Generator().manual_seed(8))
    with tempfile.TemporaryDirectory() as folder:
        write_features(Path(folder) / "f.safetensors", header, video[: ROWS - 1].flip(0), iter([texts[:2], texts[2:]]))
        file = FeatureFile(f"{folder}/f.safetensors")  # which stays mapped
    return StoredTeacher(file, PretendSplit(captions), Config(), torch.device("cpu"))


def drawn(head: str, seed: int) -> CLIP4Clip:
    torch.manual_seed(seed)
    model = CLIP4Clip(SPEC, head, "2d", blocks=1, segments=FRAMES)
    for weight in model.head.parameters():  # so that they matter
        torch.nn.init.normal_(weight, std=0.3)
    return model


def batch(captions: int, rows: slice = slice(None)) -> SimpleNamespace:
    """Some captions of different videos are the same, on one rank and on two."""
    random = torch.Generator().manual_seed(1)
    frames = torch.randn(ROWS, FRAMES, 3, 32, 32, generator=random)
    tokens = torch.randint(1, 98, (ROWS, CAPTIONS, 6), generator=random)
    tokens[2, 0], tokens[4, 0], tokens[6, 0], tokens[5, 0] = tokens[0, 0], tokens[0, 0], tokens[3, 0], tokens[6, 1]
    tokens[..., 5] = 99
    present = torch.arange(CAPTIONS) < torch.tensor(SIZES)[:, None]
    valid = present[:, 0]
    mask = torch.ones(ROWS, FRAMES, dtype=torch.bool)
    tokens = tokens if captions > 1 else tokens[:, 0]
    numbers = torch.arange(CAPTIONS).where(present, -1)[:, :captions].numpy()
    whole = SimpleNamespace(
        frames=frames, frame_mask=mask, tokens=tokens, caption_mask=present, valid=valid, caption_numbers=numbers
    )
    pairs = torch.arange(ROWS)[rows][valid[rows]].numpy()[:, None].repeat(2, axis=1)
    return SimpleNamespace(pairs=pairs, **{name: value[rows] for name, value in vars(whole).items()})


def formula(one: Learner, whole: SimpleNamespace, rows: list[int]) -> Tensor:
    """Over these rows, from a matrix of all captions and videos."""
    model, options, several = one.model, one.options, whole.tokens.dim() == 3
    text, video = model(whole.frames[rows], whole.frame_mask[rows], whole.tokens[rows])
    present = whole.caption_mask[rows] if several else whole.valid[rows][:, None]
    text, tokens = (x if several else x[:, None] for x in (text, whole.tokens[rows]))
    teacher = one.teacher and drawn("wti", 6)
    taught = teacher and teacher(whole.frames[rows], whole.frame_mask[rows], tokens)
    owner = torch.arange(len(rows))[:, None].expand(present.shape)[present]
    text, tokens = text[present], tokens[present]
    logits = (model.scale() * model.head.score(text, video)).double()
    own = torch.nn.functional.one_hot(owner, len(rows)).bool()  # [T, V]
    apart = torch.zeros_like(own)
    if options.mask_equal_captions:
        same = (tokens[:, None] == tokens[None]).all(dim=2)
        apart = (same.double() @ own.double() > 0) & ~own
    if one.loss == "sigmoid":
        signed = torch.where(own, 1, -1) * (logits + model.clip.logit_bias)
        loss = -logsigmoid(signed)[~apart].sum() / len(rows)
    else:
        loss = (
            soft(logits, own, apart, options.label_smoothing) + soft(logits.T, own.T, apart.T, options.label_smoothing)
        ) / 2
    if options.decorrelation:
        compared = model.head.compared(text, video[owner])
        loss = loss + options.decorrelation * decorrelation(compared, options.decorrelation_off_diagonal)
    if taught:
        wanted = (teacher.scale() * teacher.head.score(taught[0][present], taught[1])).detach().double()
        t = options.teacher_temperature
        known = torch.tensor([row not in getattr(one, "unreadable", []) for row in rows])
        wanted, logits = (x[known[owner]][:, known] for x in (wanted, logits))
        both = [kl(x / t, y / t) for x, y in ((wanted, logits), (wanted.T, logits.T))]
        loss = loss + options.teacher_weight * t**2 * sum(both) / 2
    return loss


def kl(teacher: Tensor, model: Tensor) -> Tensor:
    """Of the softmax of each row, the mean."""
    p, q = teacher.exp() / teacher.exp().sum(1, keepdim=True), model.exp() / model.exp().sum(1, keepdim=True)
    return (p * (p / q).log()).sum(1).mean()


def soft(logits: Tensor, own: Tensor, apart: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy with soft targets, by row."""
    target = (1 - smoothing) * own / own.sum(1, keepdim=True) + smoothing * ~apart / (~apart).sum(1, keepdim=True)
    logits = logits.masked_fill(apart, -1e4)
    return -(target * logits.log_softmax(dim=1)).sum(1).mean()


def expected(name: str, head: str, way: str) -> Taken:
    one, whole = learner(name, head), batch(CASES[name][1])
    return by_formula(way, one, lambda rows: formula(one, whole, rows))


def took(name: str, head: str, way: str, rows: slice = slice(None)) -> Taken:
    module, given = learner(name, head), batch(CASES[name][1], rows)
    looked_up = module.teacher and module.teacher.rows_of(given)
    return taken(way, module, step.inputs_of(given, CASES[name][0]), looked_up)


@pytest.mark.parametrize(("name", "head", "way"), RUNS)
def test_a_step_has_the_formulas_gradient(name, head, way):
    same(took(name, head, way), expected(name, head, way), 1e-3, 2e-5)


def test_every_option_matters():
    one = batch(CAPTIONS)
    plain = formula(learner("captions", "wti"), one, list(range(7)))
    for options in (SMOOTH, EQUAL, ALONE):
        other = learner("captions", "wti")
        other.options = LossOptions(**options)
        assert formula(other, one, list(range(7))).item() != pytest.approx(plain.item(), rel=1e-3)


def test_without_options_nothing_is_other_than_before():
    """Bit for bit: the loss is the one that it was, called in the same way."""
    from c4c.losses import contrastive_loss

    module = learner("smooth", "meanP")
    module.options = LossOptions.of(TrainConfig())
    given = step.inputs_of(batch(1), "cross_entropy")
    text, video = module.model(*given[:3])
    assert torch.equal(
        module(*given), contrastive_loss(text, video, given[3], module.model.scale(), module.model.head.score)
    )


def test_a_teacher_is_asked_once_a_batch_and_is_no_part_of_what_is_trained(monkeypatch):
    module, asked = learner("taught", "meanP"), []
    plain = learner("smooth", "meanP")
    assert list(module.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in plain.named_parameters()]
    module.train()
    assert not module.teacher.model.training
    before, forward = module.teacher.digest, module.teacher.model.forward
    monkeypatch.setattr(module.teacher.model, "forward", lambda *part: asked.append(len(part[0])) or forward(*part))
    step._cached_step(Engine(module), step.inputs_of(batch(1), "cross_entropy"), 3)
    assert asked == [3, 3, 2]
    assert Teacher("again", module.teacher.model).digest == before
    other = CLIP4Clip(SPEC | {"quick_gelu": False}, "meanP", "2d", blocks=1, segments=FRAMES)
    other.load_state_dict(module.teacher.model.state_dict(), strict=False)
    assert Teacher("other activations", other).digest != before
    assert all(weight.grad is None for weight in module.teacher.model.parameters())


def test_a_model_that_scores_as_its_teacher_has_nothing_to_learn_from_it():
    module = learner("taught", "meanP")
    given = step.inputs_of(batch(1), "cross_entropy")
    taught, module.teacher = module(*given), None
    plain = module(*given)
    assert taught.item() > plain.item() + 1e-3
    module.teacher = Teacher("itself", drawn("meanP", 5))
    assert module(*given).item() == pytest.approx(plain.item(), rel=1e-5)


def test_two_ranks(tmp_path):
    for case, found in on_two_ranks(took, RUNS, tmp_path).items():
        same(found, expected(*case), 1e-3, 2e-5)
