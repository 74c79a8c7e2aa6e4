"""`python -m c4c.features`: what cannot be done is refused before anything heavy is imported."""

import pytest

from c4c import features

WORDS = ["--ckpt", "openai:ViT-B-32", "--out", "f.safetensors"]
REFUSED = {
    "no weights": (["--ckpt", "", "--data", "x"], "--ckpt is empty: is a variable of the shell not set?"),
    "no split": ([], "--data is not given: name the folder of a packed split"),
    "an empty split": (["--data", "a", ""], "--data is empty"),
    "a split twice": (["--data", "a", "b", "a", "data.num_frames=4"], "--data names a split twice: a, b, a"),
    "no such split": (["--data", "nowhere", "data.num_frames=4"], "there is no folder nowhere"),
    "a typo": (["--data", "a", "data.num_frame=4"], "did you mean data.num_frames?"),
    "an unknown device": (["--device", "gpu"], "--device gpu: must be cpu, cuda or cuda:N"),
    "another ending": (["--out", "f.npz"], "--out f.npz: the name must end with .safetensors"),
    "another file": (["--out", "weights.safetensors"], "would replace a file of another kind"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_mistakes_are_found_first(name, tmp_path, monkeypatch, capsys):
    words, said = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    monkeypatch.setattr("sys.argv", ["c4c.features", *WORDS, *words])
    assert features.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line
