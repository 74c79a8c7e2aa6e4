"""Small Hugging Face tokenizers of the kinds that open_clip's text towers have, trained on a few sentences and saved to a folder."""

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import NllbTokenizer, PreTrainedTokenizerFast

_WORDS = [
    "a",
    "the",
    "two",
    "man",
    "woman",
    "dog",
    "cat",
    "is",
    "are",
    "plays",
    "catching",
    "frisbee",
    "in",
    "on",
    "snow",
    "street",
    "car",
    "café",
    "música",
    "滑雪",
    "狗",
]
TEXTS = [
    "a dog catches a frisbee",
    "",
    "Two  DOGS\t play\n in the   snow!",
    "salt &amp;amp; pepper &lt;3 caf\u00e9",
    "the l\u00c3\u00a9gende, mis-decoded",
    "someone explains " + "the very long " * 60 + "recipe",
    "\u4e00\u4e2a\u4eba \U0001f600 \u0000 \ufeff",
    "?!",
    "it's <s> not </s> [CLS] a [PAD] mark <unk>",
]


def _sentences() -> list[str]:
    rng = random.Random(5)
    return [*TEXTS, *(" ".join(rng.choices(_WORDS, k=9)) for _ in range(100))]


def _unigram(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    unknown = next(token for token in special if "unk" in token)
    tokenizer.train_from_iterator(
        _sentences(), trainers.UnigramTrainer(vocab_size=150, special_tokens=special, unk_token=unknown)
    )
    return tokenizer


def _ends(tokenizer: Tokenizer, single: str) -> None:
    ids = [(token, tokenizer.token_to_id(token)) for token in single.split() if token != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)


def wordpiece(folder: Path) -> str:
    """As BERT's, which CLIPA takes: [CLS] … [SEP], padding 0."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(_sentences(), trainers.WordPieceTrainer(vocab_size=150, special_tokens=special))
    _ends(tokenizer, "[CLS] $A [SEP]")
    return _saved(tokenizer, folder, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


def sentencepiece(folder: Path, pads_with_end: bool = False) -> str:
    """As mT5's (padding 0) and Gemma's, or as SigLIP's, which pads with the end token: no start, end 1."""
    tokenizer = _unigram(["<pad>", "</s>", "<unk>"])
    _ends(tokenizer, "$A </s>")
    return _saved(
        tokenizer, folder, pad_token="</s>" if pads_with_end else "<pad>", eos_token="</s>", unk_token="<unk>"
    )


def xlm(folder: Path) -> str:
    """As XLM-V's, which the worldwide models take: <s> … </s>, padding 1, end 2."""
    tokenizer = _unigram(["<s>", "<pad>", "</s>", "<unk>"])
    _ends(tokenizer, "<s> $A </s>")
    return _saved(tokenizer, folder, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def nllb(folder: Path) -> str:
    """NLLB's own class, which sets the language before a caption: LANGUAGE … </s>, padding 1."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(_sentences(), trainers.BpeTrainer(vocab_size=200, special_tokens=special))
    model = json.loads(tokenizer.to_str())["model"]
    merges: Any = [tuple(pair) for pair in model["merges"]]  # as it wants them, whatever its types say
    NllbTokenizer(vocab=model["vocab"], merges=merges).save_pretrained(folder)
    return str(folder)


def for_clips(folder: Path) -> str:
    """With what tokenizer_mode=clips puts around a caption: a start, an end, and a class token behind the padding."""
    tokenizer = _unigram(["<pad>", "<s>", "</s>", "<unk>", "<cls>"])
    return _saved(
        tokenizer, folder, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", cls_token="<cls>"
    )


def padded_in_front(folder: Path) -> str:
    """With its padding in front of the words."""
    tokenizer = _unigram(["<pad>", "</s>", "<unk>"])
    _ends(tokenizer, "$A </s>")
    return _saved(tokenizer, folder, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="left")


def without_padding(folder: Path) -> str:
    """With no token for padding."""
    return _saved(_unigram(["<unk>"]), folder, unk_token="<unk>")


def _saved(tokenizer: Tokenizer, folder: Path, **special: str) -> str:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return str(folder)
