"""The page of a study: what stands in its file, for results of every kind."""

import base64
import hashlib
import math
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from scipy import stats

from c4c.pages.charts import Series, line_chart
from c4c.study.page import plots, write_page
from c4c.study.page.columns import decimal, duration, p_text, rate, signed
from c4c.study.statistics import estimate
from tests.c4c.study import pages

pytestmark = pytest.mark.slow  # imports DALI


class Parsed(HTMLParser):
    """The elements of a page, and the fields of the rows of its tables of results."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.rows: dict[str, list[str]] = {}  # by anchor, and anchor + "/published"
        self.text, self.row, self.field = [], "", False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        kinds = (attrs.get("class") or "").split()
        if tag == "tr":
            self.row = (
                attrs["id"] if "row" in kinds else f"{self.row.split('/')[0]}/published" if "published" in kinds else ""
            )
            self.rows.setdefault(self.row, [])
        self.field = tag in ("td", "th") or (self.field and tag not in ("details",))
        if tag in ("td", "th") and self.row:
            self.rows[self.row].append("")

    def handle_data(self, data):
        self.text.append(data)
        if self.field and self.row:
            self.rows[self.row][-1] += data


def write(tmp_path, result) -> str:
    write_page(tmp_path / "study.html", result)
    return (tmp_path / "study.html").read_text()


def words(page: str) -> str:
    return re.sub(
        r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", re.sub(r"<(script|style).*?</\1>", "", page, flags=re.S)))
    )


def section(page: str, name: str) -> str:
    return re.search(rf'<section id="{name}".*?</section>', page, re.S)[0]


def test_numbers_are_those_of_the_result(tmp_path):
    result = pages.whole()
    parsed = Parsed(write(tmp_path, result))
    shown = 0
    for table in result.tables:
        for i, row in enumerate(table.rows, 1):
            fields = [re.sub(r"\s+", " ", field).strip() for field in parsed.rows[f"{table.table.name}-{i}"]]
            assert fields[0].removesuffix(" baseline") == row.row.label.strip()
            if not row.done:
                assert set(fields[1:]) == {"–"}
                continue
            values = {name: estimate([one.metrics[name] for one in row.done]) for name in row.done[0].metrics}
            assert fields[1] == f"{values['t2v_R1'].mean:.1f}± {values['t2v_R1'].sd:.1f}"
            assert fields[2:6] == [f"{values[name].mean:.1f}" for name in ("t2v_R5", "t2v_R10", "t2v_MdR", "v2t_R1")]
            if table.table.name == "temporal":
                assert fields[6:8] == [f"{values[name].mean:.1f}" for name in ("pairs_R1", "pairs_own_first")]
            gib = sum(one.memory_gib for one in row.done) / len(row.done)
            assert fields[-1] == f"{gib:.1f}"
            shown += 1
    assert shown == sum(len(table.rows) for table in result.tables) - 1


def test_differences_to_the_baseline(tmp_path):
    result = pages.whole()
    parsed = Parsed(write(tmp_path, result))
    for i, row in enumerate(result.tables[0].rows, 1):
        fields = parsed.rows[f"frames-{i}"][6:10]
        if row.row.label == "12 frames":
            assert fields == ["–"] * 4
            assert "baseline" in parsed.rows[f"frames-{i}"][0]
            continue
        one = row.versus["t2v_R1"]
        assert float(fields[0].replace("−", "-")) == pytest.approx(one.mean, abs=0.051)
        low, high = (float(end.replace("−", "-")) for end in fields[1].split(" to "))
        assert (low, high) == pytest.approx((one.low, one.high), abs=0.051)
        assert float(fields[2]) == pytest.approx(one.p_seeds, abs=0.0051)
        assert fields[3] == "< 0.001"  # pages.py says 0.0004


def test_published_numbers_stand_below_ours(tmp_path):
    result = pages.whole()
    page = write(tmp_path, result)
    parsed = Parsed(page)
    for i, row in enumerate(result.tables[0].rows, 1):
        fields = parsed.rows.get(f"frames-{i}/published")
        assert bool(fields) == bool(row.published)
        if fields:
            metrics = row.published[0].metrics
            assert [field.strip() for field in fields[1:5]] == [
                f"{metrics['t2v_R1']:.1f}",
                f"{metrics['t2v_R5']:.1f}",
                "",
                "",
            ]
    assert "Everything: it is made up." in words(section(page, "frames"))
    assert 'class="line p"' in section(page, "frames") and 'class="line p"' not in section(page, "temporal")


def test_hostile_text_stays_text(tmp_path):
    result = pages.whole(title=pages.HOSTILE)
    table = replace(result.tables[0].table, title=pages.HOSTILE, about=pages.HOSTILE)
    rows = tuple(replace(row, command=pages.HOSTILE) for row in result.tables[0].rows)
    first = replace(result.tables[0], table=table, rows=rows, findings=(pages.HOSTILE,))
    page = write(tmp_path, replace(result, tables=(first, *result.tables[1:]), about={pages.HOSTILE: pages.HOSTILE}))
    assert [tag for tag, _ in Parsed(page).tags if tag in ("img", "script")] == ["script"] * 2
    assert not any(name.startswith("on") for _, attrs in Parsed(page).tags for name in attrs)
    assert words(page).count(re.sub(r"\s+", " ", unescape(pages.HOSTILE.replace("&", "&amp;")))) > 6


def test_it_needs_nothing_but_itself(tmp_path):
    page = write(tmp_path, pages.whole())
    policy = unescape(re.search('Content-Security-Policy" content="(.*?)"', page)[1])
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    style, script = re.search("<style>(.*?)</style>", page, re.S)[1], re.search("<script>(.*?)</script>", page, re.S)[1]
    for text in (style, script):
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy
    for tag, attrs in Parsed(page).tags:
        assert "style" not in attrs, tag  # the policy forbids it
        for name in ("src", "href"):
            assert (attrs.get(name) or "#").startswith(("#", "data:")), attrs


def test_links_lead_somewhere(tmp_path):
    tags = Parsed(write(tmp_path, pages.whole())).tags
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {attrs["href"][1:] for tag, attrs in tags if tag == "a"} <= set(ids)


def test_states_of_cells(tmp_path):
    page = write(tmp_path, pages.whole())
    frames, pretraining, temporal = (words(section(page, name)) for name in ("frames", "pretraining", "temporal"))
    assert frames.count("2 of 3 seeds done, 1 failed") == frames.count("2 of 3 seeds done, 1 running") == 1
    assert "Seed 44: " + re.sub(r"\s+", " ", pages.ERROR) in frames
    assert pretraining.count("all 3 seeds blocked") == 1
    assert pretraining.count("not run: needs stage-one-77aa01bc-seed42, which failed") == 1
    assert temporal.count("2 of 3 seeds done, 1 not run yet") == 1
    summary = words(section(page, "summary"))
    assert "Cells done 105 of 111 Failed 1 Running 1 Not run yet 1 + 3 blocked Seeds 3" in summary
    assert "2 rows with cells that failed or cannot run" in summary


def test_a_shared_cell_counts_once(tmp_path):
    frames = pages.frames()
    once = pages.study([frames])
    twice = pages.study([frames, replace(frames, table=replace(frames.table, name="again"))])
    first, second = (words(section(write(tmp_path, result), "summary")) for result in (once, twice))
    assert first == second and "Cells done 18 of 18" in first
    fixed = replace(frames.rows[0], seeds=tuple(replace(frames.rows[0].seeds[0], seed=seed) for seed in pages.SEEDS))
    page = write(tmp_path, pages.study([replace(frames, rows=(fixed, *frames.rows[1:]))]))
    assert "one cell for all 3 seeds" in words(page) and "42, 43, 44 done" in words(page)
    assert "Cells done 16 of 16" in words(page)


@pytest.mark.parametrize(("state", "word"), [("missing", "not run yet"), ("failed", "all 3 seeds failed")])
def test_without_any_result(tmp_path, state, word):
    page = write(tmp_path, pages.whole(state=lambda *_: state))
    rows = sum(len(table.rows) for table in pages.whole().tables)
    assert words(page).count(f" {word} , command") == rows
    assert words(page).count("No cell of this table is done yet.") == 4
    assert "<svg" not in page and "± sd" not in page
    assert (page.count(pages.ERROR.split()[0] + " the loss") > 0) == (state == "failed")


def test_a_study_without_tables(tmp_path):
    assert "0 tables, 0 cells" in words(write(tmp_path, pages.study([])))


def test_one_seed_has_no_spread(tmp_path):
    page = write(tmp_path, pages.whole(seeds=(42,)))
    assert "One seed: no number here has a spread" in words(section(page, "summary"))
    assert "One seed." in words(section(page, "reading")) and "p seeds" not in words(page)
    assert "±" not in page.split('<section id="reading"')[0].split("<body>")[1]
    assert 'class="bar' not in page and 'class="faint' not in page


def test_what_the_number_of_seeds_can_show(tmp_path):
    for n in (2, 3, 5):
        seeds = tuple(range(n))
        text = words(section(write(tmp_path, pages.study([pages.frames(seeds)], seeds)), "reading"))
        reach = stats.t.ppf(0.975, n - 1) / math.sqrt(n)
        assert f"only if it is {reach:.1f} times" in text
        low, high = (math.sqrt((n - 1) / stats.chi2.ppf(p, n - 1)) for p in (0.975, 0.025))
        assert f"may be {low:.1f} to {high:.1f} times" in text


def circles(svg: str, kind: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(rf'<circle class="{kind}" cx="([\d.]+)" cy="([\d.]+)"', svg)]


def charts(page: str, name: str) -> list[str]:
    return re.findall(r'<svg class="chart".*?</svg>', section(page, name), re.S)


def test_lines_show_means_spread_and_seeds(tmp_path):
    frames = pages.frames()
    svg = charts(write(tmp_path, pages.study([frames])), "frames")[0]
    known = [row.estimate("t2v_R1") for row in frames.rows]
    dots = circles(svg, "dot a")
    assert len(dots) == len(known) == 6
    scale = (dots[0][1] - dots[-1][1]) / (known[-1].mean - known[0].mean)  # points of the drawing for one of R@1
    bars = re.findall(r'<path class="bar a" d="M[\d.]+ ([\d.]+)H[\d.]+M[\d.]+ [\d.]+V([\d.]+)', svg)
    for (_, y), (top, bottom), one in zip(dots, bars, known, strict=True):
        assert dots[0][1] - y == pytest.approx(scale * (one.mean - known[0].mean), abs=0.2)
        assert float(bottom) - float(top) == pytest.approx(2 * scale * one.sd, abs=0.2)
    assert len(circles(svg, "faint a")) == 18
    assert len(circles(svg, "dot p")) == 3
    steps = [(dots[i + 1][0] - dots[i][0]) for i in range(5)]
    assert [round(step / steps[0]) for step in steps] == [1, 2, 2, 2, 4]


def test_chance_is_drawn_where_every_row_that_has_pairs_has_pairs_of_two():
    def row(n_pairs: int, *metrics: str) -> SimpleNamespace:
        return SimpleNamespace(done=(SimpleNamespace(n_pairs=n_pairs, metrics=dict.fromkeys(metrics, 60.0)),))

    of_two, without, of_three = row(24, "pairs_own_first"), row(0, "t2v_R1"), row(0, "pairs_own_first")
    assert plots._chance("pairs_own_first", [of_two, without]) == 50.0  # one row may be of a set without pairs
    assert plots._chance("pairs_own_first", [of_two, of_three]) is None
    assert plots._chance("t2v_R1", [of_two]) is None


def test_an_axis_can_be_logarithmic(tmp_path):
    page = write(tmp_path, pages.study([pages.sensitivity()]))
    log = next(svg for svg in charts(page, "sensitivity") if "logarithmic" in svg and 'class="dot b"' not in svg)
    xs = [x for x, _ in circles(log, "dot a")]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.11)


def test_a_line_for_each_value_of_what_else_is_varied(tmp_path):
    page = write(tmp_path, pages.study([pages.sensitivity()]))
    svg = charts(page, "sensitivity")[-1]
    assert len(circles(svg, "dot a")) == len(circles(svg, "dot b")) == 3
    assert "model.freeze=0" in words(page) and "model.freeze=6" in words(page)


def test_settings_that_change_together_are_one_line(tmp_path):
    rows = tuple(pages.row(str(n), {"data.num_frames": n, "data.fps": n / 12}) for n in (8, 1, 4))
    table = replace(pages.frames().table, rows=rows)
    result = pages.results(table, {"8": 42.0, "1": 40.0, "4": 41.0}, pages.SEEDS, pages.all_done)
    svg = charts(write(tmp_path, pages.study([result])), "frames")[0]
    xs = [x for x, _ in circles(svg, "dot a")]
    assert len(xs) == 3 and xs == sorted(xs)
    assert svg.count('class="line') == 1


def test_what_is_no_number_is_drawn_as_dots(tmp_path):
    temporal = pages.temporal()
    page = section(write(tmp_path, pages.study([temporal])), "temporal")
    plots = re.findall(r'<div class="dots".*?</div>', page, re.S)
    assert len(plots) == 5  # R@1, R@5, R@10, MdR, pairs
    places = [float(x) for x in re.findall(r'<circle class="dot a" cx="([\d.]+)%', plots[0])]
    means = [row.estimate("t2v_R1").mean for row in temporal.rows]
    slope = (places[-1] - places[0]) / (means[-1] - means[0])
    assert slope > 0
    for place, mean in zip(places, means, strict=True):
        assert place - places[0] == pytest.approx(slope * (mean - means[0]), abs=0.05)
    assert len(re.findall('class="faint a"', plots[0])) == 30
    assert plots[0].count('class="marker"') == 10  # the baseline's mean, in each line


def test_rows_without_a_number_are_named(tmp_path):
    frames = pages.frames()
    odd = replace(frames.rows[0], row=replace(frames.rows[0].row, values={"data.num_frames": "all"}))
    page = write(tmp_path, pages.study([replace(frames, rows=(odd, *frames.rows[1:]))]))
    assert "1 row of 6 without a number for data.num_frames: only in the table." in words(page)
    assert len(circles(charts(page, "frames")[0], "dot a")) == 5


def test_labels_that_are_values_stand_under_their_setting(tmp_path):
    rows = tuple(pages.row(str(n), {"data.num_frames": n}, "", "4") for n in (1, 2, 4))
    table = replace(pages.frames().table, rows=rows)
    result = pages.results(table, {one.label: 40.0 for one in rows}, pages.SEEDS, pages.all_done)
    heads = r'<tr class="sorting"><th[^>]*>(.*?)</th>'
    assert re.findall(heads, write(tmp_path, pages.study([result, pages.temporal()]))) == ["num_frames", "row"]


def test_values_that_are_all_the_same(tmp_path):
    """MdR is 2.0 everywhere in pages.py."""
    page = write(tmp_path, pages.study([pages.frames()]))
    svg = next(svg for svg in charts(page, "frames") if "median rank" in svg)
    ys = {y for _, y in circles(svg, "dot a")}
    assert len(ys) == 1 and 50 < ys.pop() < 200  # not on the axis


def test_a_hundred_cells(tmp_path):
    rows = tuple(pages.row(f"row {i}", {"data.sampling": f"s{i}"}, "", "row 0") for i in range(34))
    table = replace(pages.temporal().table, rows=rows)
    result = pages.study(
        [pages.results(table, {one.label: 40.0 for one in rows}, pages.SEEDS, pages.all_done, pairs=True)]
    )
    page = write(tmp_path, result)
    assert "Cells done 102 of 102" in words(page)
    assert "s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11 and 22 more" in words(page)
    assert len(page) < 500_000


def test_commands(tmp_path):
    result = pages.whole()
    page = write(tmp_path, result)
    commands = [unescape(text) for text in re.findall(r"<pre[^>]*>(.*?)</pre>", page, re.S)]
    assert commands[:-1] == [row.command for table in result.tables for row in table.rows]
    assert commands[-1] == "python -m c4c.study --cfg 'my study.yaml' data.num_frames=4"


def test_where_it_cannot_be_written(tmp_path):
    with pytest.raises(OSError, match=r"no/study.html could not be written"):
        write_page(tmp_path / "no" / "study.html", pages.whole())


@pytest.mark.parametrize(
    ("text", "value", "expected"),
    [
        (decimal, -0.25, "−0.2"), (signed, 0.44, "+0.4"), (signed, -0.44, "−0.4"), (signed, -0.04, "0.0"), (p_text, 0.5, "0.50"),
        (p_text, 0.0341, "0.034"), (p_text, 0.00099, "< 0.001"), (p_text, 1.0, "1.00"), (duration, 3.14, "3.1 s"), (duration, 48.2, "48 s"),
        (duration, 59.97, "1.0 min"), (duration, 744, "12.4 min"), (duration, 3599, "1.0 h"), (duration, 11520, "3.2 h"),
        (rate, 1203.6, "1204"), (rate, 98.24, "98.2"), (rate, 0.518, "0.52"),
    ],
)  # fmt: skip
def test_how_numbers_are_written(text, value, expected):
    assert text(value) == expected


def test_ticks_that_would_touch_are_left_out():
    xs = [*range(1, 20), 1000]
    svg = line_chart("a", [Series("a", "a", [(x, x) for x in xs])], "x", "y", values=xs)
    labels = re.findall(r'<text class="tick" x="([\d.]+)" y="226" text-anchor="middle">(\d+)</text>', svg)
    assert [int(label) for _, label in labels] == [1, 1000]
