"""What CLIP4Clip asks of text towers beyond open_clip: shorter captions than they were made for, and a feature of every word."""

from dataclasses import dataclass
from typing import Any

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import ResidualAttentionBlock, TextTransformer, text_global_pool
from torch import Tensor, nn


class WordTransformer(TextTransformer):
    """open_clip's text transformer, which also takes captions shorter than its context and gives word features.

    words: whether `forward` gives features of all words, [N, L, D], instead of one of the caption, [N, D].
    """

    words: bool

    def _embeds(self, text: Tensor) -> tuple[Tensor, Tensor | None]:
        x, mask = super()._embeds(text)
        if mask is not None and mask.dim() == 2:  # of the full context
            mask = mask[: x.shape[1], : x.shape[1]]
        return x, mask

    def forward(self, text: Tensor) -> Tensor:
        """int64 [N, L] -> [N, D], or with `words` [N, L, D]."""
        if not self.words:
            return super().forward(text)
        x, mask = self._embeds(text)
        x = self.transformer(x, attn_mask=mask)
        x = self.ln_final(x[:, : text.shape[1]])  # without CoCa's class token, which follows the words
        projection = self.text_projection
        if projection is None:
            return x
        return projection(x) if isinstance(projection, nn.Linear) else x @ projection


class WordEncoder(HFTextEncoder):
    """open_clip's adaptor of a Hugging Face text model, which also gives word features. words: see WordTransformer."""

    words: bool

    def forward(self, x: Tensor) -> Tensor:
        """int64 [N, L] -> [N, D], or with `words` [N, L, D]."""
        mask = (x != self.config.pad_token_id).long()
        # transformers looks whether a mask masks anything, which cannot be told on the meta device, where c4c counts
        out = self.transformer(input_ids=x, attention_mask=None if x.is_meta else mask)
        return self.proj(out.last_hidden_state if self.words else self.pooler(out, mask))


def give_words(text: Any) -> None:
    """Make of a text tower one that can give word features, in place; it gives caption features until it is asked."""
    text.__class__ = WordEncoder if isinstance(text, HFTextEncoder) else WordTransformer
    text.words = False


def caption_features(clip: Any, tokens: Tensor, words: bool) -> Tensor:
    """int64 [N, L], L up to the context length -> features of captions [N, D], or with `words` of all their tokens [N, L, D].

    A text tower that is a module of its own gives words once its `words` is set (see `give_words`).
    """
    if hasattr(clip, "text"):
        return clip.text(tokens)
    length, dtype = tokens.shape[1], clip.token_embedding.weight.dtype
    x = clip.token_embedding(tokens) + clip.positional_embedding[:length].to(dtype)
    mask = None if clip.attn_mask is None else clip.attn_mask[:length, :length].to(dtype)
    x = clip.ln_final(clip.transformer(x, attn_mask=mask))
    if not words:
        x = text_global_pool(x, tokens, clip.text_pool_type, clip.text_eos_id)
    projection = clip.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection


@dataclass(frozen=True)
class TextStart:
    """What a head may start from: a text tower's blocks, in CLIP's layout, and its position embeddings [L, D]."""

    blocks: list[ResidualAttentionBlock]
    positions: nn.Parameter


def text_start(clip: Any, width: int) -> TextStart | str:
    """The blocks and positions of a text tower for a head of features `width` wide, or why it has none to offer."""
    text = getattr(clip, "text", clip)
    if isinstance(text, HFTextEncoder):
        return "its text tower is a Hugging Face model, whose blocks are not CLIP's"
    blocks = list(text.transformer.resblocks)
    if len(text.positional_embedding[0]) != width:
        return f"its text tower is {len(text.positional_embedding[0])} wide, and its features are {width}"
    if not all(isinstance(block, ResidualAttentionBlock) and isinstance(block.ls_1, nn.Identity) for block in blocks):
        return "the blocks of its text tower are not CLIP's"
    if blocks and blocks[0].mlp.c_fc.out_features != 4 * width:
        return "the MLPs of its text tower are not four times as wide as its features"
    return TextStart(blocks, text.positional_embedding)


def inside_captions(tokens: Tensor, pad: int | None, pad_ends: bool) -> Tensor:
    """Bool [N, L]: which tokens of captions [N, L] are not padding.

    pad: the id that fills captions up; None: CLIP's tokenizer, whose end token has the highest id. pad_ends: captions end with
    that id as well, which counts once.
    """
    if pad is None:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return places <= tokens.argmax(dim=-1, keepdim=True)
    padding = tokens == pad
    if pad_ends:
        padding &= padding.cumsum(dim=1) > 1
    return ~padding
