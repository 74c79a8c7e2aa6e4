"""`python -m pipelines.bench`: what it prints, and what it says of mistakes."""

import json

import pytest

from pipelines import bench, probe

pytestmark = pytest.mark.slow  # imports DALI


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["image_size=abc"], "data.image_size=abc: must be a whole number"),
        (["num_frames=4.5"], "data.num_frames=4.5: must be a whole number"),
        (["num_frame=4"], "unknown setting data.num_frame: did you mean num_frames"),
        (["zzzzzz=4"], "unknown setting data.zzzzzz: there are train, weights"),
        (["num_frames"], "num_frames: write a setting as key=value"),
        (["--device", "gpu"], "--device gpu: must be cpu, cuda or cuda:N"),
        (["--device", "cuda:x"], "--device cuda:x: must be cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "--device cuda:99: there is no"),
    ],
)
def test_a_mistake_is_one_sentence(numbered, capsys, words, said):
    assert bench.main(["--data", str(numbered.intra.path), *words]) == 1
    out = capsys.readouterr()
    assert out.err.startswith(f"error: {said}") and out.err.count("\n") == 1 and not out.out


def test_a_number_may_be_written_as_yaml_reads_it_not(numbered, capsys, tmp_path):
    words = ["--device", "cpu", "--batches", "2", "--batch-size", "4", "--json", str(tmp_path / "new" / "out.json")]
    settings = ["image_size=32", "num_frames=3", "data.colour=1e-1"]
    assert bench.main(["--data", str(numbered.intra.path), *words, *settings]) == 0
    assert "clips a second" in capsys.readouterr().out
    result = json.loads((tmp_path / "new" / "out.json").read_text())
    assert result["lane"] == "intra" and result["batches"] == 2 and result["clips_per_s"] > 0


def test_ctrl_c_is_told_in_a_line(numbered, capsys, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure", stopped)
    assert bench.main(["--data", str(numbered.copy.path), "--device", "cpu"]) == 130
    assert capsys.readouterr().err == "stopped by SIGINT\n"
    monkeypatch.setattr(probe, "_jpegs", stopped)
    assert probe.main(["whole", "--device", "cpu"]) == 130
    assert capsys.readouterr().err == "stopped by SIGINT\n"
