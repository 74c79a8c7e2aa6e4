"""Which sentences are told that the text tower was not made for them."""

import pytest

from c4c.retrieval.search.query import choose_queries, clean, foreign, note
from pipelines.tokens import CLIPS, Tokenizer
from tests import vocabularies

pytestmark = pytest.mark.slow  # imports open_clip
FOREIGN = {
    "собака ловит фрисби": ["Cyrillic"], "一只狗": ["Chinese"], "犬がフリスビーを": ["Chinese", "Japanese"], "개가 원반을": ["Korean"], "كلب": ["Arabic"],
    "ένας σκύλος": ["Greek"], "कुत्ता": ["Devanagari"], "a dog in Москва и Тула": ["Cyrillic"],
}  # fmt: skip
FAMILIAR = [
    "a dog catches a frisbee",
    "un chien attrape un frisbee à l'été",
    "Ｆｕｌｌ ｗｉｄｔｈ",
    "𝔞 𝔡𝔬𝔤",
    "3 + 4 = 7",
    "🐕",
    "the α particle in a cloud chamber",
]


class Vocabulary(Tokenizer):
    """A tokenizer with these pieces."""

    def __init__(self, pieces: list[str]):
        super().__init__()
        self._pieces = pieces

    def vocabulary(self) -> list[str]:
        return self._pieces


def test_clips_tokenizer_is_of_latin_letters():
    for sentence, scripts in FOREIGN.items():
        assert foreign(sentence, Tokenizer()) == scripts
        assert scripts[0] in note(sentence, Tokenizer(), 77) and "not trained on" in note(sentence, Tokenizer(), 77)
    for sentence in FAMILIAR:
        assert foreign(sentence, Tokenizer()) == []


def test_a_vocabulary_tells_which_scripts_it_is_of():
    english = Vocabulary([f"word{i}" for i in range(980)] + ["собака"] * 20)
    chinese = Vocabulary([f"word{i}" for i in range(700)] + ["狗"] * 300)
    every = Vocabulary([f"word{i}" for i in range(100_000)])
    assert foreign("собака", english) == ["Cyrillic"]
    assert foreign("一只狗", chinese) == [] and foreign("собака", chinese) == ["Cyrillic"]
    assert all(foreign(sentence, every) == [] for sentence in FOREIGN)


def test_of_a_real_tokenizer(tmp_path):
    about = CLIPS | {"kind": "hf", "name": vocabularies.xlm(tmp_path)}
    tokenizer = Tokenizer(about)
    assert tokenizer.vocabulary() and Tokenizer().vocabulary() is None
    assert note("a dog", tokenizer, 77) == ""


def test_a_sentence_that_is_cut():
    assert note("a dog", Tokenizer(), 77) == ""
    assert (
        note("dog " * 200, Tokenizer(), 77)
        == "the query has 202 tokens, and the model reads the first 77: the rest does not count"
    )
    assert "202 tokens" in note("dog " * 200, Tokenizer(), 32) and note("dog " * 30, Tokenizer(), 32) == ""
    both = note("пёс " * 100, Tokenizer(), 77)
    assert "Cyrillic" in both and "does not count" in both


@pytest.mark.parametrize("sentence", ["", " ", "\t\n  ", "\x00\x01", "\u200b", "\ud800", "\u00a0"])
def test_nothing_is_refused(sentence):
    with pytest.raises(ValueError, match="is empty"):
        clean(sentence)


def test_what_is_cleaned():
    assert clean("  a\tdog\x00catches\n\na \ud800 frisbee ") == "a dog catches a frisbee"
    assert clean("?") == "?" and clean("🐕") == "🐕"
    assert clean("ab " * 3333) == ("ab " * 3333).strip()
    with pytest.raises(ValueError, match="100001 characters"):
        clean("x" * 100_001)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_file_of_queries_in_what_windows_calls_unicode(encoding, tmp_path):
    file = tmp_path / "queries.txt"
    file.write_bytes("a dog\r\n\r\nzwei Hünde\r\n".encode(encoding))
    assert [query.text for query in choose_queries([], str(file))] == ["a dog", "zwei Hünde"]
    file.write_bytes(b"\xff\xfea")
    with pytest.raises(ValueError, match=r"is not UTF-16 text \(byte 2\): save it as UTF-8"):
        choose_queries([], str(file))
