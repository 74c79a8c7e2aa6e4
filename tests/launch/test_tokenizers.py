"""A run whose captions another tokenizer than CLIP's turns into tokens: trained, gone on with and evaluated, also without it."""

import json
from pathlib import Path

import pytest

from c4c.export import run as export
from tests import vocabularies
from tests.launch.evaluations import metrics_of, refused, validated

pytestmark = [pytest.mark.launch, pytest.mark.timeout(1200)]

MT5 = {"model_type": "mt5", "vocab_size": 200, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2,
       "pad_token_id": 0, "eos_token_id": 1}  # fmt: skip


def make_backbone(folder: Path) -> None:
    """Towers as those of mt5-base-ViT-B-32, and their tokenizer."""
    vocabularies.sentencepiece(folder)
    (folder / "text").mkdir()
    (folder / "text/config.json").write_text(json.dumps(MT5))
    text = {"hf_model_name": str(folder / "text"), "hf_tokenizer_name": "google/mt5-base", "context_length": 40,
            "hf_pooler_type": "mean_pooler", "hf_model_pretrained": False}  # fmt: skip
    vision = {"image_size": 64, "patch_size": 16, "layers": 1, "width": 64}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))


def test_a_run_keeps_its_tokenizer(launcher, forks, evaluate, tmp_path):
    backbone, run = tmp_path / "backbone", tmp_path / "run"
    make_backbone(backbone)
    settings = [f"model.backbone=local-dir:{backbone}", f"run.dir={run}", "data.max_words=12", "train.max_steps=4",
             "checkpoint.every_steps=2"]  # fmt: skip
    code, out, err = forks.run(["launch/train.py", *launcher.words(*settings)], 2)
    assert code == 0, out + err
    cut = [line for line in err.splitlines() if "captions are cut at data.max_words=12 tokens" in line]
    assert len(cut) == 2 and all(f"({backbone}'s tokenizer, " in line for line in cut), "of train and test"
    assert (run / "tokenizer/tokenizer.json").is_file()

    backbone.rename(tmp_path / "away")
    assert evaluate("--ckpt", run, "--json", tmp_path / "out.json")[0] == 0
    assert metrics_of(tmp_path / "out.json") == validated(run, 4)
    assert "files" not in json.loads((run / "towers.json").read_text())["tokenizer"]
    file = tmp_path / "model.safetensors"
    export(str(run), None, file)
    (tmp_path / "elsewhere").mkdir()
    for name in ("model.safetensors", "model.tokenizer"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)

    (run / "tokenizer").rename(tmp_path / "tokenizer")
    said = refused(evaluate("--ckpt", run))
    assert f"the tokenizer {backbone} cannot be had (there is no such folder): the files of google/mt5-base" in said
    file = tmp_path / "elsewhere/model.safetensors"
    words = ["--data", launcher.test, "--json", tmp_path / "out.json", "data.eval_batch_size=3"]  # not as in the run
    assert evaluate("--ckpt", file, *words)[0] == 0
    assert metrics_of(tmp_path / "out.json") == validated(run, 4), "of the exported file, with the tokenizer beside it"
