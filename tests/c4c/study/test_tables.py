"""What the CSV and Markdown files hold, read back as other programs read them."""

import csv
import re

import numpy as np
import pytest

from c4c.study.config import StudyTable
from c4c.study.findings import findings_of
from c4c.study.markdown import clear_best, duration_text, escaped
from c4c.study.published import PublishedRow
from c4c.study.results import RowResult, SeedResult, StudyResult, TableResult
from c4c.study.tables import write_csv, write_markdown
from tests.c4c.study.folders import row_result, study_of, with_comparisons


def result_of(rows: list[RowResult], tmp_path, title="Frames", about=None) -> StudyResult:
    table = StudyTable("frames", title, "About it.", tuple(row.row for row in rows), ())
    rows = with_comparisons(rows)
    return StudyResult(study_of([table], tmp_path), (TableResult(table, tuple(rows), findings_of(rows)),), about or {})


def rows() -> list[RowResult]:
    return [
        row_result(
            "1", [10.0, 11.0, 12.0], baseline="12", settings={"data.num_frames": 1}, wall_s=60.0, memory_gib=2.0
        ),
        row_result("6", [30.0, None, 31.0], baseline="12", settings={"data.num_frames": 6}, clips_per_s=40.0),
        row_result("12", [30.5, 31.0, 31.0], settings={"data.num_frames": 12}),
    ]


def read(path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_csv_holds_means_and_comparisons(tmp_path):
    write_csv(tmp_path / "study.csv", result_of(rows(), tmp_path))
    one, six, twelve = read(tmp_path / "study.csv")
    assert (one["row"], one["baseline"], one["n_seeds"], one["n_seeds_planned"]) == ("1", "12", "3", "3")
    assert (one["t2v_R1_mean"], one["t2v_R1_sd"], one["wall_s_mean"], one["clips_per_s_mean"]) == (
        "11.0",
        "1.0",
        "60.0",
        "",
    )
    differences = np.array([10.0, 11.0, 12.0]) - [30.5, 31.0, 31.0]
    assert float(one["t2v_R1_diff"]) == pytest.approx(differences.mean(), abs=1e-6)
    assert float(one["t2v_R1_diff_low"]) < differences.mean() < float(one["t2v_R1_diff_high"])
    assert float(one["t2v_R1_p_seeds"]) < 0.01
    assert (one["t2v_R1_p_texts"], one["v2t_R1_mean"], one["t2v_R1_diff_n"]) == ("", "", "3")
    assert (six["n_seeds"], six["failures"]) == ("2", "seed 1 failed: out of memory")
    assert (twelve["t2v_R1_diff"], twelve["command"]) == ("", "python launch/train.py 12")


def test_cells_csv_has_a_line_a_seed(tmp_path):
    write_csv(tmp_path / "study.csv", result_of(rows(), tmp_path))
    lines = read(tmp_path / "study_cells.csv")
    assert [(line["row"], line["seed"], line["state"], line["t2v_R1"]) for line in lines[2:5]] == [
        ("1", "2", "done", "12.0"), ("6", "0", "done", "30.0"), ("6", "1", "failed", ""),
    ]  # fmt: skip
    assert lines[4]["error"] == "out of memory"


def test_csv_is_rfc_4180(tmp_path):
    title = 'A, "quoted"\ntitle'
    write_csv(tmp_path / "study.csv", result_of(rows(), tmp_path, title=title))
    data = (tmp_path / "study.csv").read_bytes()
    assert data.count(b"\r\n") == 4  # records end so, and only they
    assert data.count(b'"A, ""quoted""\ntitle"') == 3
    first = read(tmp_path / "study.csv")[0]
    assert first["title"] == title
    assert float(first["t2v_R1_diff"]) < 0  # a negative number is no formula


@pytest.mark.parametrize("label", ["=1+1", "+cmd|'/c calc'!A0", "-x", "@SUM(1)", "\t=1", "\r=1"])
def test_no_field_is_a_formula(tmp_path, label):
    failed = SeedResult(1, "failed", label, tmp_path / "x")
    made = row_result(label, [1.0], group=label)
    made = RowResult(made.row, (*made.seeds, failed), label, (PublishedRow(label, {"t2v_R1": 43.1}, "source", ""),))
    write_csv(tmp_path / "study.csv", result_of([made], tmp_path, title=label))
    for name in ("study.csv", "study_cells.csv"):
        for line in read(tmp_path / name):
            assert not [text for text in line.values() if re.match(r"[=+\-@\t\r]", text) and not is_number(text)]
    assert read(tmp_path / "study.csv")[0]["row"] == f"'{label}"


def is_number(text: str) -> bool:
    try:
        return bool(float(text) + 1)
    except ValueError:
        return False


def test_a_number_as_a_label_stays_one(tmp_path):
    write_csv(tmp_path / "study.csv", result_of([row_result("-1", [1.0]), row_result("+1e-5", [1.0])], tmp_path))
    assert [line["row"] for line in read(tmp_path / "study.csv")] == ["-1", "+1e-5"]


def test_published_numbers_have_columns_and_a_source(tmp_path):
    one = PublishedRow("CLIP4Clip meanP", {"t2v_R1": 43.1, "v2t_R1": 43.1}, "arXiv:2104.08860", "fp16.")
    made = row_result("12", [42.0, 42.5])
    made = RowResult(made.row, made.seeds, made.command, (one,))
    result = result_of([made, row_result("6", [None])], tmp_path)
    write_csv(tmp_path / "study.csv", result)
    first, second = read(tmp_path / "study.csv")
    assert (first["published_t2v_R1"], first["published_t2v_R5"], second["published_t2v_R1"]) == ("43.1", "", "")
    assert first["published"] == "CLIP4Clip meanP: t2v R1 43.1, v2t R1 43.1 (fp16. Source: arXiv:2104.08860)"
    write_markdown(tmp_path / "study.md", result)
    text = (tmp_path / "study.md").read_text()
    assert "| 43.1 (1) |" in text
    assert "(1) CLIP4Clip meanP. fp16. Source: arXiv:2104.08860." in text


def table_lines(text: str) -> list[list[str]]:
    lines = [line for line in text.split("\n") if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_markdown_marks_what_is_missing(tmp_path):
    write_markdown(tmp_path / "study.md", result_of(rows(), tmp_path))
    text = (tmp_path / "study.md").read_text()
    titles, _, one, six, twelve = table_lines(text)
    assert (one[0], one[1], one[2]) == ("1", "3/3", "11.0 ± 1.0")
    assert (six[1], twelve[1]) == ("2/3 (1)", "3/3")
    assert "(1) 6, seed 1: failed: out of memory" in text
    assert one[titles.index("difference")].endswith("(n=3)")
    assert (one[titles.index("time")], one[titles.index("GiB")], six[titles.index("clips/s")]) == (
        "60 s",
        "2.0",
        "40.0",
    )
    assert "```sh\n# 1\npython launch/train.py 1\n# 6\n" in text
    assert "order pairs" not in titles


def test_markdown_shows_any_text_as_it_is(tmp_path):
    label = "a|b *c* `d` <e> $f$\ng"
    made = row_result(label, [1.0, 2.0])
    made = RowResult(made.row, made.seeds, "echo ```` x")
    write_markdown(tmp_path / "study.md", result_of([made], tmp_path, about={"machine": "<b>"}))
    text = (tmp_path / "study.md").read_text()
    assert len({len(line) for line in table_lines(text)}) == 1
    assert table_lines(text)[2][0] == r"a\|b \*c\* \`d\` \<e\> \$f\$ g"
    assert text.count("`````") == 2
    assert r"- machine: \<b\>" in text


def test_the_best_is_bold_only_beyond_the_spread(tmp_path):
    def bold(*values):
        made = result_of([row_result(str(i), one) for i, one in enumerate(values)], tmp_path)
        return [row.row.label for row in clear_best(made.tables[0], "t2v_R1")]

    assert bold([10, 11], [20, 21]) == ["1"]
    assert bold([10, 20], [12, 22]) == []  # the lead is 2, the spread 10
    assert bold([10], [20]) == []  # no spread is known
    assert bold([10, 11]) == []
    assert bold([10, 11], [10, 11]) == []
    write_markdown(tmp_path / "study.md", result_of([row_result("a", [10, 11]), row_result("b", [20, 21])], tmp_path))
    assert "**20.5** ± 0.7" in (tmp_path / "study.md").read_text()


def test_the_best_leads_all_others_and_not_only_the_second():
    rows = [row_result("a", [52.0, 53.0]), row_result("b", [50.0, 50.0]), row_result("c", [47.0, 53.0])]
    table = TableResult(StudyTable("t", "T", "", tuple(row.row for row in rows), ()), tuple(rows))
    assert clear_best(table, "t2v_R1") == []
    table = TableResult(table.table, tuple(rows[:2]))
    assert [row.row.label for row in clear_best(table, "t2v_R1")] == ["a"]


def test_the_best_rank_is_the_lowest(tmp_path):
    made = result_of([row_result("a", [10, 11], "t2v_MnR"), row_result("b", [20, 21], "t2v_MnR")], tmp_path)
    assert [row.row.label for row in clear_best(made.tables[0], "t2v_MnR")] == ["a"]


def test_a_study_without_results_is_written(tmp_path):
    result = result_of([row_result("a", [None]), row_result("b", [None], baseline="a")], tmp_path)
    write_csv(tmp_path / "study.csv", result)
    write_markdown(tmp_path / "study.md", result)
    assert [line["n_seeds"] for line in read(tmp_path / "study.csv")] == ["0", "0"]
    empty = StudyResult(result.study, ())
    write_csv(tmp_path / "study.csv", empty)
    write_markdown(tmp_path / "study.md", empty)
    assert (tmp_path / "study.csv").read_text() == ""


def test_durations_and_escapes():
    assert [duration_text(s) for s in (42.4, 600, 9000)] == ["42 s", "10.0 min", "2.5 h"]
    assert escaped("a_b\n\n c") == r"a\_b c"
