"""Nothing that a captions file says is lost on the way: random files, of which it is known what went in, and one test
for each way in which captions once got lost."""

from __future__ import annotations

import json
import random
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from shards import ShardError
from shards.annotations import Counts, Reading
from tests.shards.annotations.reading import notes, texts, videos, write
from tests.shards.sets import reading

FILES = ("v1.mp4", "v2.mp4", "sub/v3.MKV", "a b.webm", "d.e.mp4", "two.mp4", "two.mkv", "caf\u00e9.mp4", "re\u0301el.mov", "noext", "x.dat", "anim.gif")  # fmt: skip
GONE = ("gone1.mp4", "sub/gone 2.avi", "gone3", "V1.mp4")
WORDS = ("a", "man", "runs", "6\"", "\"go\"", "\u00fcber", "\u9577\u3044", "it's", "\U0001f600", "x,y", ";", "\t", "\\n", "''", "caf\u00e9 au lait", ",", "1.5")  # fmt: skip


@dataclass
class Made:
    """A captions file, and the captions in it by (file, id), in order. `fault`: what the reader may refuse it for."""

    path: Path
    pairs: dict[tuple[str, str | None], list[str]] = field(default_factory=dict)
    fault: str = ""

    def add(self, file: str, text: str, id: str | None = None) -> None:
        self.pairs.setdefault((file, id), []).append(text.strip())


def sentence(dice: random.Random, ends: tuple[str, ...] = ()) -> str:
    if dice.random() < 0.05:
        return dice.choice(("", "  "))
    words = [dice.choice(WORDS) for _ in range(dice.randint(1, 6))]
    if ends and dice.random() < 0.2:
        words.insert(dice.randint(0, len(words)), dice.choice(ends))
    return " ".join(words)


def spelled(dice: random.Random, root: Path, file: str) -> str:
    """One of the names that stand for this file."""
    name = file
    stem, _, extension = file.rpartition(".")
    if stem and extension in ("mp4", "MKV", "webm", "mov", "gif") and stem != "two" and file not in GONE:
        name = dice.choice((file, stem))
    name = unicodedata.normalize(dice.choice(("NFC", "NFD")), name)
    folder, _, last = name.rpartition("/")
    return dice.choice((
        name, name, f"./{name}", f"{folder}//{last}" if folder else f".//{last}", f"other/../{name}", f"{root}/{name}",
    ))  # fmt: skip


def cell(dice: random.Random, text: str, separator: str) -> str:
    quoted = text.startswith('"') or any(c in text for c in (separator, "\n", "\r")) or dice.random() < 0.2
    return '"' + text.replace('"', '""') + '"' if quoted else text


def make_csv(dice: random.Random, root: Path, path: Path) -> Made:
    made = Made(path)
    separator, end = dice.choice(",;\t"), dice.choice(("\n", "\r\n", "\r"))
    columns = ["video", "caption", "start", "end"][: dice.choice((2, 2, 4))]
    dice.shuffle(columns)
    lines = [separator.join(dice.choice((c, c.title(), f" {c.upper()} ")) for c in columns)]
    files = [FILES[0], *dice.choices((*FILES, *GONE), k=dice.randint(1, 12))]
    dice.shuffle(files)
    for file in files:
        text = sentence(dice, ("\n", "\r\n", "\n\n"))
        row = {"video": spelled(dice, root, file), "caption": text, "start": "", "end": dice.choice(("", "2.5"))}
        cells = {name: cell(dice, value, separator) for name, value in row.items()}
        if dice.random() < 0.03:
            made.fault = dice.choice(("quote", "tail", "short", "separator", "nul"))
            plain = re.sub(r'[\r\n",;\t]', "", text) or "x"
            text, cells["caption"] = {
                "quote": (f'"{plain}', f'"{plain}'),
                "tail": (f'"{plain}" more', f'"{plain}" more'),
                "short": ("", None),
                "separator": (f"{plain}{separator}b", f"{plain}{separator}b"),
                "nul": (f"{plain}\0", f"{plain}\0"),
            }[made.fault]
        made.add(file, text)
        lines.append(separator.join(cells[c] for c in columns if cells[c] is not None))
        if dice.random() < 0.1:
            lines.append("")
    save(dice, made, end.join(lines) + dice.choice(("", end)))
    return made


def make_jsonl(dice: random.Random, root: Path, path: Path) -> Made:
    made = Made(path)
    lines = []
    files = [FILES[0], *dice.choices((*FILES, *GONE), k=dice.randint(1, 12))]
    for file in files:
        said = [sentence(dice, ("\n", "\r")) for _ in range(dice.randint(1, 3))]
        row: dict = {"video": spelled(dice, root, file)}
        id = f"{FILES.index(file)}_cut" if file in FILES and dice.random() < 0.2 else None
        if id:
            row |= {"id": id, "cut": [1, 2]}
        if dice.random() < 0.5:
            row["caption"] = said[0]
        if len(said) > 1 or "caption" not in row:
            rest = said["caption" in row :]
            row["captions"] = [dice.choice((text, {"text": text, "end": 3})) for text in rest]
        if dice.random() < 0.02:
            made.fault = "typo"
            row = {("captoins" if key == "captions" else key): value for key, value in row.items()}
            row.setdefault("Caption", row.pop("caption", ""))
        line = json.dumps(row, ensure_ascii=dice.random() < 0.5)
        if dice.random() < 0.02:
            made.fault = "twice"
            line = line[:-1] + ', "captions": ["one more"], "captions": ["and more"]}'
            said += ["one more", "and more"]
        for text in said:
            made.add(file, text, id)
        lines.append(line)
    save(dice, made, dice.choice(("\n", "\r\n", "\n\n")).join(lines))
    return made


def save(dice: random.Random, made: Made, text: str) -> None:
    encoding = dice.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16"))
    data = text.encode(encoding)
    if "\u00fc" in text and dice.random() < 0.1:
        data, made.fault = text.encode("latin-1", errors="replace"), "latin-1"
    made.path.write_bytes(data)


def check(read: Reading, made: Made, root: Path) -> None:
    """That the items hold exactly what is in the file."""
    ids = {id for _, id in made.pairs if id}
    held = {}
    for item in read.items:
        file = unicodedata.normalize("NFC", str(item.path.relative_to(root)))
        key = file, item.id if item.id in ids else None
        assert key not in held, f"{key} is two items"
        held[key] = [caption.text for caption in item.captions]
    assert held == {(unicodedata.normalize("NFC", file), id): said for (file, id), said in made.pairs.items()}
    assert len({item.id for item in read.items}) == len(read.items)
    gone = [said for (file, _), said in made.pairs.items() if file in GONE]
    assert read.missing == Counts(len(gone), sum(map(len, gone)))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return videos(tmp_path / "videos", *FILES)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_random_captions_files_lose_nothing(tmp_path: Path, root: Path, kind: str) -> None:
    refused = {}
    for seed in range(170):
        dice = random.Random(f"{kind} {seed}")
        made = (make_csv if kind == "csv" else make_jsonl)(dice, root, tmp_path / f"{seed}.{kind}")
        try:
            read = reading("folder", root, "--captions", made.path)
        except ShardError as error:
            assert made.fault, f"{made.path} has no fault: {error}"
            assert re.search(rf"{seed}\.{kind}, line \d+", str(error)), error
            refused[made.fault] = refused.get(made.fault, 0) + 1
        else:
            check(read, made, root)
    assert refused.keys() >= {"csv": {"quote", "tail", "separator", "nul", "short"}, "jsonl": {"typo", "twice"}}[kind]


def test_random_captions_beside_videos_lose_nothing(tmp_path: Path) -> None:
    for seed in range(60):
        dice = random.Random(f"beside {seed}")
        root = videos(tmp_path / str(seed), *FILES)
        expected: dict[str, list[str]] = {}
        broken, packed, lone = set(), 0, dice.random() < 0.3
        for file in FILES:
            stem = str(Path(file).with_suffix(""))
            if stem == "two" or file in ("noext", "x.dat") or dice.random() < 0.2:
                expected[file] = []
                continue
            said = [sentence(dice) for _ in range(dice.randint(0, 4))]
            text = dice.choice(("\n", "\r\n", "\n\n", "\r")).join(said)
            suffix = dice.choice((".txt", ".txt", ".TXT", ".json"))
            if suffix == ".json":
                text = json.dumps(dice.choice((said, {"captions": said}, {"caption": said})))
            else:
                said = [line for line in said if line.strip()]
            data = text.encode(dice.choice(("utf-8", "utf-8-sig", "utf-16")))
            if "\u00fc" in text and dice.random() < 0.2 and packed:
                data = text.encode("latin-1", errors="replace")
                broken.add(file)
            (root / (unicodedata.normalize(dice.choice(("NFC", "NFD")), stem) + suffix)).write_bytes(data)
            expected[file] = [text.strip() for text in said]
            packed += 1
        if lone:
            write(root / "lone.txt", "of no video")
        read = reading("folder", root)
        held = {str(item.path.relative_to(root)): item for item in read.items}
        assert held.keys() == expected.keys() - {"noext", "x.dat"} and len(held) == len(read.items)
        for file, item in held.items():
            if file in broken:
                assert re.search(r"line \d+: the text is not in UTF-8.*Save the file as UTF-8", item.problem)
            else:
                assert ([c.text for c in item.captions], item.problem) == (expected[file], "")
        assert any("'lone.txt'" in text for text in read.warnings) == lone
        assert read.missing == Counts(0, 0)


# ---- quotes ----


@pytest.fixture
def six(tmp_path: Path) -> Path:
    return videos(tmp_path / "six", *(f"v{n}.mp4" for n in range(1, 7)))


def table(root: Path, content: str | bytes, suffix: str = ".csv") -> Reading:
    path = root.parent / f"captions{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return reading("folder", root, "--captions", path)


QUOTED = (  # rows, and the number of the line to be named
    ('v1.mp4,first\nv2.mp4,"a 6 inch pipe\nv3.mp4,third\nv4.mp4,fourth\nv5.mp4,he said "go"\nv6.mp4,sixth\n', 3),
    ('v1.mp4,a 6" pipe\nv2.mp4,"quoted" then more\nv3.mp4,third\n', 3),
    ('v1.mp4,first\nv2.mp4,"a 6 inch pipe\nv3.mp4,third\n', 3),
    ('v1.mp4,first\n\nv2.mp4,"a 6 inch pipe\nv3.mp4,of 6"\n', 4),
    ('v1.mp4,"a 6 inch pipe\nv3,of 6"\n', 2),
    ('gone1,"a 6 inch pipe\ngone2,of 6"\nv1.mp4,x\n', 2),
)


@pytest.mark.parametrize(("rows", "line"), QUOTED)
def test_a_quote_that_is_not_closed_is_an_error_in_its_line(six: Path, rows: str, line: int) -> None:
    with pytest.raises(ShardError, match=rf"captions\.csv, line {line}: .*quote"):
        table(six, "video,caption\n" + rows)


def test_a_quote_that_is_not_closed_before_the_name(six: Path) -> None:
    with pytest.raises(ShardError, match=r"line 2: its quoted text runs on over the row of 'v1\.mp4'"):
        table(six, 'caption,video\n"a 6 inch pipe,v1.mp4\nof 6",v2.mp4\n')


def test_quotes_that_are_meant(six: Path) -> None:
    rows = (
        'v1,"two\nlines of, one text"\nv2,a 6" pipe\nv3,"he said ""go"""\nv4, "kept"\nv5,""\nv6,"one\n\nword,two\n"\n'
    )
    read = table(six, "video,caption\n" + rows)
    assert texts(read) == {
        "v1": ["two\nlines of, one text"], "v2": ['a 6" pipe'], "v3": ['he said "go"'], "v4": ['"kept"'], "v5": [""],
        "v6": ["one\n\nword,two"],
    }  # fmt: skip
    assert read.warnings == (
        "1 caption ('line 8') in captions.csv of several lines that look like rows: is a quote not closed?",
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("video,caption\nv1,a\nv2\n", "line 3: no cell for 'caption'"),
        ("video,caption\nv1,a\nv2,b\0\n", "line 3: it holds a NUL character"),
        ("video,caption\nv1,a\nv2,caf\u00e9\n".encode("latin-1"), "line 3: the text is not in UTF-8.*as CSV UTF-8"),
        ("video,caption,caption\nv1,a,b\n", "line 1: two columns are called 'caption'"),
        ("video,caption,\nv1,a man, running\n", "line 2: text in a column without a name"),
        ("video;caption\nv1;a;b\n", "line 2: more cells than the header has. Put a text with semicolons"),
        ("video,caption\nv1,a\n../v2.mp4,b\n", "line 3: the video name '../v2.mp4' leads out of"),
    ],
)
def test_what_would_lose_text_is_an_error_in_its_line(six: Path, content: str | bytes, words: str) -> None:
    with pytest.raises(ShardError, match=rf"captions\.csv, {words}"):
        table(six, content)


def test_long_cells_columns_that_are_not_used_and_duplicates(six: Path) -> None:
    long = "x" * 200_000
    read = table(six, f"\ufeff Video ;CAPTION;Language\nv1;{long};en\n;;\nv2;same;en\nv2;same;de\n")
    assert texts(read) == {"v1": [long], "v2": ["same", "same"]}
    assert notes(read) == ("1 name ('language') in captions.csv not used",)


# ---- names ----


def test_spellings_of_one_file_are_one_video(six: Path) -> None:
    videos(six, "sub/e\u0301.mp4")
    names = ["v1.mp4", "v1", "./v1.mp4", f"{six}/v1.mp4", "sub/../v1.mp4", "v2", "sub//\u00e9.mp4", "sub/e\u0301"]
    rows = "".join(f"{name},{n}\n" for n, name in enumerate(names))
    lines = "".join(json.dumps({"video": name, "caption": str(n)}) + "\n" for n, name in enumerate(names))
    for read in (table(six, f"video,caption\n{rows}"), table(six, lines, ".jsonl")):
        assert texts(read) == {"v1": ["0", "1", "2", "3", "4"], "v2": ["5"], "sub/\u00e9": ["6", "7"]}
        assert read.missing == Counts(0, 0) and not notes(read)
    cut = {"video": "v1", "id": "c", "cut": [1, 2], "caption": "x"}
    read = table(six, json.dumps(cut) + "\n" + json.dumps(cut | {"video": "./v1.mp4", "captions": ["y"]}), ".jsonl")
    assert [(i.id, [c.text for c in i.captions], i.start) for i in read.items] == [("c", ["x", "x", "y"], 1.0)]


def test_the_folder_before_the_name(tmp_path: Path, six: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    videos(six, "six/v1.mp4")
    (tmp_path / "link").symlink_to(six)
    write(tmp_path / "c.csv", f"video,caption\nsix/v2.mp4,a\nsix/v1.mp4,b\n{tmp_path}/link/v3.mp4,c\nsix/six/v1,d\n")
    read = reading("folder", "six", "--captions", "c.csv")
    assert [(str(i.path), len(i.captions)) for i in read.items] == [
        ("six/v2.mp4", 1), ("six/six/v1.mp4", 2), ("six/v3.mp4", 1),
    ]  # fmt: skip
    with pytest.raises(ShardError, match=r"line 2: the video name '/etc/v1\.mp4' leads out of"):
        table(six, "video,caption\n/etc/v1.mp4,x\n")


def test_names_that_are_almost_right_are_missing_and_a_note_says_so(six: Path) -> None:
    videos(six, "sub/deep.mp4")
    read = table(six, "video,caption\nv1,a\nV1.MP4,b\ndeep.mp4,c\nv2.avi,d\nnothing.mp4,e\n")
    assert read.missing == Counts(4, 4) and len(read.items) == 5
    assert notes(read) == ("3 videos ('V1.MP4', 'deep.mp4', …) not found. Did you mean 'v1.mp4', 'sub/deep.mp4', …?",)


def test_ids_stay_unique(tmp_path: Path) -> None:
    root = videos(tmp_path / "v", "a.mp4", "a.mkv", "a.mp4.mp4", "b.mp4")
    names = ("a.mp4", "a.mkv", "a.mp4.mp4", "b.mp4")
    read = table(root, "video,caption\n" + "".join(f"{name},x\n" for name in names))
    assert [item.id for item in read.items] == ["a.mp4", "a.mkv", "a.mp4.mp4", "b"]
    lines = [{"video": "b.mp4", "caption": "x"}, {"video": "a.mkv", "id": "b", "caption": "y"}]
    read = table(root, "\n".join(map(json.dumps, lines)), ".jsonl")
    assert [(item.id, item.path.name) for item in read.items] == [("b.mp4", "b.mp4"), ("b", "a.mkv")]
    lines[0]["video"] = "b"
    with pytest.raises(ShardError, match="two videos share the name 'b'"):
        table(root, "\n".join(map(json.dumps, lines)), ".jsonl")
    lines = [{"video": "b", "id": "x", "caption": "x"}, {"video": "a.mkv", "id": "x", "caption": "y"}]
    with pytest.raises(ShardError, match=r"line 2: the id 'x' is already that of 'b' \(.*line 1\)"):
        table(root, "\n".join(map(json.dumps, lines)), ".jsonl")


# ---- jsonl ----


def test_keys_of_a_jsonl(six: Path) -> None:
    for line, words in (
        ('{"video": "v1", "captoins": ["x"]}', "unknown key 'captoins'. Did you mean 'captions'"),
        ('{"video": "v1", "Caption": "x"}', "unknown key 'Caption'. Did you mean 'caption'"),
        ('{"video": "v1", "caption": "x", "caption": "y"}', "is not JSON .*the key 'caption' twice"),
        ('{"video": "v1", "caption": "x", "id": [1]}', "id must be a text"),
    ):
        with pytest.raises(ShardError, match=rf"captions\.jsonl, line 3:? {words}"):
            table(six, f'{{"video": "v2", "caption": "x"}}\n\n{line}\n', ".jsonl")
    both = {"video": "v1", "caption": "one", "captions": ["two", {"text": "three"}], "start": 1, "lang": "en"}
    read = table(six, json.dumps(both | {"meta": {"k": 1}}) + "\n" + json.dumps(both | {"meta": {"k": 2}}), ".jsonl")
    assert [(c.text, c.start) for c in read.items[0].captions][:3] == [("one", 1.0), ("two", 1.0), ("three", 1.0)]
    assert len(read.items[0].captions) == 6
    assert notes(read) == (
        "1 name ('lang') in captions.jsonl not used",
        "1 video ('v1') with several values of one meta key: the last is kept",
    )


# ---- files that are passed over ----


def test_gif_raw_video_and_no_extension(tmp_path: Path) -> None:
    root = videos(tmp_path / "in", "anim.gif", "noext", "raw.h264", "plain.mp4", "plain.gif", "notes", "half.mp4.part")
    for name in ("anim", "noext", "raw", "plain", "alone"):
        write(root / f"{name}.txt", f"of {name}")
    read = reading("folder", root)
    assert texts(read) == {"anim": ["of anim"], "plain": ["of plain"], "raw": ["of raw"]}
    assert read.warnings == (
        "1 file ('plain.gif') beside a video of the same name not packed",
        "2 files ('half.mp4.part', 'noext') not packed: the extension is not one of a video. Name such files in --captions "
        "to pack them",
        "1 caption file ('alone.txt') without a video of the same name beside",
    )
    read = table(root, "video,caption\nanim.gif,1\nplain.mp4,2\nnoext,3\nraw.h264,4\nplain.gif,5\n")
    assert [i.id for i in read.items] == ["anim", "plain.mp4", "noext", "raw", "plain.gif"]
    assert read.missing == Counts(0, 0) and not read.warnings


# ---- captions beside a video that cannot be read ----


def test_captions_that_cannot_be_read_are_the_problem_of_one_video(six: Path) -> None:
    for n, data in enumerate((b"a", "b".encode("utf-16"), b"caf\xe9", b"1\n2\0"), 1):
        (six / f"v{n}.txt").write_bytes(data)
    write(six / "v5.json", '{"captions": ["x"], "captions": ["y"]}')
    write(six / "v6.json", '{"captoin": "x"}')
    read = reading("folder", six)
    assert [[c.text for c in item.captions] for item in read.items] == [["a"], ["b"], [], [], [], []]
    problems = [item.problem.removeprefix(f"{six}/") for item in read.items]
    assert problems[:2] == ["", ""]
    for problem, words in zip(problems[2:], (
        r"v3\.txt, line 1: the text is not in UTF-8.*Save the file as UTF-8", r"v4\.txt, line 2: it holds a NUL character",
        r"v5\.json is not JSON .*'captions' twice", r"v6\.json: unknown key 'captoin'",
    ), strict=True):  # fmt: skip
        assert re.match(words, problem), problem
    assert read.missing == Counts(0, 0) and not read.warnings
    for n in (1, 2):
        (six / f"v{n}.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ShardError, match=r"no video has captions that can be read. First: .*v1\.txt, line 1"):
        reading("folder", six)
