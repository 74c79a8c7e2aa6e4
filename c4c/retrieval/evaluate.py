"""A checkpoint's metrics on splits: what `launch/eval.py` does, and what validation in training does."""

import json
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console

from c4c.config import override_data
from c4c.files import replace_text
from c4c.launched import seen_enough
from c4c.merging import Merging
from c4c.models.backbone import preprocess_of
from c4c.models.clip4clip import CLIP4Clip
from c4c.models.heads.mean import Cosine
from c4c.models.pretrained import check_names, evaluation_settings, open_checkpoint, weights_taken
from c4c.retrieval import rerank
from c4c.retrieval.evaluation import Evaluation
from c4c.retrieval.features import Encode, Tell, captions_of, encode_texts, encode_videos
from c4c.retrieval.metrics import ScoreGrid, grid_ranks, report, summarize
from c4c.retrieval.order_pairs import pair_groups, score_pairs
from c4c.retrieval.output import require_dump, write_dump, write_ranks, write_top
from c4c.retrieval.request import Request
from c4c.retrieval.views import ONE_VIEW, Views, combined, score_of
from c4c.retrieval.work import EvalWork, aligned
from c4c.training.run_folder import is_run, located
from c4c.training.screen import EvalReport, metrics_table
from c4c.zero import checkpoint
from c4c.zero.distributed import join_ranks, launched, stop_distributed
from c4c.zero.patches import quiet_libraries
from pipelines.config import DataConfig
from pipelines.survey import notes
from pipelines.tokens import Tokenizer
from shards import count
from shards.dataset import Dataset
from shards.split import Split


def evaluate(
    model: CLIP4Clip,
    encode: Encode,
    split: Split,
    config: DataConfig,
    work: EvalWork,
    tell: Tell = lambda *_: None,
    *,
    tokenizer: Tokenizer,
    views: Views = ONE_VIEW,
) -> Evaluation:
    """What the model finds in `split`; the same on every rank. encode: the model, or what computes for it."""
    config = config.filled(preprocess_of(model.spec))
    with work, aligned(model), torch.no_grad():
        texts, owners = captions_of(split, config)
        times = [time.perf_counter()]
        made, waited = encode_videos(encode, split, config, work, tell, tokenizer=tokenizer, views=views)
        times.append(time.perf_counter())
        of_texts = encode_texts(texts, encode, config, work, tell, tokenizer=tokenizer)
        times.append(time.perf_counter())
        owner, of_videos = torch.tensor(owners, device=work.device), combined(model.head, made)
        score = score_of(model.head, len(views))
        grid = ScoreGrid.of(of_texts, of_videos, owner, score)
        by_text, by_video = grid_ranks(grid, work, tell)
        metrics = report(by_text, by_video)
        if (groups := pair_groups(split)) is not None:
            metrics["pairs"] = score_pairs(grid, groups, by_text, work)
        times.append(time.perf_counter())
    videos_s, captions_s, ranking_s = (then - before for before, then in pairwise(times))
    return Evaluation(
        split, config, texts, [split.video(i).id for i in range(len(split))], owner, of_texts, of_videos, score,
        by_text, by_video, metrics, {},
        {"decode wait": waited, "towers": videos_s - waited, "captions": captions_s, "ranking": ranking_s},
    )  # fmt: skip


def rerank_by_dsl(evaluation: Evaluation, model: CLIP4Clip, work: EvalWork) -> None:
    """Add the row of the dual softmax to what an evaluation found."""
    scale = rerank.DSL_SCALE if model.head.scaled else 1.0  # of heads whose scores are no cosines
    rows = report(*rerank.dsl(evaluation.grid, work, scale, cosines=model.head.scaled))
    evaluation.rows["DSL"] = {way: rows[way] for way in ("t2v", "v2t")} | {
        "sees_all_test_queries": True,
        "inverse_temperature": scale,
    }


def rerank_by_bank(
    evaluation: Evaluation,
    model: CLIP4Clip,
    work: EvalWork,
    tell: Tell,
    tokenizer: Tokenizer,
    bank: Dataset,
    bank_videos: bool,
) -> None:
    """Add the row of querybank normalisation to what an evaluation found. bank_videos: encode its videos too, for video to text."""
    texts, _ = captions_of(bank, evaluation.data)
    tell_of_bank = lambda kind, done, total: tell(f"{kind} of the bank", done, total)  # noqa: E731
    scale = rerank.QBNORM_SCALE if model.head.scaled else 1.0
    row: dict = {}
    with work, aligned(model), torch.no_grad():
        queries = encode_texts(texts, model, evaluation.data, work, tell_of_bank, tokenizer=tokenizer)
        owner = torch.arange(len(texts), device=work.device)
        of_videos = rerank.text_bank(
            ScoreGrid.of(queries, evaluation.video_features, owner, evaluation.score), work, scale
        )
        by_text = rerank.qbnorm_by_text(evaluation.grid, work, of_videos, scale)
        row["t2v"] = summarize(by_text, lower_median=len(evaluation.texts) != len(evaluation.keys))
        if bank_videos:
            views, _ = encode_videos(model, bank, evaluation.data, work, tell_of_bank, tokenizer=tokenizer)
            videos = combined(model.head, views)
            grid = ScoreGrid.of(evaluation.text_features, videos, evaluation.video_of_text, score_of(model.head, 1))
            by_video = rerank.qbnorm_by_video(evaluation.grid, work, rerank.video_bank(grid, work, scale), scale)
            row["v2t"] = summarize(by_video)
    evaluation.rows["QB-Norm"] = row | {
        "sees_all_test_queries": False,
        "inverse_temperature": scale,
        "bank": str(bank.path),
        "bank_texts": len(texts),
    }


@dataclass(frozen=True)
class OpenedCheckpoint:
    """What a request names, read. data: filled; name, tag: as c4c.training.run_folder.located gives them, tag resolved. what, kind: the
    checkpoint and which of its weights, for people."""

    model: CLIP4Clip
    data: DataConfig
    tokenizer: Tokenizer
    name: str
    tag: str | None
    what: str
    kind: str


def open_request(request: Request) -> OpenedCheckpoint:
    """The checkpoint of a request, with the request's settings. Raises ValueError for what cannot be done."""
    check_names(request.ckpt, request.tag, request.backbone, request.ema)
    name, tag, ema = located(request.ckpt, request.tag, request.ema)
    if is_run(name):
        tag = checkpoint.resolve(Path(name), tag)
    model, data = open_checkpoint(name, tag, request.backbone, ema, request.merging)
    data = override_data(data, list(request.words)).filled(preprocess_of(model.spec))
    model.resize_pictures(data.image_size)
    model.check_data(data, name)
    tokenizer = Tokenizer(model.spec.get("tokenizer"))
    tokenizer.length(data.max_words)
    model.set_pixels(data)
    what = str(Path(name) / checkpoint.FOLDER / tag) if tag else name
    return OpenedCheckpoint(model, data, tokenizer, name, tag, what, weights_taken(name, tag, ema))


def evaluate_checkpoint(request: Request) -> list[Evaluation]:
    """What `launch/eval.py` does, on every rank that a launcher started. Raises ValueError for what cannot be done."""
    quiet_libraries()
    rank, world, place = join_ranks(request.device)
    try:
        opened = open_request(request)
        data, tokenizer, name, tag = opened.data, opened.tokenizer, opened.name, opened.tag
        what, kind = opened.what, opened.kind
        _check(request, opened.model, data)
        model, made, results = opened.model.to(place), [], {}
        where = f"{world} x {place.type}" if world > 1 else str(place)
        for split in request.splits:
            for note in notes(None, split, data, tokenizer) if rank == 0 else ():
                print(f"warning: {note}", file=sys.stderr)
            with EvalReport(on=rank == 0) as progress:
                found = _evaluate(request, model, split, data, EvalWork(place), progress.tell, tokenizer)
            made.append(found)
            results[str(split.path)] = _result(found, what, request) | ({"weights": kind.strip(", ")} if kind else {})
            if model.merging or request.merging is not None:
                results[str(split.path)] |= {"merge": model.merging.tokens, "merge_frames": list(model.merging.joins)}
            if rank == 0:
                _write(request, found, results, f"{what}{kind}", Path(name) if tag else None)
                _show(
                    request, results[str(split.path)], f"checkpoint  {what}{kind}{_better(name, tag, request.tag)}", f"split       {split.path}",
                    f"encoded     {progress.pace}, {where}", *_of_merging(model.merging, request), *_of_pairs(found.metrics),
                )  # fmt: skip
        return made
    finally:
        if launched() > 1:  # whoever calls this in a process of its own keeps its group
            stop_distributed()


def _check(request: Request, model: CLIP4Clip, data: DataConfig) -> None:
    """Raise ValueError for what the checkpoint cannot do, before its work starts."""
    views = request.clips * request.crops
    if request.crops > 1 and data.resize_mode != "shortest":
        raise ValueError(
            f"--crops {request.crops}: this checkpoint's data.resize_mode={data.resize_mode} crops nothing; leave --crops out"
        )
    if request.crops > 1 and data.crop != "centre":
        raise ValueError(f"--crops {request.crops} shows every crop: leave data.crop={data.crop} out")
    if request.bank_videos and views > 1:
        raise ValueError("--bank-videos takes one clip and crop of each video: leave --clips and --crops out")
    if request.dump:
        require_dump(request.dump, request.splits[0], data, isinstance(model.head, Cosine))


def _evaluate(
    request: Request,
    model: CLIP4Clip,
    split: Split,
    data: DataConfig,
    work: EvalWork,
    tell: Tell,
    tokenizer: Tokenizer,
) -> Evaluation:
    """With all rows that are asked for."""
    views = Views(request.clips, request.crops)
    found = evaluate(model, model, split, data, work, tell, tokenizer=tokenizer, views=views)
    began = time.perf_counter()
    with aligned(model), torch.no_grad():
        if "dsl" in request.rerank:
            rerank_by_dsl(found, model, work)
        if request.bank is not None:
            rerank_by_bank(found, model, work, tell, tokenizer, request.bank, request.bank_videos)
    if request.rerank:
        found.timings["re-ranking"] = time.perf_counter() - began
    return found


def _result(evaluation: Evaluation, what: str, request: Request) -> dict:
    """What --json writes of one split."""
    result = evaluation.metrics | {
        "checkpoint": what,
        "split": str(evaluation.split.path),
        "split_digest": evaluation.split.digest,
        "data": evaluation_settings(evaluation.data),
    }
    if request.clips * request.crops > 1:
        result |= {"clips": request.clips, "crops": request.crops}
    return result | ({"rerank": evaluation.rows} if evaluation.rows else {})


def _write(request: Request, evaluation: Evaluation, results: dict[str, dict], what: str, run: Path | None) -> None:
    """The files that are asked for."""
    if request.ranks:
        write_ranks(request.ranks, evaluation.split, evaluation.data, evaluation.by_text)
    if request.dump:
        write_dump(request.dump, evaluation)
    if request.report:
        from c4c.retrieval.report import write_report

        with EvalReport(on=True) as progress:
            write_report(
                request.report, evaluation, run, what, views=(request.clips, request.crops), tell=progress.tell
            )
    if request.json and len(results) == len(request.splits):  # after the others: who finds it finds them too
        (first,) = results.values() if len(results) == 1 else (results,)
        replace_text({request.json: json.dumps(first, indent=2) + "\n"})
    if request.topk:  # last: printing may fail
        write_top(request.topk_to, evaluation, request.topk)


def _show(request: Request, result: dict, *lines: str) -> None:
    """Print the metrics; to standard error where standard output has what was found. Raises OSError."""
    console = Console(stderr=bool(request.topk and not request.topk_to))
    try:
        with seen_enough():
            with console.capture() as shown:  # rich ends the process by itself where nobody reads
                console.print(metrics_table(result))
                for line in lines:
                    console.print(line, highlight=False, markup=False, soft_wrap=True)
            print(end=shown.get(), file=console.file, flush=True)
    except OSError as error:
        raise OSError(f"the metrics cannot be printed ({error.strerror}); --json FILE writes them") from error


def _of_merging(merging: Merging, request: Request) -> list[str]:
    """A line on token merging in the image tower, where there is some or some was asked for."""
    asked = "as the checkpoint says" if request.merging is None else "by --merge, whatever the checkpoint says"
    return [f"merging     {merging.in_words()}, {asked}"] if merging or request.merging is not None else []


def _of_pairs(metrics: dict) -> list[str]:
    """A line on the order-only pairs, if there are some."""
    if (pairs := metrics.get("pairs")) is None:
        return []
    twin, guess = ("its twin", "50 %") if pairs["n_pairs"] else ("all of its twins", "less than 50 %")
    return [
        f"order pairs {count(pairs['n_texts'], 'text')}: R@1 {pairs['R1']:.1f} %, own video above {twin} {pairs['own_first']:.1f} % (guessing: {guess})"
    ]


def _better(name: str, tag: str | None, asked: str | None) -> str:
    """A word on a run's best checkpoint, if it is another. asked: what --tag says."""
    best = checkpoint.best(Path(name)) if tag else None
    if best and (gone := checkpoint.better_gone(Path(name), asked)):
        return f"    ({gone})"
    return "" if best in (None, tag) else f"    (the best of the run's own validations is {best}: --tag best)"
