"""What it costs that an evaluation gives the same bits for any ranks, batches and threads: towers in blocks of one thread each,
beside whole batches of 32 that all threads share, as torch does it by itself.

    python bench/exactness.py [--clips 32] [--backbone ViT-B-32] [--repeats 2]

Random weights and pixels; nothing is decoded. Writes bench/results/exactness.json.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from bench import harness

FRAMES, WORDS, BATCH = 12, 32, 32
CAPTIONS_A_CLIP = 8


def main() -> int:
    parser = harness.parser(__doc__, "exactness", repeats=2)
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--backbone", default="ViT-B-32")
    args = parser.parse_args()
    ways, threads = prepared(args.backbone, args.clips)
    for way in ways.values():
        way()
    counts = {"clips": args.clips, "captions": CAPTIONS_A_CLIP * args.clips}
    rates = {
        name: {part: n / min(seconds[part] for seconds in rounds) for part, n in counts.items()}
        for name, rounds in harness.in_turn(ways, args.repeats).items()
    }
    rows = [[name, *(f"{rate:.1f}" for rate in parts.values())] for name, parts in rates.items()]
    harness.show(["", "clips/s", "captions/s"], rows, f"{args.backbone}, {threads} threads")
    about = {"backbone": args.backbone, "clips": args.clips, "threads": threads, "per_second": rates}
    harness.save(args.json, about | {"machine": harness.machine(), "versions": harness.versions("torch")})
    return 0


def prepared(backbone: str, clips: int) -> tuple[dict[str, Callable[[], dict[str, float]]], int]:
    """Both ways, each of which gives the seconds of its clips and of its captions, and the number of threads."""
    import torch

    from c4c.models.backbone import named
    from c4c.models.clip4clip import CLIP4Clip
    from c4c.retrieval.features import block_sizes
    from c4c.retrieval.work import EvalWork

    cpu = torch.device("cpu")
    model = CLIP4Clip(named(backbone)).eval()
    side = model.image_size
    videos, mask = torch.randn(BATCH, FRAMES, 3, side, side), torch.ones(BATCH, FRAMES, dtype=torch.bool)
    one = torch.zeros(1, 1, 3, side, side), torch.zeros(1, 1, dtype=torch.bool)
    tokens = torch.randint(1, 1000, (BATCH, WORDS))

    class Plain(EvalWork):
        """One piece after another, each by all threads."""

        def __enter__(self) -> "Plain":
            return self

        def __exit__(self, *_) -> None:
            pass

    def timed(work: EvalWork, encode: Callable[[slice], object], size: int, total: int) -> float:
        began = time.perf_counter()
        list(work.map(encode, [slice(i % BATCH, i % BATCH + min(size, total - i)) for i in range(0, total, size)]))
        return time.perf_counter() - began

    def encoded(work: EvalWork, sizes: tuple[int, int]) -> dict[str, float]:
        with work:
            return {
                "clips": timed(work, lambda piece: model(videos[piece], mask[piece], tokens[:1]), sizes[0], clips),
                "captions": timed(work, lambda piece: model(*one, tokens[piece]), sizes[1], CAPTIONS_A_CLIP * clips),
            }

    return {
        "batches of 32, all threads": lambda: encoded(Plain(cpu), (BATCH, BATCH)),
        "blocks, a thread each": lambda: encoded(EvalWork(cpu), block_sizes(cpu, FRAMES)),
    }, torch.get_num_threads()


if __name__ == "__main__":
    sys.exit(main())
