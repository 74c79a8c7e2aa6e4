"""The attention of training on a GPU: the same numbers as torch's module, and no copies on the way."""

import pytest
import torch
from open_clip.transformer import ResidualAttentionBlock
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from c4c.models.attention import DirectAttention, attend_directly
from c4c.models.clip4clip import CLIP4Clip, build
from c4c.models.lora import CallingAttention, LoraAttention
from c4c.settings import ModelConfig, TrainConfig
from c4c.training.param_groups import choose_trained

N, L, D, HEADS_OF_A_BLOCK, FRAMES = 3, 5, 32, 4, 3


def block() -> ResidualAttentionBlock:
    torch.manual_seed(0)
    made = ResidualAttentionBlock(D, HEADS_OF_A_BLOCK)
    nn.init.normal_(made.attn.in_proj_bias), nn.init.normal_(made.attn.out_proj.bias)
    return made


def masks() -> dict[str, torch.Tensor | None]:
    causal = torch.full((L, L), float("-inf")).triu(1)
    return {"none": None, "causal": causal, "of each head": causal.expand(N * HEADS_OF_A_BLOCK, L, L)}


@pytest.mark.parametrize("mask", masks())
def test_outputs_and_gradients_are_those_of_torchs_module(mask):
    plain, direct, x = block(), block(), torch.randn(N, L, D)
    attend_directly(direct)
    assert type(direct.attn) is DirectAttention and type(plain.attn) is nn.MultiheadAttention
    assert plain.state_dict().keys() == direct.state_dict().keys()
    made = []
    for one in (plain, direct):
        given = x.clone().requires_grad_()
        out = one(given, attn_mask=masks()[mask])
        out.square().sum().backward()
        made.append([out, given.grad, *(weight.grad for weight in one.parameters())])
    for theirs, ours in zip(*made, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("mask", masks())
def test_a_gpu_comes_to_the_same_in_bf16(mask):
    plain, direct = (block().to("cuda", torch.bfloat16) for _ in range(2))
    attend_directly(direct)
    given = masks()[mask]
    x, bias = torch.randn(N, L, D, device="cuda", dtype=torch.bfloat16), None if given is None else given.cuda()
    made = []
    for one in (plain, direct):
        out = one(x, attn_mask=bias)
        out.float().square().sum().backward()
        made.append([out, *(weight.grad for weight in one.parameters())])
    for theirs, ours in zip(*made, strict=True):
        assert (ours.float() - theirs.float()).norm() < 0.02 * theirs.float().norm()


def test_other_keys_than_queries():
    """As CoCa's blocks have them."""
    plain, direct, x, other = block(), block(), torch.randn(N, L, D), torch.randn(N, L + 2, D)
    attend_directly(direct)
    torch.testing.assert_close(direct(x, other, other), plain(x, other, other), rtol=1e-5, atol=1e-5)


class Passes(TorchDispatchMode):
    """What is computed or copied beside products of matrices."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("clone", "copy_", "_to_copy", "add", "add_", "cat", "stack", "contiguous"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_nothing_is_copied_on_the_way(monkeypatch):
    """Before the kernel of attention and behind it, which takes queries, keys and values where they lie."""
    given = []

    def kernel(q, k, v, *_):
        given.append((q, k, v))
        return torch.empty(N, L, HEADS_OF_A_BLOCK, D // HEADS_OF_A_BLOCK).transpose(1, 2)  # as flash attention lays it

    monkeypatch.setattr(functional, "scaled_dot_product_attention", kernel)
    found = {}
    for name in ("torch's", "direct"):
        one = block().attn
        if name == "direct":
            one.__class__ = DirectAttention
        x = torch.randn(N, L, D)
        with Passes() as passes:
            one(x, x, x, need_weights=False)
        found[name] = passes.seen
    assert found["direct"] == [] and found["torch's"]
    q, k, v = given[-1]
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert {x.stride(-1) for x in (q, k, v)} == {1} and {x.shape for x in (q, k, v)} == {
        (N, HEADS_OF_A_BLOCK, L, D // HEADS_OF_A_BLOCK)
    }


def model_of(head: str = "meanP", **more) -> CLIP4Clip:
    torch.manual_seed(0)
    return build(ModelConfig(backbone="ViT-demo-16", init_from="scratch", head=head, **more), FRAMES)


@pytest.mark.parametrize("head", ["meanP", "seqTransf", "tightTransf"])
def test_a_model_scores_the_same(head):
    plain, direct = model_of(head), model_of(head)
    attend_directly(direct)
    assert any(isinstance(module, DirectAttention) for module in direct.modules())
    assert not any(type(module) is nn.MultiheadAttention for module in direct.modules())
    frames, mask = torch.randn(2, FRAMES, 3, 64, 64), torch.tensor([[True, True, False], [True] * 3])
    tokens = torch.randint(1, 49407, (2, 12))
    made = []
    for model in (plain, direct):
        text, video = model(frames, mask, tokens)
        made.append(model.head.score(text, video))
    torch.testing.assert_close(made[1], made[0], rtol=1e-4, atol=1e-4)


def test_attention_of_another_kind_stays():
    lora, merging = model_of(), model_of(merge=2)
    choose_trained(lora, TrainConfig(lora=4))
    for model, kind in ((lora, LoraAttention), (merging, CallingAttention)):
        before = [type(module) for module in model.clip.visual.modules()]
        attend_directly(model)
        assert [type(module) for module in model.clip.visual.modules()] == before and kind in before
