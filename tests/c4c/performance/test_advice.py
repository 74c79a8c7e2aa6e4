"""What is advised: only what changes the prediction."""

from dataclasses import replace

import pytest

from c4c.performance import report
from c4c.performance.advice import advice, uncompiled
from c4c.performance.assumptions import assume
from tests.c4c.performance.test_predict import ALL_REACHED, config, predicted


def advised(limit: str, *words: str, assumed: tuple[str, ...] = (), **how) -> str:
    return advice(replace(predicted(*words, **how), limit=limit), config(*words), assume(assumed))


def test_every_limit_has_its_line():
    found = predicted()
    for limit in ("matrix_products", "memory_bound", "optimizer", "communication", "gaps", "launches", "loader_python",
                  "jpeg_decoding", "jpeg_engines", "video_decoding", "cache_reads", "copies"):  # fmt: skip
        assert advice(replace(found, limit=limit), config(), ALL_REACHED)


def test_compiling_is_advised_where_it_helps():
    assert advised("memory_bound").endswith("try engine.compile=true")
    assert "compile" not in advised("memory_bound", "engine.compile=true")
    assert "compile" not in advised("memory_bound", assumed=("fused=1",))
    three = "engine.zero_stage=3"
    assert advised("memory_bound", three).endswith("try engine.zero_stage=2 with engine.compile=true")
    assert advised("memory_bound", three, "engine.compile=true").endswith("try engine.zero_stage=2")


def test_zero_3_is_not_compiled_and_the_report_says_so():
    words = ("engine.compile=true", "engine.zero_stage=3")
    found = predicted(*words)
    assert "no effect under ZeRO 3" in uncompiled(found, config(*words))
    assert uncompiled(found, config(*words)) in report.text(found, 1, config(*words), ALL_REACHED)
    assert uncompiled(found, config(*words)) in report.table([(found, 1)], config(*words))
    assert not uncompiled(predicted(words[0]), config(words[0])) and not uncompiled(
        predicted(words[1]), config(words[1])
    )


def test_a_cache_is_advised_for_decoding_alone():
    assert "cache" not in advised("loader_python") and "cache" in advised("jpeg_decoding")


@pytest.mark.parametrize("offload", ["optimizer", "all"])
def test_an_optimizer_on_the_host(offload):
    words = (f"engine.offload={offload}", "engine.zero_stage=3")
    assert advised("optimizer", *words).endswith("try engine.offload=none")
    assert advised("optimizer").endswith("try a larger train.batch_size")


def test_launches_of_a_batch_that_is_cut():
    assert "a larger train.batch_size" in advised("launches")
    assert "a larger train.micro_batch_size" in advised("launches", "train.micro_batch_size=32")
    assert "a smaller train.accumulate" in advised("launches", "train.accumulate=4")


def test_what_gives_decoding_more():
    assert "more CPU cores" in advised("jpeg_decoding", decoder="cpu")
    assert "--decoder gpu" in advised("jpeg_decoding", decoder="cpu")
    assert "--decoder" not in advised("jpeg_decoding") and "hw_decoder_load" in advised("jpeg_decoding")
    held = advised("jpeg_decoding", "data.threads=4", decoder="cpu")
    assert "a larger data.threads" in held and "cores" not in held
    assert "h264" in advised("video_decoding") and "h264" not in advised("video_decoding", assumed=("decoded=1.7",))
