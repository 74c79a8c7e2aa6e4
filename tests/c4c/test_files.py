"""Files that are written at the end of long work: whether they can be is known at its start."""

import errno
import os
import subprocess

import pytest

from c4c.files import replace_text, require_writable


def refused(path) -> str:
    with pytest.raises(ValueError) as caught:
        require_writable("--to", path)
    return str(caught.value)


def test_what_can_be_written_leaves_no_trace(tmp_path):
    require_writable("--to", tmp_path / "new" / "folder" / "out.json")
    (tmp_path / "out.json").write_text("old")
    require_writable("--to", tmp_path / "out.json")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("out.json", "old")]


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    assert refused(tmp_path) == f"--to {tmp_path} cannot be written: it is a folder; name a file"
    assert refused(tmp_path / "file" / "out.json").endswith(f"cannot be written: {tmp_path / 'file'} is not a folder")
    assert "--to /proc/out.json cannot be written: " in refused(type(tmp_path)("/proc/out.json"))


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
        assert "Read-only file system in " in refused(tmp_path / "a" / "out.json")
    finally:
        subprocess.run(["umount", tmp_path], check=True)
