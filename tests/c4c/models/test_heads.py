"""What every head must do, and what tells them apart."""

import pytest
import torch

from c4c.models.clip4clip import CLIP4Clip, build
from c4c.models.heads import HEADS
from c4c.settings import ModelConfig
from tests.c4c.models.test_weights import SPEC, tiny


@pytest.fixture(params=sorted(HEADS))
def model(request) -> CLIP4Clip:
    torch.manual_seed(0)
    return CLIP4Clip(SPEC, request.param, blocks=2, segments=5)


def _inputs(frames: int = 5):
    torch.manual_seed(1)
    video = torch.randn(3, frames, 3, 32, 32)
    mask = torch.arange(frames) < torch.tensor([[frames], [2], [1]])
    tokens = torch.tensor([[998, 5, 999, 0], [998, 7, 8, 999], [998, 999, 0, 0]])
    return video, mask, tokens


@pytest.mark.parametrize("patch", ["2d", "3d"])
@pytest.mark.parametrize("head", sorted(HEADS))
def test_padded_frames_change_nothing(head, patch):
    torch.manual_seed(0)
    model = CLIP4Clip(SPEC, head, patch, blocks=2, segments=5)
    if patch == "3d":
        torch.nn.init.normal_(model.clip.visual.conv2.weight, std=0.02)
    video, mask, tokens = _inputs()
    noise = torch.where(mask[:, :, None, None, None], video, torch.randn_like(video) * 100)
    found = []
    for frames in (video, noise):
        frames = frames.clone().requires_grad_()
        score = model.similarity(model.encode_text(tokens), model.encode_video(frames, mask), mask)
        score.square().sum().backward()
        found.append((score.detach(), frames.grad[mask]))
        assert not frames.grad[~mask].any()
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)


def test_longer_padding_changes_nothing(model):
    video, mask, tokens = _inputs(4)
    longer = torch.cat([video, torch.zeros(3, 1, 3, 32, 32)], dim=1)
    wider = torch.cat([mask, torch.zeros(3, 1, dtype=torch.bool)], dim=1)
    with torch.no_grad():
        short = model.similarity(model.encode_text(tokens), model.encode_video(video, mask), mask)
        padded = model.similarity(
            model.encode_text(torch.nn.functional.pad(tokens, (0, 3))), model.encode_video(longer, wider), wider
        )
    torch.testing.assert_close(short, padded, rtol=1e-5, atol=1e-5)


def test_training_forward_is_the_public_path(model):
    video, mask, tokens = _inputs()
    with torch.no_grad():
        text, clips = model(video, mask, tokens)
        direct = model.similarity(model.encode_text(tokens), model.encode_video(video, mask), mask)
    torch.testing.assert_close(model.scale() * model.head.score(text, clips), direct, rtol=1e-5, atol=1e-5)


def test_scores_of_a_pair_do_not_depend_on_the_company(model):
    video, mask, tokens = _inputs()
    with torch.no_grad():
        text, clips = model(video, mask, tokens)
        whole = model.head.score(text, clips)
        alone = torch.stack([torch.cat([model.head.score(t[None], v[None])[0] for v in clips]) for t in text])
    torch.testing.assert_close(whole, alone, rtol=1e-5, atol=1e-5)


def test_videos_without_frames_are_finite(model):
    video, mask, tokens = _inputs()
    mask[2] = False
    text, clips = model(video, mask, tokens)
    score = model.head.score(text, clips)
    score.sum().backward()
    assert score.isfinite().all()
    if model.head.scaled:  # tightTransf looks at the text alone
        assert not score[:, 2].any()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_only_some_heads_see_order():
    """Planted features: two videos with the same frames in reverse order."""
    torch.manual_seed(0)
    frames = torch.randn(1, 4, 64)
    both = torch.cat([frames, frames.flip(1)])
    mask = torch.ones(2, 4, dtype=torch.bool)
    text = torch.randn(1, 64)
    gap = {}
    for name in ("meanP", "SimpleMeanAdapter", "seqLSTM", "seqTransf", "seqWTI", "tightTransf", "TransformerAdapter"):
        head = tiny(name).head
        a, b = head.score(head.text(text[:, None] if head.tokens else text), head.video(both, mask))[0]
        gap[name] = (a - b).abs().item()
    assert gap["meanP"] < 1e-6 and gap["SimpleMeanAdapter"] < 1e-6
    assert min(gap[n] for n in ("seqLSTM", "seqTransf", "seqWTI", "TransformerAdapter")) > 1e-5


@pytest.mark.slow
def test_seq_transf_learns_what_mean_pooling_cannot():
    """Pairs of videos that differ in order only, and texts that say which: meanP stays at a guess, seqTransf solves it."""
    solved = {}
    for name in ("meanP", "seqTransf"):
        torch.manual_seed(0)
        head = tiny(name).head
        first, second = torch.randn(2, 16, 64)
        forward, backward = torch.stack([first, second], 1), torch.stack([second, first], 1)
        video, mask = torch.cat([forward, backward]), torch.ones(32, 2, dtype=torch.bool)
        text = torch.nn.Parameter(torch.randn(32, 64))
        optimizer = torch.optim.Adam([text, *head.parameters()], lr=3e-3)
        own = torch.arange(32)
        for _ in range(150):
            score = 20 * head.score(head.text(text), head.video(video, mask))
            loss = torch.nn.functional.cross_entropy(score, own)
            optimizer.zero_grad(), loss.backward(), optimizer.step()
        ahead = score.gather(1, own[:, None]) - score.gather(1, ((own + 16) % 32)[:, None])
        solved[name] = (ahead > 1e-3).float().mean().item()
    assert solved["meanP"] == 0
    assert solved["seqTransf"] > 0.95


def test_wti_is_its_formula():
    head = tiny("wti").head
    text, video, _ = _tokens_and_frames()
    with torch.no_grad():
        got = head.score(head.text(text), video)
        for i, t in enumerate((text[0, :2], text[1])):
            for j, v in enumerate((video[0], video[1, :3], video[2])):
                torch.testing.assert_close(got[i, j], _interaction(head, t, v), rtol=1e-5, atol=1e-6)


def _tokens_and_frames():
    """Of two texts and three videos, zeros at padding, and the mask of the frames."""
    torch.manual_seed(2)
    text, video = torch.randn(2, 4, 64), torch.randn(3, 5, 64)
    text[0, 2:], video[1, 3:] = 0, 0
    return text, video, (video != 0).any(dim=2)


def _interaction(head, t: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """DRL's formula for a text [L, D] and a video [F, D] without padding."""
    s = torch.nn.functional.normalize(t, dim=-1) @ torch.nn.functional.normalize(v, dim=-1).T
    a, b = head.text_weight_fc(t).softmax(0)[:, 0], head.video_weight_fc(v).softmax(0)[:, 0]
    return ((a * s.amax(1)).sum() + (b * s.amax(0)).sum()) / 2


def _transformed(head, v: torch.Tensor) -> torch.Tensor:
    """Frames [F, D] without padding through seqTransf's transformer, one attention head: with positions, and added at the end."""
    norm = torch.nn.functional.layer_norm
    x = v + head.frame_position_embeddings.weight[: len(v)]
    for block in head.transformerClip.resblocks:
        width, attention, mlp = v.shape[1], block.attn, block.mlp
        y = norm(x, (width,), block.ln_1.weight, block.ln_1.bias, 1e-12)
        q, k, values = (y @ attention.in_proj_weight.T + attention.in_proj_bias).chunk(3, dim=1)
        mixed = (q @ k.T / width**0.5).softmax(dim=1) @ values
        x = x + attention.out_proj(mixed)
        y = mlp.c_fc(norm(x, (width,), block.ln_2.weight, block.ln_2.bias, 1e-12))
        x = x + mlp.c_proj(y * (1.702 * y).sigmoid())
    return x + v


def test_seq_wti_is_seq_transf_before_wti():
    """By the formulas, and by the two heads that have its weights."""
    head = tiny("seqWTI").head
    text, video, mask = _tokens_and_frames()
    with torch.no_grad():
        for weight in head.parameters():  # so that biases matter too
            weight.add_(0.1 * torch.randn_like(weight))
        stands = head.video(video, mask)
        assert torch.equal((stands != 0).any(dim=2), mask)
        got = head.score(head.text(text), stands)
        inside = [_transformed(head, v[seen]) for v, seen in zip(video, mask, strict=True)]
        for i, t in enumerate((text[0, :2], text[1])):
            for j, v in enumerate(inside):
                torch.testing.assert_close(got[i, j], _interaction(head, t, v), rtol=1e-4, atol=1e-5)
        first, second = tiny("seqTransf").head, tiny("wti").head
        parts = {**first.state_dict(), **second.state_dict()}
        assert parts.keys() == head.state_dict().keys()
        first.load_state_dict({name: head.state_dict()[name] for name in first.state_dict()})
        second.load_state_dict({name: head.state_dict()[name] for name in second.state_dict()})
        assert torch.equal(got, second.score(second.text(text), second.video(first.frames(video, mask), mask)))
        torch.testing.assert_close(head.score_at_once(head.text(text), stands), got)
    assert head.late and head.tokens and head.scaled and head.compares_channels
    assert head.most_frames == first.most_frames == 77


def test_seq_wti_starts_as_seq_transf_does():
    model, other = (CLIP4Clip(SPEC, name, blocks=2, segments=5) for name in ("seqWTI", "seqTransf"))
    other.clip.load_state_dict(model.clip.state_dict())
    for one in (model, other):
        one.start_head()
        assert not one.notes
    ours = model.head.state_dict()
    for name, value in other.head.state_dict().items():
        assert torch.equal(ours[name], value), name
    assert torch.equal(ours["frame_position_embeddings.weight"], model.clip.positional_embedding)


def test_half_precision_is_finite_without_frames():
    for dtype in (torch.bfloat16, torch.float16):
        head = tiny("seqWTI").head.to(dtype)
        text, video, mask = _tokens_and_frames()
        mask[2] = False
        score = head.score(head.text(text), head.video(video * mask[..., None], mask))
        score.sum().backward()
        assert score.isfinite().all() and not score[:, 2].any()
        assert all(weight.grad.isfinite().all() for weight in head.parameters())


def test_too_many_frames_is_an_error():
    frames, mask = torch.randn(1, 6, 64), torch.ones(1, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"data\.num_frames"):
        CLIP4Clip(SPEC, "TransformerAdapter", blocks=1, segments=5).head.video(frames, mask)


@pytest.mark.parametrize("name", ["seqTransf", "seqWTI", "tightTransf"])
def test_positions_that_start_at_random_are_not_drowned_by_the_frames(name):
    torch.manual_seed(0)
    model = build(ModelConfig(backbone="ViT-demo-16", head=name, init_from="scratch"), 4).eval()
    with torch.no_grad():
        frames = model.encode_video(torch.randn(1, 4, 3, 64, 64), torch.ones(1, 4, dtype=torch.bool))
    table = next(p for key, p in model.head.named_parameters() if "position_embeddings" in key)
    assert 0.5 < table.std() / frames.std() < 2
