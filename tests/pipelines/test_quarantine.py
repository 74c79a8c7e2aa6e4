"""The list of bad videos after a kill that tore its last line."""

import json
from types import SimpleNamespace

import pytest

from pipelines.quarantine import Quarantine, append_line, json_lines


@pytest.mark.parametrize("torn", ['{"split": "a", "key": "v3", "rea', "\0\0", "7\n", "\xff"])
def test_a_torn_line_ends_nothing_and_takes_nothing_with_it(torn, tmp_path):
    file = tmp_path / "quarantine.jsonl"
    rows = [{"split": "a", "key": f"v{i}", "reason": "x"} for i in range(3)]
    file.write_bytes(("".join(json.dumps(row) + "\n" for row in rows) + torn).encode("latin-1"))
    bad = Quarantine("a", file, 0.5)
    for index, key in enumerate(("v1", "v3", "v3", "v4")):  # the first is listed already
        with pytest.warns(UserWarning, match="cannot be used"):
            bad.report(SimpleNamespace(index=index, key=key, id=key), ValueError("broken"))
    assert [row["key"] for row in json_lines(file)] == ["v0", "v1", "v2", "v3", "v4"]


def test_no_file_has_no_lines(tmp_path):
    assert json_lines(tmp_path / "none.jsonl") == []
    append_line(tmp_path / "new.jsonl", {"a": 1})
    append_line(tmp_path / "new.jsonl", {"a": 2})
    assert (tmp_path / "new.jsonl").read_text() == '{"a": 1}\n{"a": 2}\n'
