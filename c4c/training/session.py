"""Model, data and engine of one rank, built as a configuration says; what training, --check and --replay share."""

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist

from c4c.config import Config, require, to_dict
from c4c.models import origin
from c4c.models.backbone import other_towers, settled, spec_of
from c4c.models.clip4clip import CLIP4Clip, build
from c4c.models.tokenizer_spec import FILES, with_files
from c4c.objective import LossOptions
from c4c.retrieval.evaluate import evaluate
from c4c.retrieval.evaluation import Evaluation
from c4c.retrieval.feature_file import FeatureFile, is_feature_file
from c4c.retrieval.features import block_sizes
from c4c.retrieval.work import EvalWork
from c4c.training.agreement import agree, any_rank, on_first_rank
from c4c.training.continuation import TEST, note_on_test_split, require_continues
from c4c.training.memory import out_of_memory
from c4c.training.outcome import Outcome
from c4c.training.param_groups import choose_trained
from c4c.training.run_folder import read_towers
from c4c.training.step import Learner, train_step
from c4c.training.stored_teacher import StoredTeacher
from c4c.training.teacher import Teacher, load_teacher
from c4c.zero import checkpoint, state
from c4c.zero.checkpoint import FROZEN, TEACHER
from c4c.zero.engine import build_engine
from c4c.zero.skipping import was_applied
from c4c.zero.snapshot import restore
from pipelines.lanes import require_decoder
from pipelines.loader import Batch, Loader
from pipelines.survey import notes
from pipelines.tokens import Tokenizer
from shards.concat import open_splits
from shards.dataset import Dataset
from shards.split import Split


class Session:
    """One rank's engine and loader. Raises ValueError for what cannot be done.

    resume: the run folder to load the state from, None for a new start. tag: which of its checkpoints, None for the newest
    that is not damaged; `notes` has a line for each reason why that is not the latest. from_start: start at step 0, as the run in
    `resume` did.
    """

    def __init__(
        self, config: Config, rank: int, world: int, device: torch.device, *, resume: Path | None = None,
        tag: str | None = None, from_start: bool = False, quarantine: Path | None = None,
    ):  # fmt: skip
        require(config)
        self.config = config = settled(config)
        self.rank, self.world, self.device = rank, world, device
        self.split = open_splits(config.data.train, config.data.local)
        self.test = Split(config.data.test, config.data.local)
        for split in (self.split, self.test):
            require_decoder(split, config.data, device)
        if resume:
            require_continues(resume, config, self.split.digest)
        agree(_identity(config, self.split, self.test), world)
        self.tag = tag  # of the checkpoint to go on from, None at the start of a run
        self.notes: list[str] = []
        if resume and tag is None and not from_start:
            self.tag, self.notes = on_first_rank(lambda: checkpoint.newest_intact(resume), rank, world)
        self._frozen: dict = {}  # what checkpoints say of the weights that they leave out
        left_out = self._build(resume)
        self.model.check_data(config.data, config.model.backbone)
        spec = with_files(self.model.spec, resume / FILES) if resume else self.model.spec
        self.tokenizer = Tokenizer(spec.get("tokenizer"))
        self.tokenizer.length(config.data.max_words)  # refuses now what it would refuse after minutes
        self.model.set_pixels(config.data)
        self._teacher = self._read_teacher(resume)
        size = sum(p.numel() for p in self.model.parameters()) / 1e6
        with self._memory(f"the model has {size:.1f} M weights, beside which optimizers keep masters and moments",
                          "engine.offload=optimizer, or engine.zero_stage=3 on several ranks"):  # fmt: skip
            learner = Learner(self.model, config.train.loss, config.train.logit_bias, LossOptions.of(config.train))
            learner.left_out, learner.teacher = left_out, self._teacher
            if self.tag:
                learner.notes.clear()  # on weights that the checkpoint replaces
            learner.notes += [self._teacher.about] if self._teacher else []
            self.engine = build_engine(learner, config.engine, config.train, world, config.deepspeed)
        about = restore(self.engine, resume, self.tag) if resume and self.tag else {}
        self.done = int(about.get("step", 0))  # steps
        if (digest := about.get("data", self.split.digest)) != self.split.digest:
            raise ValueError(
                f"run.resume=auto: {self.split.path} is not the data that {resume} was trained on (digest "
                f"{self.split.digest[:12]}, was {digest[:12]}). Name the same split, or start anew with run.resume=never"
            )
        if note := note_on_test_split(about, self.test.digest, self.test.path):
            learner.notes.append(note)
        self.loader = Loader(
            self.split, config.data, batch_size=config.train.batch_size, seed=config.run.seed,
            drop_last=config.train.drop_last, rank=rank, world=world, device=device, quarantine=quarantine,
            cache=config.cache, clips=config.clips, raw=device.type == "cuda" or self.model.folds_pixels,
            tokenizer=self.tokenizer, captions_per_video=config.train.captions_per_video,
        )  # fmt: skip
        self.per_epoch = self.loader.steps_per_epoch
        # what hosts decide they exchange between hosts: on the default group of GPUs, each answer would wait for the step
        self._hosts: dist.ProcessGroup | None = None
        if device.type == "cuda" and world > 1:
            hosts = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.engine.timeout_s + 300))
            self._hosts = hosts if isinstance(hosts, dist.ProcessGroup) else None
        self.total = config.train.total_steps(self.per_epoch)

    def _build(self, resume: Path | None) -> frozenset[str]:
        """The model with the weights that it starts from; returns the names of those that its checkpoints leave out."""
        config, about = self.config, {}
        if resume and self.tag:
            about = checkpoint.read_state(resume / checkpoint.FOLDER / self.tag)
        # a replay from the start reads no checkpoint; those that came later tell which frozen weights it started from
        later = checkpoint.newest_state(resume) if resume and not self.tag else {}
        before, model = (about or later).get(FROZEN), config.model
        if before:
            model = origin.same_source(model, before)
        if not resume and not (model.init_from and Path(model.init_from).exists()):  # those may bring its files along
            Tokenizer(spec_of(model).get("tokenizer"))  # fails here before large towers are built or fetched
        torch.manual_seed(config.run.seed)
        run_towers, towers_file = (read_towers(resume), resume / "towers.json") if resume else (None, None)
        # all weights come from the checkpoint: what they started from counts no more
        if about and run_towers and not before:
            self.model = CLIP4Clip(
                run_towers, model.head, model.linear_patch, model.head_layers, config.data.num_frames, model.merging
            )
        else:
            self.model = build(model, config.data.num_frames, config.data.image_size)
            if run_towers and (changed := other_towers(run_towers, self.model.spec)):
                raise ValueError(
                    f"run.resume=auto: {resume} was trained with other towers than model.init_from={model.init_from} describes now "
                    f"({', '.join(changed)} differ from {towers_file}): what it names has changed. Put it back"
                )
        choose_trained(self.model, config.train)
        names = origin.left_out(self.model, config)
        if names and (before or not (about or config.checkpoint.whole)):
            self._frozen = on_first_rank(
                lambda: origin.describe(self.model, names, model, before), self.rank, self.world
            )
        # whole checkpoints stay so: what the source holds now counts no more
        if config.checkpoint.whole or (about and not before):
            self._frozen = {}
        return names if self._frozen else frozenset()

    def _read_teacher(self, resume: Path | None) -> Teacher | StoredTeacher | None:
        """The same on every rank, and the one that the run in `resume` has learned from."""
        config, train = self.config, self.config.train
        teacher: Teacher | StoredTeacher | None
        if train.teacher_weight and is_feature_file(train.teacher):
            teacher = StoredTeacher(FeatureFile(train.teacher), self.split, config, self.device)
        else:
            with self._memory(
                "the model of train.teacher is in memory beside the one that is trained", "a smaller one"
            ):
                teacher = load_teacher(train, config.data, self.model.spec, self.device, config.engine.precision)
        if teacher is None:
            return None
        agree({"contents of train.teacher": teacher.digest}, self.world)
        if resume:
            folder = resume / checkpoint.FOLDER
            about = checkpoint.read_state(folder / self.tag) if self.tag else checkpoint.newest_state(resume)
            if about.get(TEACHER) not in (None, teacher.digest):
                raise ValueError(
                    f"run.resume=auto: train.teacher={teacher.name} is not what the run has learned from (its digest is "
                    f"{teacher.digest[:12]}, was {about[TEACHER][:12]}). Put that back, or start anew with run.resume=never"
                )
        return teacher

    def warnings(self) -> list[str]:
        """What a person should know before the steps begin. Reads captions for a second."""
        return notes(self.split, self.test, self.config.data, self.tokenizer) + list(
            filter(None, [self.config.train.endless_warmup(self.per_epoch)])
        )

    @property
    def weights(self) -> int:
        """How many the model has."""
        return sum(state.size(p) for p in self.engine.module.parameters())

    @property
    def trained(self) -> int:
        """How many of them are trained."""
        return sum(state.size(p) for p in self.engine.module.parameters() if p.requires_grad)

    @property
    def stored(self) -> int:
        """How many of them its checkpoints hold."""
        left_out = self.engine.module.left_out
        return sum(state.size(p) for name, p in self.model.named_parameters() if name not in left_out)

    def batches(self, count: int):
        """The next `count` batches after the steps that are done."""
        epoch, step = divmod(self.done, self.per_epoch)
        return self.loader.batches(epoch, step, max(0, count))

    def step(self, batch: Batch, *answers: bool) -> Outcome:
        """One update on every rank. Returns as soon as it is launched: see `Outcome`.

        answers: this rank's, to what ranks have to decide alike; in `Outcome.answers` each is true if it is on any rank.
        """
        train = self.config.train
        factor = train.factor(self.done, self.per_epoch)
        with self._memory(*self._step_memory(len(batch.valid))):
            loss = train_step(self.engine, batch, factor, train, train.frozen(self.done / self.per_epoch))
        sums = torch.stack([loss.double(), batch.valid.sum().double()])
        if self.world > 1:
            dist.all_reduce(sums)
        self.done += 1
        with state.gathered(self.model.clip.logit_scale):  # of which no rank has the whole under ZeRO 3
            scale = self.model.scale().detach()
        bias = self.model.clip.logit_bias if train.loss == "sigmoid" else None
        if bias is not None:
            with state.gathered(bias):
                bias = bias.detach().float().clone()
        return Outcome(
            sums[0], sums[1], scale, self.engine.get_global_grad_norm(), world=self.world, lr=train.lr * factor,
            applied=was_applied(self.engine), answers=any_rank(answers, self._hosts),
            logit_bias=bias,
        )  # fmt: skip

    def evaluate(self, split: Split | None = None, each: Callable[[], None] = lambda: None) -> Evaluation:
        """What the model, with `train.ema` its averaged weights, finds in a split (the test split), the same on every rank.

        each: called equally often on every rank.
        """
        data, lockstep = self.config.data, self.engine.zero_optimization_stage() == 3
        # what threads compute at once does not pass through the engine, which counts and keeps what passes
        encode = self.engine if lockstep or self.device.type != "cpu" else self.engine.module
        work = EvalWork(self.device, lockstep=lockstep, at_once=self.engine.module.compiled is None)

        def encoded_some(kind: str, *_) -> None:
            if kind != "texts":  # of those, ranks have different numbers of tiles
                each()

        average, compiled = self.engine.average, self.engine.module.compiled
        # its blocks have other shapes than training's: to compile towers for them takes a GPU's minutes, and saves seconds
        as_they_are = compiled.paused() if compiled and self.device.type != "cpu" else nullcontext()
        self.engine.eval()
        with average.in_use(self.engine) if average else nullcontext(), as_they_are, self._memory(f"validation encodes {block_sizes(self.device, data.num_frames)[0]} videos of {data.num_frames} frames "
                          f"at once, and decodes {data.eval_batch_size} meanwhile", "a smaller data.eval_batch_size"):  # fmt: skip
            evaluation = evaluate(
                self.model, encode, split or self.test, data, work, encoded_some, tokenizer=self.tokenizer
            )
        self.engine.train()
        return evaluation

    def position(self) -> dict:
        """What a checkpoint says beside the step, for people and to recognise the data."""
        epoch, step = divmod(self.done, self.per_epoch)
        frozen = {FROZEN: self._frozen} if self._frozen else {}
        teacher = {TEACHER: self._teacher.digest} if self._teacher else {}
        digests = {"data": self.split.digest, TEST: self.test.digest}
        return {"epoch": epoch, "step_of_epoch": step} | digests | frozen | teacher

    @contextmanager
    def _memory(self, doing: str, remedies: str) -> Iterator[None]:
        """Turn running out of memory into an error that says what to change."""
        try:
            yield
        except RuntimeError as error:
            explanation = out_of_memory(error, doing, remedies)
            if explanation is None:
                raise
            raise ValueError(explanation) from error

    def _step_memory(self, rows: int) -> tuple[str, str]:
        train, frames = self.config.train, self.config.data.num_frames
        encoded = train.rows_at_once(rows)
        return (
            f"each rank encodes {encoded} of its {rows} {train.row}s at once, {encoded * frames} frames",
            f"train.micro_batch_size={max(1, encoded // 2)} (same losses, a second forward pass), "
            "engine.activation_checkpointing=true, engine.offload=optimizer, a higher engine.zero_stage on several ranks, "
            "or a smaller train.batch_size",
        )


def _identity(config: Config, train: Dataset, test: Split) -> dict[str, object]:
    """What has to be the same on every rank."""
    flat = {f"{group}.{key}": value for group, keys in to_dict(config).items() for key, value in keys.items()}
    versions = {name: version(name) for name in ("torch", "deepspeed")} | {"python": platform.python_version()}
    return flat | versions | {"contents of data.train": train.digest, "contents of data.test": test.digest}


def make_deterministic() -> None:
    """Bit for bit the same on the same machine and number of ranks. Before anything touches a GPU."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # all memory is written before it is read
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
