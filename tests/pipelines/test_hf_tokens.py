"""Captions by tokenizers of Hugging Face: the rows that open_clip makes, cut and padded as the text tower was trained."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from pipelines.tokens import CLIPS, Tokenizer
from tests import vocabularies
from tests.vocabularies import TEXTS

KINDS: dict[str, tuple[Callable[[Path], str], dict, str | None]] = {  # vocabulary, tokenizer_kwargs, tokenizer_mode
    "bert": (vocabularies.wordpiece, {}, None),
    "CLIPA": (vocabularies.wordpiece, {"strip_sep_token": True}, None),
    "mT5": (vocabularies.sentencepiece, {}, None),
    "SigLIP2": (vocabularies.sentencepiece, {"clean": "canonicalize"}, None),
    "SigLIP": (lambda f: vocabularies.sentencepiece(f, pads_with_end=True), {"clean": "canonicalize"}, None),
    "worldwide": (vocabularies.xlm, {}, None),
    "NLLB": (vocabularies.nllb, {}, None),
    "lower case": (vocabularies.xlm, {"clean": "lower"}, None),
    "clips": (vocabularies.for_clips, {}, "clips"),
    "in front": (vocabularies.padded_in_front, {}, None),
}
CONTEXT = 24


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What describes a tokenizer, and open_clip's own."""

    def make(kind: str, fixed: bool = False) -> tuple[dict, HFTokenizer]:
        vocabulary, kwargs, mode = KINDS[kind]
        folder = vocabulary(tmp_path_factory.mktemp("vocabulary"))
        about = {"kind": "hf", "name": folder, "context_length": CONTEXT, "kwargs": kwargs, "mode": mode}
        theirs = HFTokenizer(folder, context_length=CONTEXT, tokenizer_mode=mode, **kwargs)
        return about | {"fixed_length": fixed}, theirs

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_the_full_length_are_open_clips(made, kind):
    about, theirs = made(kind)
    ours = Tokenizer(about)
    expected = theirs(TEXTS)
    assert len({tuple(row) for row in expected.tolist()}) > 6, "the vocabulary tells the captions apart"
    for _ in range(2):  # made, and remembered
        rows = ours(TEXTS, CONTEXT)
        assert rows.dtype == torch.int64 and torch.equal(rows, expected)
    order = [5, 0, 5, 1]
    assert torch.equal(ours([TEXTS[i] for i in order], CONTEXT), expected[order])
    assert ours.name == f"{about['name']}'s tokenizer"
    assert ours([], CONTEXT).shape == (0, CONTEXT)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"clips"}))
def test_cut_rows_are_open_clips_with_padding_where_the_tower_wants_it(made, kind, fixed):
    about, theirs = made(kind, fixed)
    ours, front = Tokenizer(about), kind == "in front"
    for limit in (3, 10):
        cut, rows = theirs(TEXTS, context_length=limit), ours(TEXTS, limit)
        assert rows.shape[1] == ours.length(limit) == (CONTEXT if fixed or front else limit)
        words, padding = (rows[:, -limit:], rows[:, :-limit]) if front else (rows[:, :limit], rows[:, limit:])
        assert torch.equal(words, cut) and (padding == ours.pad_id).all()
    fits = "a dog"
    limit = ours.count(fits)
    assert 3 <= limit < 15
    if fixed or front:
        assert torch.equal(ours([fits], limit), theirs([fits])), "as without a limit"


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_counted_before_they_are_cut(made, kind):
    about, theirs = made(kind)
    ours, most = Tokenizer(about), 2000
    behind = 1 if kind == "clips" else 0  # the class token behind the padding

    def row(text: str, length: int) -> list[int]:
        tokens = theirs([text], context_length=length)[0].tolist()
        return tokens[::-1] if kind == "in front" else tokens[: length - behind]

    for text in TEXTS:
        n, whole = ours.count(text), row(text, most)
        words = n - behind
        assert row(text, n) == whole[:words] and set(whole[words:]) == {ours.pad_id}, "nothing is cut"
        if n > 3:
            assert row(text, n - 1) != whole[: words - 1], "something is"


def test_clips_own_tokenizer_with_another_cleaning():
    ours = Tokenizer(CLIPS | {"kwargs": {"clean": "canonicalize"}})
    theirs = SimpleTokenizer(clean="canonicalize")
    assert torch.equal(ours(TEXTS, 20), theirs(TEXTS, context_length=20))
    assert [ours.count(text) for text in TEXTS] == [2 + len(theirs.encode(text)) for text in TEXTS]
    padded = Tokenizer(CLIPS | {"fixed_length": True})
    rows = padded(TEXTS, 20)
    assert torch.equal(rows[:, :20], Tokenizer()(TEXTS, 20)) and rows.shape[1] == 77 and not rows[:, 20:].any()


def test_threads_take_turns(made):
    about, theirs = made("bert")
    texts = [f"a dog catches frisbee {i} of {i * i}" for i in range(400)]
    expected = theirs(texts)
    ours = Tokenizer(about)

    def part(i: int) -> torch.Tensor:
        [ours.count(text) for text in texts[i::8]]
        return torch.cat([ours(texts[i::8][j : j + 4], CONTEXT) for j in range(0, 50, 4)])

    with ThreadPoolExecutor(8) as pool:
        for i, rows in enumerate(pool.map(part, range(8))):
            assert torch.equal(rows, expected[i::8])


def test_no_row_is_padding_alone(made):
    for kind in KINDS:
        about, _ = made(kind, fixed=True)
        ours = Tokenizer(about)
        row = ours.missing(CONTEXT)
        assert row.shape == (CONTEXT,) and (row != ours.pad_id).any()
    assert not Tokenizer().missing(12).any(), "as CLIP's rows without a caption have always been"


def test_files_that_are_kept_are_read_instead(made, tmp_path):
    about, theirs = made("SigLIP2")
    Tokenizer(about).save(tmp_path / "kept")
    Path(about["name"]).rename(tmp_path / "gone")
    kept = Tokenizer(about | {"files": str(tmp_path / "kept")})
    assert torch.equal(kept(TEXTS, CONTEXT), theirs(TEXTS))
    assert kept.name == f"{about['name']}'s tokenizer"
    Tokenizer().save(tmp_path / "clips")
    assert not (tmp_path / "clips").exists(), "CLIP's comes with open_clip"


# ---- refusals ----


def refusal(**about) -> str:
    with pytest.raises(ValueError) as caught:
        Tokenizer({"kind": "hf", **about})
    return str(caught.value)


def test_a_tokenizer_that_is_not_here_says_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = refusal(name="google/mt5-nowhere")
    assert text.startswith("the tokenizer google/mt5-nowhere cannot be had (") and "\n" not in text
    assert "`hf download google/mt5-nowhere " in text and "local-dir:FOLDER" in text
    assert refusal(name=f"{tmp_path}/no", hub="google/mt5-base") == (
        f"the tokenizer {tmp_path}/no cannot be had (there is no such folder): the files of google/mt5-base belong there, as "
        "open_clip takes the tokenizer of a local-dir: backbone from its folder: tokenizer.json, tokenizer_config.json, and "
        "spiece.model, vocab.txt or the like where the hub has one"
    )
    assert "cannot be had (the folder has none): the files belong there" in refusal(name=str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    assert f"the tokenizer {tmp_path} cannot be had (" in refusal(name=str(tmp_path))


def test_a_vocabulary_without_padding_is_refused(tmp_path):
    assert "(it has no token for padding)" in refusal(name=vocabularies.without_padding(tmp_path))


def test_limits_that_a_text_tower_cannot_take_are_refused(made):
    clips = Tokenizer(made("clips")[0])
    with pytest.raises(ValueError, match=r"cannot be cut shorter. Set data.max_words=24$"):
        clips(["a dog"], 12)
    fixed = Tokenizer(made("SigLIP", fixed=True)[0])
    with pytest.raises(ValueError, match=r"data.max_words=25 is longer than the 24 tokens"):
        fixed.length(25)


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"kwargs": {"reduction_mask": "shuffle"}}, "draws at random"),
        ({"kwargs": {"cleen": "lower"}}, "cannot be made with {'cleen': 'lower'}"),
        ({"kwargs": {"clean": "upper"}}, "cannot be made with {'clean': 'upper'}"),
        ({"kind": "hf", "name": "a/b", "kwargs": {"trust_remote_code": True}}, "runs code from the hub"),
        ({"kind": "spm"}, "must be clip or hf; got 'spm'"),
    ],
)
def test_settings_that_no_tokenizer_takes_are_refused(about, said):
    with pytest.raises(ValueError) as caught:
        Tokenizer(about)
    assert said in str(caught.value)
