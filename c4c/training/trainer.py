"""The training run, from a configuration to a run folder."""

import math
import shlex
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch

from c4c.config import Config, dump, to_dict
from c4c.launched import beside_script, command_again, explained_by
from c4c.models import origin
from c4c.models.backbone import settled
from c4c.models.flops import peak, per_pair
from c4c.models.tokenizer_spec import FILES, without_files
from c4c.retrieval.evaluation import Evaluation
from c4c.retrieval.output import write_ranks
from c4c.training.agreement import agree, on_first_rank
from c4c.training.bad_steps import BadSteps
from c4c.training.early_stopping import EarlyStopping
from c4c.training.lock import RunLock
from c4c.training.memory import memory_gib
from c4c.training.metric_log import Metrics, last_step
from c4c.training.outcome import Outcome
from c4c.training.peers import Peers
from c4c.training.run_folder import (
    RANKS,
    last_validation,
    mark_done,
    prepare,
    reopen,
    save_description,
    scores,
    validations,
)
from c4c.training.screen import Report
from c4c.training.session import Session, make_deterministic
from c4c.training.signals import Stop
from c4c.training.watchdog import Watchdog
from c4c.zero import checkpoint
from c4c.zero.checkpoint import CheckpointError
from c4c.zero.distributed import restarted, start_distributed, stop_distributed
from c4c.zero.snapshot import Saver
from pipelines.loader import Batch
from shards import count

_LAST_START_S = 30.0  # what a restarted run waits for the processes of the start before to be gone


def train(config: Config) -> None:
    """Train as `config` says, on every rank of the launcher. Raises ValueError for what cannot be done."""
    if config.run.deterministic:
        make_deterministic()
    # the watchdog, which can name a rank, comes first
    rank, world, device = start_distributed(config.engine.timeout_s + 300)
    lock = RunLock(Path(config.run.dir))
    try:
        with Peers(rank, world, config.engine.timeout_s) as peers, explained_by(peers.explain):
            Trainer(config, rank, world, device, lock, peers).run()
    finally:
        lock.release()
        stop_distributed()


@dataclass(frozen=True)
class _Line:
    """A step that is launched and whose line is not written yet; the batch itself is not kept."""

    step: int
    outcome: Outcome
    keys: list[str]
    wait_s: float
    loader: dict[str, float]  # its metrics
    seconds: float


def _history(folder: Path, done: int) -> tuple[bool, list[float]]:
    """Whether a run was validated after step `done`, and text-to-video R@1 of all its validations up to then."""
    return done in scores(folder), validations(folder, done)


class Trainer:
    """One rank's part of a run.

    On a GPU the line of step N, in metrics.jsonl and on the screen, is written once step N + 1 is launched, so that the GPU
    has work while the host waits for the numbers; on a CPU at once. Either way, line N holds the numbers of step N, its seconds
    are those from one launch to the next, and all lines are written before a checkpoint, a validation and the end.
    """

    def __init__(
        self, config: Config, rank: int, world: int, device: torch.device, lock: RunLock | None = None,
        peers: Peers | None = None,
    ):  # fmt: skip
        self._peers = peers
        config = settled(config)
        self.config, self.rank, self.world, self.device = config, rank, world, device
        self.folder = Path(config.run.dir)
        lock = lock or RunLock(self.folder)
        is_restart = restarted(device)  # the processes before may be about to end
        resume = "auto" if is_restart else config.run.resume
        on_first_rank(lambda: lock.take(make=False, wait_s=_LAST_START_S * is_restart), rank, world)
        resuming = resume == "auto" and checkpoint.exist(self.folder)
        agree({f"a checkpoint to continue from in {self.folder}": "there" if resuming else "missing"}, world)
        self.session = Session(
            config, rank, world, device, resume=self.folder if resuming else None,
            quarantine=self.folder / "quarantine.jsonl",
        )  # fmt: skip
        self.per_epoch, self.total = self.session.per_epoch, self.session.total
        # only now that nothing is left to be refused: a mistake must not move an earlier run aside
        moved = on_first_rank(lambda: self._make_folder(resume, lock), rank, world)
        # as rank 0 reads it: to other machines a shared folder may show what was there seconds ago
        self.validated, earlier = on_first_rank(lambda: _history(self.folder, self.session.done), rank, world)
        self.early = EarlyStopping(config.train.patience, earlier)
        if rank == 0 and self.session.done < self.total and not self.early.due:
            reopen(self.folder)
        self._lost = last_step(self.folder) if rank == 0 and not resuming else 0
        self.report = Report(rank == 0, self.total, self.per_epoch, self.session.done, earlier)
        self.saver = Saver(self.folder, config.checkpoint, self.report.say)
        self.bad = BadSteps(self.folder, config.train.max_bad_steps, self.session.done)
        self.reads_late = device.type == "cuda"
        self._unwritten: deque[_Line] = deque()
        self._compiled = self.session.engine.module.compiled
        self.metrics: Metrics | None = None
        if rank == 0:
            save_description(self.folder, dump(config), without_files(self.session.model.spec))
            self.session.tokenizer.save(self.folder / FILES)
            self.metrics = Metrics(self.folder, self.session.done, config.run.wandb, to_dict(config), self.report.say)
        self._introduce(moved)

    def _make_folder(self, resume: str, lock: RunLock) -> Path | None:
        if self.folder.exists():
            lock.take()
        moved = prepare(self.folder, resume, checkpoint.exist(self.folder))
        lock.take()  # in the new folder, if the old one was moved
        if self.session.notes and self.session.tag:
            checkpoint.point(self.folder, self.session.tag)
        return moved

    def run(self) -> None:
        """The training loop; see the class for which step a line shows."""
        session = self.session
        watching = Watchdog(self.rank, self.world, self.config.engine.timeout_s, peers=self._peers)
        with Stop(self.rank == 0) as stop, watching as watch, session.loader, self.report:
            if session.done and not self.validated:
                self._validate(watch)  # the run was killed between saving and validating
            self._mark = time.perf_counter()
            watch.now("waiting for data")
            try:
                for batch in session.batches(0 if self.early.due else self.total - session.done):
                    watch.now(f"at step {session.done + 1}")
                    outcome = session.step(
                        batch, bool(stop.signal), self.rank == 0 and self.saver.due(session.done + 1)
                    )
                    stopping, due = outcome.answers
                    saving = due or stopping or session.done % self.per_epoch == 0 or self._validation_due()
                    self._note(batch, outcome)
                    self._check_compiled()
                    self._write_lines(but=1 if self.reads_late and not saving else 0)
                    if saving:
                        watch.now("saving")
                        self.saver.save(session.engine, session.done, session.position())
                        if not stopping:
                            self._validate(watch)
                        self._mark = time.perf_counter()  # neither saving nor validation is part of a step
                    if stopping or self.early.due:
                        break
                    watch.now("waiting for data")
            finally:
                self._write_lines()  # whatever ended the loop, the last step was taken
            watch.now("saving")
            self.saver.wait()
        self._close(stop.signal)

    def _check_compiled(self) -> None:
        """After the first step: warn if a tower that should be compiled is not one graph."""
        compiled, self._compiled = self._compiled, None
        if compiled is not None and (problem := compiled.problem):
            self.report.say(f"warning: {problem}")

    def _note(self, batch: Batch, outcome: Outcome) -> None:
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        line = _Line(self.session.done, outcome, batch.keys, batch.wait_s, batch.stats.metrics(), seconds)
        self._unwritten.append(line)

    def _write_lines(self, but: int = 0) -> None:
        """Write the lines of all steps but the last `but`. Raises ValueError after too many bad steps in a row."""
        while len(self._unwritten) > but:
            try:
                self._write(self._unwritten.popleft())
            except ValueError:
                self._unwritten.clear()  # where lines are written at once, later steps are not even taken
                raise

    def _write(self, line: _Line) -> None:
        step, outcome = line.step, line.outcome
        finite = outcome.applied and math.isfinite(outcome.loss)
        searching = self.config.engine.precision == "fp16" and not math.isnan(outcome.loss) and not outcome.applied
        warning = self.bad.note(step, not finite and not searching, outcome.loss, line.keys, self.world, self.rank)
        if self.metrics is None:  # not rank 0
            return
        values = {
            "epoch": (step - 1) // self.per_epoch,
            "train/loss": outcome.loss,
            "train/lr": outcome.lr,
            "train/logit_scale": outcome.logit_scale,
            "train/grad_norm": outcome.grad_norm,
            "train/skipped_steps": self.bad.total,
            "data/wait_s": line.wait_s,
            "data/wait_pct": 100 * line.wait_s / line.seconds,
            "step_s": line.seconds,
            "clips_per_s": outcome.pairs / line.seconds,
            **line.loader,
            "frames_per_s": outcome.pairs * self.config.data.num_frames / line.seconds,
            "memory_gib": memory_gib(),
        }
        if outcome.logit_bias is not None:
            values["train/logit_bias"] = outcome.logit_bias
        if self._peak:
            values["mfu_pct"] = 100 * self._flops * outcome.pairs / line.seconds / (self._peak * self.world)
        self.metrics.step(step, values)
        self.report.step(step, values)
        if warning:
            self.report.say(warning)

    def _validate(self, watch: Watchdog) -> None:
        """If one is due at this step."""
        if not self._validation_due():
            return
        done = self.session.done
        evaluation = self.session.evaluate(each=lambda: watch.now("validating"))
        result = evaluation.metrics
        self.early.note(result["t2v"]["R1"], self.world, self.device)
        if self.metrics:
            self._write_ranks(evaluation)
            self.metrics.validation(done, result, self.config.train.ema)
        self.report.validation(done, result, bool(self.config.train.ema))

    def _write_ranks(self, evaluation: Evaluation) -> None:
        try:
            write_ranks(self.folder / RANKS, evaluation.split, evaluation.data, evaluation.by_text, meta=False)
        except OSError as error:  # a full disk ends no training
            self.report.say(f"warning: the ranks of this validation are not stored: {error}")

    def _validation_due(self) -> bool:
        train, done = self.config.train, self.session.done
        by_steps = train.eval_every_steps and done % train.eval_every_steps == 0
        epochs, rest = divmod(done, self.per_epoch)
        by_epochs = train.eval_every and not rest and epochs % train.eval_every == 0
        return bool(by_steps or by_epochs or done == self.total)

    def _close(self, stopped_by: str | None) -> None:
        done = self.session.done
        if self.metrics:
            self.metrics.close()
            if not self.saver.error:
                checkpoint.prune(self.folder, self.config.checkpoint)  # the last validation may have found a new best
        if self.saver.error:
            raise CheckpointError(
                f"{self.saver.error}. Make room and continue with\n    {command_again('run.resume=auto')}"
            )
        if done < self.total and not self.early.due:
            return self.report.say(
                f"stopped{f' by {stopped_by}' if stopped_by else ''} after step {done} of {self.total}, which is saved. Continue with\n"
                f"    {command_again('run.resume=auto')}"
            )
        best = checkpoint.best(self.folder) if self.rank == 0 else None
        run = shlex.quote(str(self.folder))
        tag = f" --tag {best}" if best and best != checkpoint.tag_of(done) else ""
        if self.rank == 0 and last_validation(self.folder) == done:  # a signal at the last step leaves that to do
            digests = {"train": self.session.split.digest, "test": self.session.test.digest}
            mark_done(self.folder, done, best or checkpoint.tag_of(done), digests)
        if done < self.total:
            self.report.say(
                f"{count(self.early.patience, 'validation')} in a row were no better: the run ends here (train.patience)"
            )
        self.report.summary(
            done, self.bad.total,
            f"python {beside_script('eval.py')} --ckpt {run}{tag}",
            f"tensorboard --logdir {run}",
            f"python -m c4c.export --ckpt {run}{tag} --to model.safetensors",
        )  # fmt: skip

    def _introduce(self, moved: Path | None) -> None:
        config, session = self.config, self.session
        cheap = config.train.partial
        trained = f", {session.trained / 1e6:.2f} M trained" if cheap else ""
        # nobody has counted the operations of a step that leaves gradients out
        self._peak = None if config.train.skips_backward else peak(self.device, config.engine.precision)
        self._flops = 3 * per_pair(
            session.model.spec, config.data.num_frames, session.tokenizer.length(config.data.max_words),
            session.loader.captions_a_row, config.model.merging, config.model.linear_patch,
        )  # fmt: skip
        if moved:
            never = config.run.resume == "never"
            why = (
                "run.resume=auto would have continued it" if never else "it was done, and holds no checkpoint any more"
            )
            self.report.say(f"an earlier run in {self.folder} was moved to {moved}; {why}")
        if self._lost:
            self.report.say(
                f"warning: {self.folder} has metrics up to step {self._lost}, but no checkpoint to continue from: this run starts from "
                "the first step"
            )
        self.report.say(
            f"{config.model.backbone} + {config.model.head}, {session.weights / 1e6:.1f} M weights{trained}; "
            f"{count(len(session.split), 'video')}, {self._rows()}; {count(self.total, 'step')} of {config.train.batch_size} on {self.world} "
            f"x {self.device.type}, ZeRO {session.engine.zero_optimization_stage()}, {config.engine.precision}; -> {self.folder}"
        )
        if self.device.type == "cuda":
            self.report.say(f"frames: {session.loader.how}")
        if config.engine.compile:
            self.report.say("the towers are compiled in the first steps, which takes minutes on some machines")
        for note in (*session.notes, *session.model.notes, *session.engine.module.notes, *session.loader.notes):
            self.report.say(note)
        for note in session.warnings() if self.rank == 0 else ():
            self.report.say(f"warning: {note}")
        self.report.say(f"weights: {self._origin()}")
        if config.train.ema:
            self.report.say(
                f"validation takes the average of the trained weights (train.ema={config.train.ema:g}), and so do evaluation and export"
            )
        if session.stored < session.weights:
            left = (session.weights - session.stored) / 1e6
            self.report.say(
                f"checkpoints leave out {left:.1f} M frozen weights, and read them from {origin.source(config.model)} again: keep it"
            )

    def _rows(self) -> str:
        """Of an epoch."""
        pairs, captions = self.session.loader.pairs, self.config.train.captions_per_video
        return (
            count(pairs, "pair") if captions == 1 else f"{count(pairs, 'row')} of a video and up to {captions} captions"
        )

    def _origin(self) -> str:
        """Where the weights come from."""
        model, session = self.config.model, self.session
        if session.tag:
            return f"{self.folder / checkpoint.FOLDER / session.tag}, continuing after step {session.done}"
        if model.init_from == "scratch":
            return f"random (model.init_from=scratch, run.seed={self.config.run.seed})"
        if not model.init_from:
            return model.backbone
        source = Path(model.init_from)
        if not source.exists():
            return f"open_clip's {model.init_from} of {model.backbone}"
        if not source.is_dir():
            return str(source)
        tag = checkpoint.best(source) if model.init_tag == "best" else model.init_tag
        folder = source / checkpoint.FOLDER / (tag or checkpoint.latest(source))
        return f"{folder}{checkpoint.which_weights(folder, model.init_ema)}"
