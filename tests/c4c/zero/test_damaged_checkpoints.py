"""Damaged checkpoints: each is noticed and named, and a run goes on from the newest whole one."""

import json

import pytest
import torch

from c4c.zero import checkpoint
from c4c.zero.checkpoint import latest, load_weights
from c4c.zero.snapshot import restore, save
from tests.c4c.zero.checkpoints import Engine, flip, refused, run_of


def test_a_pointer_that_is_gone_or_wrong_costs_nothing(tmp_path):
    *_, last = run_of(tmp_path, 5, 10, 15)
    pointer = tmp_path / "checkpoints" / "latest"
    for text, said in ((None, "is missing"), ("", "names nothing, which does not exist"),
                       ("step00000006", "names step00000006, which does not exist"), ("../checkpoints", "does not exist")):  # fmt: skip
        pointer.unlink() if text is None else pointer.write_text(text)
        assert checkpoint.exist(tmp_path)
        tag, (note,) = checkpoint.newest_intact(tmp_path)
        assert tag == latest(tmp_path) == "step00000015"
        assert f"{pointer} {said}" in note or said in note
        assert "continuing from step00000015, the newest intact checkpoint" in note
        assert all(torch.equal(v, last[k]) for k, v in load_weights(tmp_path).items())
        pointer.touch()


def test_every_file_has_a_checksum_and_any_flipped_bit_is_noticed(tmp_path):
    run_of(tmp_path, 5)
    folder = tmp_path / "checkpoints" / "step00000005"
    files = [p for p in folder.iterdir() if p.name != "state.json"]
    assert json.loads((folder / "state.json").read_text())["files"].keys() == {p.name for p in files}
    assert checkpoint.damage(folder) == ""
    for file in folder.iterdir():
        size = file.stat().st_size
        before = checkpoint.read_state(folder)
        for at in range(0, size, max(1, size // 40)):
            flip(file, at)
            found = checkpoint.damage(folder)
            if file.name == "state.json":  # white space is no part of what it says
                assert found or checkpoint.read_state(folder) == before
            else:
                assert found == f"{file.name} does not match its checksum in state.json"
            flip(file, at)
    assert checkpoint.damage(folder) == ""


def test_a_changed_number_in_the_state_is_noticed(tmp_path):
    run_of(tmp_path, 5)
    file = tmp_path / "checkpoints" / "step00000005" / "state.json"
    text = file.read_text()
    for old, new in (('"step": 5', '"step": 4'), ('"files"', '"filez"'), ('"crc32c": "', '"crc32d": "'), ('"ranks": 1', '"ranks": 3')):  # fmt: skip
        file.write_text(text.replace(old, new))
        assert "does not match its checksum" in checkpoint.damage(file.parent), (old, new)


DAMAGES = {
    "one bit of the weights": (lambda f: flip(f / "model.safetensors", -3), "model.safetensors does not match its checksum"),
    "one bit of the moments": (lambda f: flip(f / "optimizer.safetensors", -3), "optimizer.safetensors does not match"),
    "truncated": (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-5]), "were written"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors has 0 bytes; "),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "no state": (lambda f: (f / "state.json").unlink(), "state.json is missing"),
    "an empty state": (lambda f: (f / "state.json").write_text(""), "state.json cannot be read"),
    "another state": (lambda f: (f / "state.json").write_text("[1]"), "state.json cannot be read"),
    "half a state": (lambda f: (f / "state.json").write_bytes((f / "state.json").read_bytes()[:40]), "state.json cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_named(name, tmp_path):
    do, said = DAMAGES[name]
    first, _ = run_of(tmp_path, 5, 10)
    folder = tmp_path / "checkpoints" / "step00000010"
    do(folder)
    tag, (note,) = checkpoint.newest_intact(tmp_path)
    assert tag == "step00000005"
    assert note.startswith(f"warning: {folder} is damaged: ")
    assert said in note
    assert note.endswith("; continuing from step00000005, the newest intact checkpoint")
    assert said in (message := refused(restore, Engine(), tmp_path))
    assert message.endswith("step00000005 is intact: use --tag step00000005")
    if "moments" not in name:
        assert said in refused(load_weights, tmp_path)
    engine = Engine()
    restore(engine, tmp_path, tag)
    assert all(torch.equal(v, first[k]) for k, v in engine.module.state_dict().items())
    do(folder.with_name("step00000005"))
    assert "has no intact checkpoint to continue from: " in refused(checkpoint.newest_intact, tmp_path)


def test_a_checkpoint_from_before_there_were_checksums(tmp_path):
    _, last = run_of(tmp_path, 5, 10)
    for step in (5, 10):
        file = tmp_path / "checkpoints" / checkpoint.tag_of(step) / "state.json"
        state = json.loads(file.read_text())
        file.write_text(json.dumps({k: v for k, v in state.items() if k not in ("files", "crc32c")}))
    assert checkpoint.newest_intact(tmp_path) == ("step00000010", [])
    engine = Engine()
    assert restore(engine, tmp_path)["step"] == 10
    assert all(torch.equal(v, last[k]) for k, v in engine.module.state_dict().items())
    DAMAGES["truncated"][0](tmp_path / "checkpoints" / "step00000010")
    assert checkpoint.newest_intact(tmp_path)[0] == "step00000005"


def test_the_same_step_again_replaces_the_old_one(tmp_path):
    run_of(tmp_path, 5)
    engine = Engine()
    engine.train(7)
    save(engine, tmp_path, 5)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step00000005"]
    assert torch.equal(load_weights(tmp_path)["weight"], engine.module.weight)
