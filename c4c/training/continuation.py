"""Whether settings go on with a run that exists."""

from pathlib import Path

from c4c.config import Config, to_dict
from c4c.models.backbone import settled
from c4c.training.run_folder import check_continuation
from c4c.zero import checkpoint
from pipelines.config import DataConfig

TEST = "test"  # of a checkpoint's state: the digest of the split that the run was validated on


def note_on_test_split(about: dict, digest: str, path: object) -> str:
    """What to tell of a run whose checkpoint says `about`, if its test split holds something else by now; '' if not."""
    before = about.get(TEST, digest)
    if before == digest:
        return ""
    return (
        f"{path} is not the data that this run was validated on before (digest {digest[:12]}, was {before[:12]}): its best checkpoint, and "
        "train.patience, compare results of two sets"
    )


def require_continues(run: Path, config: Config, digest: str | None = None) -> None:
    """Raise ValueError, naming every difference, if `config` would not continue `run`.

    digest: of the training data, which may be at another place by now. Given, the caller also compares the digests that the run's
    checkpoints have of a teacher and of what is frozen, so that these may come from another place. Without it names have to be the same.
    """
    about = checkpoint.newest_state(run)
    if checkpoint.AVERAGE in about:
        raise ValueError(
            f"run.resume=auto: {run} is an average of checkpoints, without the state that a run goes on from. Start a new run from its "
            f"weights: model.init_from={run} run.dir=NEW"
        )
    free = ["data.train"] if digest and about.get("data") == digest else []
    if digest and checkpoint.FROZEN in about:
        free += ["model.init_from", "model.init_tag", "model.init_ema"]
    if digest and checkpoint.TEACHER in about and config.train.teacher and config.train.teacher_weight:
        free.append("train.teacher")
    before = Config(data=DataConfig().filled())  # of settings that the run had no key for: it was made as for CLIP
    check_continuation(run, to_dict(settled(config)), to_dict(before), tuple(free))
