"""Keys of DeepSpeed's own configuration: which pass through, and which are refused."""

import pytest

from c4c.config import from_dict, load
from c4c.zero.keys import KEYS
from tests.c4c.configs import SHIPPED, refused


def test_the_deepspeed_block_passes_through(write):
    text = "deepspeed:\n  zero_optimization: {reduce_bucket_size: 5, offload_optimizer: null}\n  optimizer: {params: {betas: [1, 2]}}"
    config = load(write("a.yaml", text), ["deepspeed.comms_logger.enabled=true"])
    assert config.deepspeed == {
        "zero_optimization": {"reduce_bucket_size": 5, "offload_optimizer": None},
        "optimizer": {"params": {"betas": [1, 2]}},
        "comms_logger": {"enabled": True},
    }
    assert load(write("b.yaml", "deepspeed:")).deepspeed == {}
    assert "deepspeed=3 in the command line" in refused(write("b.yaml", ""), ["deepspeed=3"])


DEEPSPEED = {
    "gradient_cliping=0.5": "unknown key deepspeed.gradient_cliping in the command line: did you mean deepspeed.gradient_clipping?",
    "zero_optimisation.stage=2": "deepspeed.zero_optimisation in the command line: did you mean deepspeed.zero_optimization?",
    "zero_optimization.reduce_bucket=5": "did you mean deepspeed.zero_optimization.reduce_bucket_size?",
    "zero_optimization.offload_optimizer.pin=true": "did you mean deepspeed.zero_optimization.offload_optimizer.pin_memory?",
    "reduce_bucket_size=5": "did you mean deepspeed.zero_optimization.reduce_bucket_size?",
    "optimizer.params.learning=1": "unknown key deepspeed.optimizer.params.learning in the command line: known keys are adam_w_mode",
    "optimizer.type=Lion": "deepspeed.optimizer.type in the command line: c4c trains with AdamW alone",
    "optimizer.type=3": "c4c trains with AdamW alone",
    "fp16.loss_scale=nan": "deepspeed.fp16.loss_scale in the command line: must be a finite number",
    "optimizer.params.betas=[0.9, .inf]": "deepspeed.optimizer.params.betas in the command line: must be a finite number",
    "amp.enabled=true": "c4c does not use that part of DeepSpeed: set engine.precision",
    "pipeline.stages=2": "c4c does not use that part of DeepSpeed",
}


@pytest.mark.parametrize("word", DEEPSPEED)
def test_a_deepspeed_key_that_would_be_ignored_is_refused(word):
    assert DEEPSPEED[word] in refused("demo.yaml", [f"deepspeed.{word}"], [SHIPPED])


def test_a_deepspeed_key_is_named_with_its_file(write):
    path = write("a.yaml", "deepspeed: {fp16: {los_scale: 3}}")
    assert f"unknown key deepspeed.fp16.los_scale in {path}: did you mean deepspeed.fp16.loss_scale?" in refused(path)
    assert from_dict({"deepspeed": {"los_scale": 3}}).deepspeed  # of a run from before it was refused


def test_the_known_deepspeed_keys_are_deepspeeds():
    """Each group's keys are fields of the class that DeepSpeed reads it with; a new release may add some."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CSVConfig, TensorBoardConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero import config as zero
    from deepspeed.runtime.zero import offload_config as offload

    classes = {"zero_optimization": zero.DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config,
               "zero_optimization.offload_optimizer": offload.DeepSpeedZeroOffloadOptimizerConfig,
               "zero_optimization.offload_param": offload.DeepSpeedZeroOffloadParamConfig,
               "comms_logger": CommsLoggerConfig, "tensorboard": TensorBoardConfig, "csv_monitor": CSVConfig}  # fmt: skip
    deprecated = {"cpu_offload", "cpu_offload_param", "zenflow", "save_muon_momentum_buffer_in_memory"}
    for group, cls in classes.items():
        fields = {name for key, f in cls.model_fields.items() for name in (key, f.alias) if name} - deprecated
        below = {other.rpartition(".")[2] for other in KEYS if other.rpartition(".")[0] == group}
        assert {*KEYS[group], *below} == fields, group
