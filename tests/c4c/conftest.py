"""Shared by the tests of this folder."""

import os
import subprocess

import pytest


@pytest.fixture
def small_disk(tmp_path):
    """fill(left): a folder on a disk of 1 MB, of which `left` bytes stay free."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.getuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode
    ):
        pytest.skip("mounting a small file system needs root")

    def fill(left: int) -> None:
        free = os.statvfs(disk)
        (disk / "filling").write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - left)))

    yield disk, fill
    subprocess.run(["umount", disk], check=True)


@pytest.fixture
def write(tmp_path):
    """write(name, text) -> the path of a file of this text."""

    def write(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    return write
