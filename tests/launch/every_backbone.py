"""Every family of backbones through whole runs, on two ranks and then on one: `every_backbone.py FOLDER DATA first|second`.

first   trains a run of each family at one ZeRO stage, which validates, and saves after its last step but one, too
second  goes on from there with another number of ranks and another stage

Writes FOLDER/first.json and second.json: by family, the losses of the steps that were taken, and notes.
"""

import json
import sys
from pathlib import Path

from tests import tiny_backbones

STEPS = 3
FRAMES = 2
# which family meets what beside its own kind of towers
WAYS = {
    "tiny-vit": ("engine.zero_stage=1", "model.head=seqTransf"),
    "tiny-resnet": ("engine.zero_stage=2",),
    "tiny-coca": ("engine.zero_stage=3", "model.head=wti"),
    "tiny-pe": ("engine.zero_stage=3", "train.micro_batch_size=2", "model.head=seqTransf"),
    "tiny-eva02": ("engine.zero_stage=3", "engine.activation_checkpointing=true"),
    "tiny-sigmoid": ("engine.zero_stage=2", "train.loss=sigmoid"),
    "tiny-convnext": ("engine.zero_stage=1",),
    "tiny-fastvit": ("engine.zero_stage=2", "engine.precision=bf16"),
    "tiny-vitamin": ("engine.zero_stage=0", "data.image_size=64"),
    "tiny-roberta": ("engine.zero_stage=3", "model.head=wti"),
}


def settings(name: str, data: Path, folder: Path) -> list[str]:
    return [
        f"data.train={data}/train", f"data.test={data}/test", f"run.dir={folder / name}", f"model.backbone={name}",
        f"data.num_frames={FRAMES}", "model.init_from=scratch", "train.batch_size=8", "train.warmup_epochs=0", "train.lr=1e-3",
        "data.eval_batch_size=16", f"train.max_steps={STEPS}", "engine.precision=fp32", "data.threads=1",
        f"train.eval_every_steps={STEPS - 1}", "checkpoint.keep_last=3", *WAYS[name],
    ]  # fmt: skip


def main(folder: Path, data: Path, part: str) -> None:
    import open_clip
    import torch

    from c4c.config import load
    from c4c.training.trainer import Trainer
    from c4c.zero.distributed import start_distributed, stop_distributed

    tiny_backbones.register()
    rank, world, device = start_distributed(300)
    (folder / "empty.yaml").write_text("{}\n")
    # as if a later open_clip meant other towers by the name: a run keeps those that it was trained with
    if part == "second":
        open_clip.factory._MODEL_CONFIGS["tiny-vit"]["quick_gelu"] = False
    found = {}
    for name in tiny_backbones.NAMES:
        words = settings(name, data, folder)
        if part == "second":
            words += ["run.resume=auto", "engine.zero_stage=1"]
        trainer = Trainer(load(str(folder / "empty.yaml"), words), rank, world, device)
        begun = trainer.session.done
        trainer.run()
        lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        losses = {line["step"]: line["train/loss"] for line in lines if line["step"] > begun}
        found[name] = {"losses": losses, "notes": trainer.session.model.notes}
        trainer.session.engine.destroy()
        torch.distributed.barrier()
    if rank == 0:
        (folder / f"{part}.json").write_text(json.dumps(found))
    stop_distributed()


if __name__ == "__main__":
    arguments = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    main(Path(arguments[0]), Path(arguments[1]), arguments[2])
