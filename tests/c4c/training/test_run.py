"""The run folder: what is moved aside, what is written, what a resumed run forgets."""

import json

import pytest
import yaml

from c4c.files import replace_text
from c4c.training.continuation import note_on_test_split
from c4c.training.run_folder import RunConfig, check_continuation, mark_done, prepare, read_config, save_description


def test_an_earlier_run_is_moved_aside(tmp_path):
    run = tmp_path / "runs" / "a"
    assert prepare(run, "never") is None
    assert run.is_dir()
    assert prepare(run, "never") is None  # an empty folder is no run
    for number in (1, 2):
        (run / "config.yaml").write_text(str(number))
        assert prepare(run, "never") == tmp_path / "runs" / f"a.old{number}"
        assert list(run.iterdir()) == []
    assert [(tmp_path / "runs" / f"a.old{n}" / "config.yaml").read_text() for n in (1, 2)] == ["1", "2"]


def test_checkpoints_alone_are_moved_aside_too(tmp_path):
    run = tmp_path / "a"
    (run / "checkpoints" / "step00000005").mkdir(parents=True)
    assert prepare(run, "never") == tmp_path / "a.old1"
    assert (tmp_path / "a.old1" / "checkpoints" / "step00000005").is_dir()


def test_a_run_to_be_resumed_stays(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    assert prepare(tmp_path, "auto") is None
    assert (tmp_path / "config.yaml").exists()


def test_a_complete_run_without_checkpoints_is_not_written_over(tmp_path):
    run = tmp_path / "a"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    assert prepare(run, "auto", continues=False) is None  # killed before its first checkpoint
    mark_done(run, 1, "step00000001")
    assert prepare(run, "auto", continues=True) is None
    assert prepare(run, "auto", continues=False) == tmp_path / "a.old1"
    assert (tmp_path / "a.old1" / "metrics.jsonl").exists() and list(run.iterdir()) == []


def test_the_description(tmp_path):
    save_description(tmp_path, "train:\n  lr: 0.5\n", {"embed_dim": 8})
    assert read_config(tmp_path) == {"train": {"lr": 0.5}}
    versions = json.loads((tmp_path / "versions.json").read_text())
    assert {"torch", "deepspeed", "open_clip_torch", "python", "machine"} <= versions.keys()
    assert versions["torch"]


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"is not a run folder: it has no config\.yaml"):
        read_config(tmp_path)
    for text in ("", "run: [", "- 1"):  # as a full disk may leave it
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"config\.yaml (is damaged|is not YAML: .*: the file is damaged)"):
            read_config(tmp_path)


def test_a_test_split_with_other_contents_is_told_on_resuming():
    assert note_on_test_split({"step": 4}, "a" * 64, "data/test") == ""  # of a checkpoint from before it was kept
    assert note_on_test_split({"test": "a" * 64}, "a" * 64, "data/test") == ""
    note = note_on_test_split({"test": "b" * 64}, "a" * 64, "data/test")
    assert note.startswith(
        "data/test is not the data that this run was validated on before (digest aaaaaaaaaaaa, was bbbbbbbbbbbb)"
    )


def test_a_continuation_must_compute_the_same(tmp_path):
    config = {"run": {"dir": "a"}, "train": {"lr": 0.5, "max_steps": 0, "betas": [0.9, 0.999]}, "deepspeed": {}}
    save_description(tmp_path, yaml.safe_dump(config), {})
    check_continuation(tmp_path, config)
    buckets = {"zero_optimization": {"reduce_bucket_size": 5}}
    harmless = {"run": {"dir": "b"}, "train": config["train"] | {"eval_every": 5}, "deepspeed": buckets}
    check_continuation(tmp_path, harmless)
    check_continuation(tmp_path, config | {"deepspeed": {"optimizer": {"params": {"torch_adam": True}}}})
    for more in ({"train": config["train"] | {"max_steps": 5}}, {"deepspeed": {"optimizer": {"type": "Lion"}}}):
        with pytest.raises(ValueError, match="made with other settings"):
            check_continuation(tmp_path, config | more)
    newer = config | {"train": config["train"] | {"new_key": 1}}
    check_continuation(tmp_path, newer, {"train": {"new_key": 1}})  # it was the default before there was a key for it
    with pytest.raises(ValueError, match=r"train\.new_key was 2, is 1"):
        check_continuation(tmp_path, newer, {"train": {"new_key": 2}})
    other = {"run": {"dir": "a"}, "train": {"lr": 0.6, "max_steps": 0, "betas": [0.9, 0.99]}, "model": {"head": "b"}}
    with pytest.raises(ValueError, match=r"run\.resume=auto") as caught:
        check_continuation(tmp_path, other)
    for change in (
        "train.lr was 0.5, is 0.6",
        "train.betas was [0.9, 0.999], is [0.9, 0.99]",
        "model.head was None, is b",
    ):
        assert change in str(caught.value)
    assert "run.dir was" not in str(caught.value)


def test_a_run_goes_on_without_a_setting_that_did_nothing(tmp_path):
    """It is refused by now, and "leave it out" must not make another run of it."""

    def settings(lora=0, loss="cross_entropy", start="scratch", *, on="attention", bias=-10.0, tag=""):
        train = {"lora": lora, "lora_on": on, "loss": loss, "logit_bias": bias}
        return {"train": train, "model": {"init_from": start, "init_tag": tag}}

    idle = {"on": "all", "bias": -4.0, "tag": "best"}
    save_description(tmp_path, yaml.safe_dump(settings(**idle)), {})
    check_continuation(tmp_path, settings())
    (tmp_path / "w.safetensors").touch()  # nor is a file a run folder
    file = {"start": str(tmp_path / "w.safetensors")}
    save_description(tmp_path, yaml.safe_dump(settings(**file, tag="best")), {})
    check_continuation(tmp_path, settings(**file))
    for change, said in (
        ({"lora": 4}, "lora_on was all"), ({"loss": "sigmoid"}, "logit_bias was -4"), ({"start": "runs/b"}, "init_tag was best"),
    ):  # fmt: skip
        save_description(tmp_path, yaml.safe_dump(settings(**change, **idle)), {})
        with pytest.raises(ValueError, match=said):
            check_continuation(tmp_path, settings(**change))


# ---- full disks, torn lines ----


def test_a_full_disk_leaves_the_description_as_it_was(small_disk):
    disk, fill = small_disk
    save_description(disk, "run: {dir: a}\n", {})
    before = {p.name: p.read_bytes() for p in disk.iterdir()}
    fill(0)
    with pytest.raises(OSError, match=r"config\.yaml could not be written and stays"):
        save_description(disk, "run: {dir: b}\n" * 500, {})
    assert {p.name: p.read_bytes() for p in disk.iterdir() if p.name != "filling"} == before


def test_what_cannot_be_renamed_is_not_left_beside(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("old")

    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("c4c.files.os.replace", broken)
    with pytest.raises(OSError, match="Input/output error"):
        replace_text({tmp_path / "a": "new"})
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "old")]


@pytest.mark.parametrize(("key", "value"), [("resume", "yes"), ("dir", "")])
def test_what_makes_no_sense_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=rf"run\.{key}"):
        RunConfig(**{key: value})


def test_another_seed_is_no_continuation(tmp_path):
    save_description(tmp_path, "run: {dir: a, seed: 1}", {})
    check_continuation(tmp_path, {"run": {"dir": "b", "seed": 1}})
    with pytest.raises(ValueError, match=r"run\.seed was 1, is 2"):
        check_continuation(tmp_path, {"run": {"dir": "a", "seed": 2}})
