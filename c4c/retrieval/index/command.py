"""What `python -m c4c.index` does, on every rank that a launcher started."""

import json
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import c4c
from c4c.files import replace_text
from c4c.launched import seen_enough
from c4c.retrieval.encoder import Encoder, Identity
from c4c.retrieval.index.build import IndexCounts, Indexing
from c4c.retrieval.index.plan import IndexPlan, ListedVideo, VideoSources, compare
from c4c.retrieval.index.screen import IndexReport, summary
from c4c.retrieval.index.store import About, Store
from c4c.retrieval.search.show import plain
from c4c.zero import checkpoint
from c4c.zero.distributed import join_ranks, launched, stop_distributed
from pipelines.cores import cores
from pipelines.segments import Cutting
from shards import count

_ROUNDS = 3  # until no two files have one name, which two processes that begin at once may give them
_PATIENCE_S = 30 * 24 * 3600.0  # that a rank which is done waits for the others


def index(args: Namespace, cutting: Cutting, sources: VideoSources, listed: Sequence[ListedVideo]) -> int:
    """Index; returns the exit code: 1 if not one video could be indexed. Raises ValueError and OSError.

    listed: all videos, on rank 0."""
    began = time.monotonic()
    rank, world, device = join_ranks(args.device, _PATIENCE_S)
    try:
        known = Store.about_of(args.out)
        encoder = _encoder(args, device, rank, known)
        store = _store(args.out, encoder, cutting, rank)
        if store.about.runtime != encoder.runtime:  # another command made the index meanwhile
            encoder = Encoder.load(args.ckpt, args.tag, args.backbone, device, store.about.runtime, ema=not args.no_ema)
        every: list[IndexCounts] = []
        plans: list[IndexPlan] = []
        for _ in range(_ROUNDS):
            plan = _agreed(_plan(args, store, sources, listed, again=bool(plans)) if rank == 0 else None)
            every.append(_index(args, store, encoder, sources, cutting, plan, rank, world))
            if rank == 0:
                _drop_renamed(store, plan)
            plans.append(plan)
            if not _agreed(rank == 0 and bool(_doubled(store))):
                break
        counts = [one for part in every for one in _gathered(part)]
        if rank:
            return 0
        return _finish(args, store, encoder, sources, plans, counts, time.monotonic() - began)
    finally:
        if launched() > 1:
            stop_distributed()


def _agreed(value: Any) -> Any:
    """What rank 0 says, on every rank."""
    if launched() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _gathered(counts: IndexCounts) -> list[IndexCounts]:
    if launched() == 1:
        return [counts]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, counts)
    return parts


def _encoder(args: Namespace, device: torch.device, rank: int, known: About | None) -> Encoder:
    """The model. All vectors of an index come from one runtime, which rank 0 chooses for all."""
    runtime = args.runtime
    if known is not None:
        if runtime not in ("auto", known.runtime):
            raise ValueError(
                f"{args.out} is an index by --runtime {known.runtime}, not {runtime}: leave --runtime away"
            )
        runtime = known.runtime
    encoder = None
    if rank == 0:
        encoder = Encoder.load(args.ckpt, args.tag, args.backbone, device, runtime, ema=not args.no_ema)
        runtime = encoder.runtime
    runtime = _agreed(runtime)
    return encoder or Encoder.load(args.ckpt, args.tag, args.backbone, device, runtime, ema=not args.no_ema)


def _store(uri: str, encoder: Encoder, cutting: Cutting, rank: int) -> Store:
    about = About(
        identity=encoder.identity.to_dict(), late=encoder.late, width=encoder.identity.width,
        num_frames=encoder.data.num_frames, segment_s=cutting.segment_s, stride_s=cutting.stride_s,
        runtime=encoder.runtime, version=c4c.__version__,
    )  # fmt: skip
    if rank == 0:
        with tempfile.TemporaryDirectory(prefix="c4c-text-") as folder:
            encoder.save(Path(folder) / "text")
            store = Store.create(uri, about, Path(folder) / "text")
        _agreed(None)
        return store
    _agreed(None)  # the first rank has made it
    return Store.open(uri)


def _plan(
    args: Namespace, store: Store, sources: VideoSources, listed: Sequence[ListedVideo], again: bool
) -> IndexPlan:
    """What is to be done; the index without what is not to stay. again: the first round has refreshed and retried."""
    plan = compare(
        listed,
        store.known(),
        store.failed(),
        sources,
        refresh=args.refresh and not again,
        retry=args.retry and not again,
    )
    store.delete_sets([(one.video, one.written) for one in plan.doubled])
    if args.prune:
        store.delete_sets([(one.video, one.written) for one in plan.vanished])
    store.forgive(plan.forgiven)
    return plan


def _drop_renamed(store: Store, plan: IndexPlan) -> None:
    """Delete the rows that stand under another name than the video has now."""
    if plan.renamed:
        names = set(store.videos())
        gone = [one.old for one in plan.renamed if one.changed or one.video in names]
        store.delete_sets([(one.video, one.written) for one in gone])


def _doubled(store: Store) -> bool:
    names = [one.video for one in store.known()]
    return len(names) > len(set(names))


def _index(
    args: Namespace, store: Store, encoder: Encoder, sources: VideoSources, cutting: Cutting, plan: IndexPlan, rank: int,
    world: int,
) -> IndexCounts:  # fmt: skip
    """This rank's share of the plan; all ranks' shares are done when it returns."""
    jobs = plan.jobs[rank::world]
    failed = {failure.path for failure in store.failed()}
    with IndexReport(rank == 0, len(jobs), f" of rank 0 of {world}" if world > 1 else "") as report:
        indexing = Indexing(
            store, encoder, sources, cutting, threads=args.threads or cores(), commit=args.commit,
            before=plan.before, failed=failed, tell=report.tell,
        )  # fmt: skip
        counts = indexing.run(jobs)
    if world > 1:
        dist.barrier()
    return counts


def _of_run(asked: str | None, identity: Identity) -> list[str]:
    """Which checkpoint of a run the vectors are of; nothing for other weights. asked: what --tag says."""
    if identity.tag is None:
        return []
    run = Path(identity.checkpoint)
    folder = run / checkpoint.FOLDER / identity.tag
    lines = [f"checkpoint  {folder}{checkpoint.which_weights(folder, identity.ema)}"]
    return lines + ([f"            {gone}"] if (gone := checkpoint.better_gone(run, asked)) else [])


def _finish(
    args: Namespace, store: Store, encoder: Encoder, sources: VideoSources, plans: list[IndexPlan],
    counts: list[IndexCounts], seconds: float,
) -> int:  # fmt: skip
    if notice := store.tidy(args.ann):
        print(f"note: {notice}", file=sys.stderr)
    first = plans[0]
    if first.coded:
        print(
            f"note: {count(first.coded, 'video')} of {args.out} {'has' if first.coded == 1 else 'have'} the coded name that "
            "earlier versions gave (sub%2Fred of sub/red), which filters by name do not find; --refresh gives each its own",
            file=sys.stderr,
        )  # fmt: skip
    bad = {failure.path: failure.reason for failure in (*first.failed, *(f for one in counts for f in one.failures))}
    bad |= dict(sources.unlisted)
    agreements = [one.agreement for one in counts if one.agreement is not None]
    result = {
        "index": args.out, "checkpoint": encoder.identity.to_dict(), "runtime": encoder.runtime, "device": str(encoder.device),
        "videos": sum(one.videos for one in counts), "segments": sum(one.segments for one in counts),
        "frames": sum(one.frames for one in counts), "hours": sum(one.video_s for one in counts) / 3600,
        "unchanged": first.unchanged, "index_videos": store.n_videos, "index_segments": len(store),
        "unreadable": [{"path": path, "reason": bad[path]} for path in sorted(bad)],
        "vanished": [one.video for one in first.vanished], "pruned": bool(args.prune), "skipped": len(sources.skipped),
        "ann": store.has_ann, "agreement": min(agreements, default=None), "seconds": seconds,
        "indexing_s": max(one.indexing_s for one in counts),
        "times": {name: sum(asdict(one)[name] for one in counts) for name in ("wait_s", "towers_s", "write_s", "read_s")},
    }  # fmt: skip
    if args.json:
        replace_text({args.json: json.dumps(result, indent=2) + "\n"})
    lines = summary(result)
    lines += _of_run(args.tag, encoder.identity)
    if args.verbose and sources.skipped:
        lines.append(f"skipped     {count(len(sources.skipped), 'file')}, no videos by their names")
        lines += [f"    {plain(path)}" for path in sources.skipped]
    with seen_enough():
        print("\n".join(lines))
    if not result["index_videos"]:
        print(f"error: {args.out} is empty: not one of the videos could be read", file=sys.stderr)
        return 1
    return 0
