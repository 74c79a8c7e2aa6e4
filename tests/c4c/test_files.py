"""Files that are written at the end of long work: whether they can be is known at its start."""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from c4c.files import parse_yaml, replace_text, require_writable


def refused(path, is_ours=None) -> str:
    with pytest.raises(ValueError) as caught:
        require_writable(f"--to {path}", path, is_ours)
    return str(caught.value)


def test_yaml_may_say_a_thing_once():
    assert parse_yaml("{b: &b {x: 1}, a: &a {<<: *b, x: 2}, c: {<<: *a, x: 3}, d: [*a, *a]}") == {
        "b": {"x": 1}, "a": {"x": 2}, "c": {"x": 3}, "d": [{"x": 2}, {"x": 2}],
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"^the key lr stands twice \(line 2, column 9\)$"):
        parse_yaml("train: {lr: 1,\n        lr: 2}")
    with pytest.raises(ValueError, match="inside what it stands for"):
        parse_yaml("a: &a {b: *a}")


def test_what_can_be_written_leaves_no_trace(tmp_path):
    require_writable("--to", tmp_path / "out.json")
    (tmp_path / "out.json").write_text("old")
    require_writable("--to", tmp_path / "out.json", lambda start: start == b"old")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("out.json", "old")]


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    assert refused(tmp_path) == f"--to {tmp_path} cannot be written: it is a folder; name a file"
    assert refused(tmp_path / "file" / "out.json").endswith(f"cannot be written: {tmp_path / 'file'} is not a folder")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):  # nothing is read from a pipe, and no device replaced
        assert (
            refused(path, lambda start: True) == f"--to {path} cannot be written: it is a device or a pipe; name a file"
        )
    assert f"there is no folder {tmp_path / 'new'}. Make it first, or name another" in refused(
        tmp_path / "new" / "out.json"
    )
    assert "--to /proc/out.json cannot be written: " in refused(type(tmp_path)("/proc/out.json"))


def test_a_file_of_another_kind_is_not_replaced(tmp_path):
    (tmp_path / "weights").write_bytes(b"PK")
    said = refused(tmp_path / "weights", lambda start: b"t2v" in start)
    assert said.endswith("would replace a file of another kind: name another, or delete it first")
    (tmp_path / "weights").write_bytes(b"")
    require_writable("--to", tmp_path / "weights", lambda start: False)


@pytest.mark.skipif(os.getuid() != 0, reason="mounting needs root")
def test_a_full_disk_is_known_at_once(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        (tmp_path / "full").write_bytes(bytes(40_000))
        assert "No space left on device in " in refused(tmp_path / "out.json")
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("there", [True, False])
def test_a_failed_write_says_what_became_of_the_file(tmp_path, monkeypatch, there):
    def full(_) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "a.json"
    if there:
        path.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as caught:
        replace_text({path: "new"})
    kept = " and stays as it was" if there else ""
    assert caught.value.strerror == f"{path} could not be written{kept}: No space left on device"
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"] * there


@pytest.mark.skipif(os.getuid() != 0, reason="mounting needs root")
def test_a_disk_that_can_only_be_read(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        assert "Read-only file system in " in refused(tmp_path / "out.json")
    finally:
        subprocess.run(["umount", tmp_path], check=True)
