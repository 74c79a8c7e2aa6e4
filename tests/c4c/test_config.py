"""From YAML and words to a Config, and what is said when that cannot be."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import pipelines.config
from c4c import settings
from c4c.config import ConfigError, describe_keys, dump, from_dict, load, require, to_dict
from c4c.models.heads import HEADS
from c4c.training import run_folder
from tests.c4c.configs import SHIPPED, refused

# ---- files ----


# but for lists of stages and studies, which tests/c4c/training/test_stages.py and tests/c4c/study read
SINGLE = [path for path in sorted(SHIPPED.glob("*.yaml")) if not re.search("two_stage$|^study_", path.stem)]


@pytest.mark.parametrize("path", SINGLE, ids=lambda p: p.name)
def test_every_shipped_file_loads_by_name(path):
    config = load(path.name, search=[SHIPPED])
    assert config.run.dir == f"runs/{path.stem}"
    assert config.data.train
    assert config.data.test


def test_a_path_comes_before_the_search_folders(write, tmp_path, monkeypatch):
    write("cfg/a.yaml", "run: {dir: searched}")
    assert load("a.yaml", search=[tmp_path / "cfg"]).run.dir == "searched"
    write("a.yaml", "run: {dir: here}")
    monkeypatch.chdir(tmp_path)
    assert load("a.yaml", search=[tmp_path / "cfg"]).run.dir == "here"


def test_an_empty_file_gives_the_defaults(write):
    assert load(write("a.yaml", "")) == from_dict({})


def test_extends_merges_key_by_key(write, tmp_path):
    write("base.yaml", "train: {lr: 1.0, epochs: 9}\nrun: {dir: base}")
    write("other.yaml", "train: {epochs: 7}\ndata: {fps: 2}")
    config = load(write("top.yaml", "extends: [base.yaml, other.yaml]\ntrain: {batch_size: 3}"))
    assert (config.train.lr, config.train.epochs, config.train.batch_size) == (1.0, 7.0, 3)
    assert (config.run.dir, config.data.fps) == ("base", 2)
    assert load(write("one.yaml", "extends: top.yaml\nrun: {dir: one}")).run.dir == "one"
    assert load(write("none.yaml", "extends:\nrun: {dir: none}")).run.dir == "none"


def test_extends_looks_beside_the_file_first_then_where_configurations_are(write, tmp_path, monkeypatch):
    path = write("a/top.yaml", "extends: base.yaml")
    write("here/base.yaml", "run: {dir: here}")
    monkeypatch.chdir(tmp_path / "here")
    assert load(path).run.dir == "here"
    write("cfg/base.yaml", "run: {dir: searched}")
    assert load(path, search=[tmp_path / "cfg"]).run.dir == "searched"
    write("a/base.yaml", "run: {dir: beside}")
    assert load(path, search=[tmp_path / "cfg"]).run.dir == "beside"


@pytest.mark.parametrize("base", ["a.yaml", "b.yaml", "../here/a.yaml"])
def test_extends_in_a_circle_is_refused(base, write):
    write("here/b.yaml", "extends: a.yaml")
    message = refused(write("here/a.yaml", f"extends: {base}"))
    assert "extends itself" in message
    assert "a.yaml" in message


@pytest.mark.parametrize("name", ["demo_two_stage.yaml", "two_stage.yaml"])
def test_a_file_of_stages_is_for_another_command(name):
    assert "it is for launch/stages.py --cfg" in refused(name, search=[SHIPPED])


def test_a_study_is_for_another_command():
    assert "python -m c4c.study --cfg study_msrvtt.yaml runs it" in refused("study_msrvtt.yaml", search=[SHIPPED])


def test_extends_must_name_files(write):
    assert refused(write("a.yaml", "extends: 5")).startswith("extends=5 in ")
    assert "no configuration gone.yaml" in refused(write("b.yaml", "extends: gone.yaml"))


def test_a_missing_file_lists_what_there_is():
    message = refused("demmo.yaml", search=[SHIPPED])
    assert "did you mean demo.yaml?" in message
    assert "msrvtt.yaml" in message


def test_what_is_not_yaml_is_named(write):
    assert "a.yaml is not YAML" in refused(write("a.yaml", "run: [1,"))
    assert "b.yaml: the top level" in refused(write("b.yaml", "- 1"))
    assert "b.yaml: the top level" in refused(write("b.yaml", "just words"))


def test_yaml_cannot_make_objects(write, tmp_path):
    assert "is not YAML" in refused(write("a.yaml", f"run: !!python/object/apply:os.mkdir [{tmp_path / 'ran'}]"))
    assert not (tmp_path / "ran").exists()


# ---- words on the command line ----


def test_words_replace_the_file(write):
    path = write("a.yaml", "train: {lr: 1.0, batch_size: 3}")
    config = load(path, ["train.lr=1e-4", "run.dir=x=y", "train.lr=2e-4", "model={head: meanP, backbone: ViT-demo-16}"])
    assert (config.train.lr, config.train.batch_size) == (2e-4, 3)
    assert (config.run.dir, config.model.backbone) == ("x=y", "ViT-demo-16")


@pytest.mark.parametrize("word", ["train.lr", "=3", "train.lr 3"])
def test_a_word_that_is_no_assignment_is_refused(word, write):
    message = refused(write("a.yaml", ""), [word])
    assert repr(word) in message
    assert "key=value" in message


def test_a_word_whose_value_is_not_yaml_is_refused(write):
    assert "'train.lr=[' on the command line" in refused(write("a.yaml", ""), ["train.lr=["])


# ---- keys ----


@pytest.mark.parametrize(
    ("word", "wrong", "right"),
    [
        ("train.batchsize=3", "train.batchsize", "train.batch_size"),
        ("trian.lr=3", "trian", "train"),
        ("lr=3", "lr", "train.lr"),
        ("data.backbone=3", "data.backbone", "model.backbone"),
        ("engine.zero=1", "engine.zero", "engine.zero_stage"),
    ],
)
def test_an_unknown_key_names_the_nearest_right_one(word, wrong, right, write):
    assert refused(write("a.yaml", ""), [word]) == f"unknown key {wrong} in the command line: did you mean {right}?"


def test_an_unknown_key_names_its_file(write):
    write("base.yaml", "train: {lrr: 3}")
    message = refused(write("a.yaml", "extends: base.yaml"))
    assert "unknown key train.lrr in " in message
    assert "base.yaml" in message
    assert "did you mean train.lr?" in message
    assert "a.yaml" not in message.replace("base.yaml", "")


def test_an_unknown_key_like_none_lists_all(write):
    message = refused(write("a.yaml", ""), ["zzzzzzzzzzzz=3"])
    assert message.endswith("known keys are run, data, cache, clips, model, train, engine, checkpoint, deepspeed")


# ---- values ----


@pytest.mark.parametrize(
    ("word", "read", "value"),
    [
        ("train.lr=1e-4", lambda c: c.train.lr, 1e-4),  # YAML 1.1 reads this as text
        ("train.lr=3", lambda c: c.train.lr, 3.0),
        ("train.epochs=0.5", lambda c: c.train.epochs, 0.5),
        ("train.betas=[0.5, 1e-1]", lambda c: c.train.betas, (0.5, 0.1)),
        ("data.mean=[0, 0.5, 1]", lambda c: c.data.mean, (0.0, 0.5, 1.0)),
        ("run.seed=7", lambda c: c.run.seed, 7),
        ("run.dir='7'", lambda c: c.run.dir, "7"),
    ],
)
def test_values_take_the_type_of_their_key(word, read, value, write):
    got = read(load(write("a.yaml", ""), [word]))
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("word", "must"),
    [
        ("run.seed=true", "a whole number"),
        ("run.seed=1.0", "a whole number"),
        ("run.seed=1e3", "a whole number"),
        ("train.lr=true", "a number"),
        ("train.lr=fast", "a number"),
        ("train.lr=null", "a number"),
        ("run.dir=7", "text"),
        ("train.betas=0.9", "a list"),
        ("train.betas=[a, b]", "a list"),
    ],
)
def test_a_wrong_type_names_key_and_place(word, must, write):
    key = word.partition("=")[0]
    path = write("a.yaml", "")
    assert refused(path, [word]).endswith(f"in the command line: must be {must}")
    section, name = key.split(".")
    message = refused(write("b.yaml", f"{section}: {{{name}: {word.partition('=')[2]}}}"))
    assert message.startswith(f"{key}=")
    assert "b.yaml" in message


def test_keys_where_a_value_belongs_and_the_other_way_round(write):
    assert "train.lr in the command line: takes one value" in refused(write("a.yaml", ""), ["train.lr.x=3"])
    assert "train in the command line: must hold keys and values, not 3" in refused(write("a.yaml", ""), ["train=3"])


@pytest.mark.parametrize(
    "word",
    [
        "train.lr=-1", "train.batch_size=0", "train.betas=[0.9]", "run.resume=maybe", "run.dir=''", "engine.precision=fp8",
        "engine.zero_stage=4", "model.backbone=ViT-B-33", "model.head=max", "data.sampling=all", "checkpoint.keep_last=0",
    ],
)  # fmt: skip
def test_a_value_that_makes_no_sense_names_its_key(word, write):
    assert refused(write("a.yaml", ""), [word]).startswith(word.partition("=")[0])


FLOATS = [
    f"{group}.{name}"
    for group, part in to_dict(from_dict({})).items()
    for name, value in part.items()
    if type(value) is float
]


@pytest.mark.parametrize("number", ["nan", ".inf", "-.inf"])
def test_no_setting_is_nan_or_infinite(number, write):
    path = write("a.yaml", "")
    for key in [*FLOATS, "train.betas", "data.mean", "data.std", "data.weights"]:
        value = number if key in FLOATS else f"[{number}, 1, 1]"
        assert re.match(rf"{key}=.*(nan|inf).*: must be a finite number$", refused(path, [f"{key}={value}"]))


BEYOND = {
    "data.max_bad_fraction=7": "must be at most 1",
    "data.max_bad_fraction=-0.1": "must be at least 0",
    "train.warmup_epochs=-1": "must be at least 0",
    "train.warmup_fraction=2": "must be at most 1",
    "train.epochs=1e30": "must be at most 1000000",
    "train.batch_size=1000000000000": "must be at most 1000000000",
    "train.patience=99999999999999999999999": "must be at most 1000000000",
    "engine.timeout_s=1e18": "must be at most 2592000",
    "engine.timeout_s=0": "must be above 0",
    "run.seed=99999999999999999999999": "must be at most 9223372036854775807",
    "run.seed=-1": "must be at least 0",
    "data.threads=100000": "must be at most 1024",
    "data.threads=-1": "must be at least 0",
    "data.num_frames=999999999": "must be at most 4096",
    "data.image_size=999999999": "must be at most 8192",
    "data.read_timeout_s=0": "must be above 0",
    "data.local_gb=1e20": "must be at most 1000000000",
    "cache.max_gb=1e20": "must be at most 1000000000",
    "cache.frames=-1": "must be at least 0",
    "clips.min_s=1e20": "must be at most 2592000",
    "clips.bag=1000000": "must be at most 1000",
    "checkpoint.every_minutes=1e20": "must be at most 43200",
    "model.head_layers=1000000": "must be at most 1000",
}


def test_a_number_out_of_bounds_names_its_key_and_the_bound(write):
    path = write("a.yaml", "")
    for word, bound in BEYOND.items():
        message = refused(path, [word])
        assert message.startswith(word.partition("=")[0]) and bound in message


# ---- the whole ----


def test_settings_are_checked_before_anything_heavy_is_imported():
    code = "import sys; import c4c.config; print([m for m in ('torch', 'deepspeed', 'open_clip', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SHIPPED.parents[1])
    assert done.stdout == "[]\n", done.stderr


def test_heads_and_backbones_are_known_without_importing_them():
    code = (
        "import sys; from c4c.settings import ModelConfig, _heads; print(sorted(_heads())); ModelConfig(backbone='ViT-demo-16')\n"
        "assert 'torch' not in sys.modules\n"
        "try: ModelConfig(backbone='ViT-B-33')\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SHIPPED.parents[1])
    heads, refusal = done.stdout.splitlines()
    assert heads == str(sorted(HEADS))
    assert "model.backbone=ViT-B-33: open_clip knows no such model. Did you mean ViT-B-32?" in refusal


@pytest.mark.parametrize("key", ["train", "test"])
def test_what_a_training_needs_is_asked_for_at_once(key):
    words = ["data.train=a", "data.test=b", "model.init_from=scratch"]
    require(load("demo.yaml", words, [SHIPPED]))
    with pytest.raises(ConfigError, match=rf"data\.{key} is not set"):
        require(load("demo.yaml", [*words, f"data.{key}=''"], [SHIPPED]))
    with pytest.raises(ConfigError, match=r"model\.init_from is not set"):
        require(load("demo.yaml", [*words, "model.init_from=''"], [SHIPPED]))


def test_frozen_weights_must_stay_where_they_were_read(tmp_path, write):
    write("run/config.yaml", "")
    run, file, inner = (
        tmp_path / "run",
        write("run/base.safetensors", ""),
        write("run/checkpoints/step1/model.safetensors", ""),
    )

    def required(*words: str) -> None:
        given = ["data.train=a", "data.test=b", f"run.dir={run}", *words]
        require(load("demo.yaml", given, [SHIPPED]))

    for source in (run, file, inner, f"local-dir:{run}"):
        required(f"model.init_from={source}")
        required(f"model.init_from={source}", "train.lora=4", "checkpoint.whole=true")
        required(f"model.init_from={source}", "train.lora=4", f"run.dir={tmp_path / 'other'}")
        with pytest.raises(ConfigError, match=r"run\.resume=never moves that folder aside.*Choose another run\.dir"):
            required(f"model.init_from={source}", "train.freeze=text")
    required(f"model.init_from={file}", "train.lora=4", "run.resume=auto")
    for source in (run, inner):
        with pytest.raises(ConfigError, match="a run cannot start from itself"):
            required(f"model.init_from={source}", "train.lora=4", "run.resume=auto")


def test_the_resolved_config_survives_yaml(write):
    words = ["train.lr=1e-4", "train.betas=[0.5, 0.6]", "deepspeed.optimizer.params.betas=[1, 2]", "run.dir=x"]
    config = load("demo.yaml", words, [SHIPPED])
    assert from_dict(yaml.safe_load(dump(config))) == config
    assert yaml.safe_load(dump(config)) == to_dict(config)
    assert to_dict(config)["train"]["betas"] == [0.5, 0.6]


def test_a_saved_config_with_a_key_of_another_version_is_refused():
    with pytest.raises(ConfigError, match=r"unknown key run\.old in the saved configuration"):
        from_dict({"run": {"old": 1}})


def test_a_config_cannot_be_changed():
    config = from_dict({})
    for part in (config, config.run, config.data, config.model, config.train, config.engine, config.checkpoint):
        name = dataclasses.fields(part)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, name, None)


def test_a_bag_of_captions_needs_the_loss_that_is_made_for_it():
    words = ["clips.cut=true", "clips.bag=3"]
    for loss in ("cross_entropy", "sigmoid"):
        with pytest.raises(ConfigError, match=rf"clips\.bag=3 needs train\.loss=mil_nce: {loss} takes one caption"):
            load("demo.yaml", [*words, f"train.loss={loss}"], [SHIPPED])
    assert load("demo.yaml", [*words, "train.loss=mil_nce"], [SHIPPED]).clips.bag == 3
    for name in ("pretrain_howto100m.yaml", "pretrain_webvid.yaml"):
        config = load(name, [], [SHIPPED])
        assert (config.train.loss == "mil_nce") == config.clips.cut == (config.clips.bag > 1)


def test_every_key_is_described(write):
    text = describe_keys()
    words = re.findall(r"^    (\S+=.*)$", text, re.MULTILINE)
    keys = {f"{group}.{key}" for group, keys in to_dict(load(write("a.yaml", ""))).items() for key in keys}
    assert {word.partition("=")[0] for word in words} == keys
    assert load(write("a.yaml", ""), words) == load(write("a.yaml", ""))  # each can be pasted
    assert "train.batch_size=128\n        pairs a step, over all ranks\n" in text
    assert "data.random_crop=0.0\n        in training: least share" in text
    assert "engine.precision=bf16\n        of weights and activations; masters" in text


@pytest.mark.parametrize("module", [settings, pipelines.config, run_folder], ids=lambda module: module.__name__)
def test_a_setting_and_its_comment_are_not_broken_over_lines(module):
    """As ruff's formatter does where they are too long for one; the comment is then not found."""
    assert re.findall(r"^    \w+: .* = \($", Path(module.__file__).read_text(), re.MULTILINE) == []
