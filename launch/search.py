"""Search an index of videos:  python launch/search.py my.index "a dog catches a frisbee" ["more sentences" …] [-k 10]

python launch/search.py my.index --video clip.mp4                # or --image photo.jpg: what looks like it
python launch/search.py my.index --queries queries.txt --json    # a sentence a line in, a JSON object a line out
python launch/search.py my.index "a cake" --path 'cooking/*' --max-duration 60 --html found.html
"""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # outside its environment too: then an error says what to do

from c4c.errors import exit_code
from c4c.launched import let_threads_sleep, open_streams, quick_imports
from c4c.option_checks import require_device


def main() -> int:
    """The command; returns its exit code."""
    let_threads_sleep()
    open_streams()  # for --help, too
    parser = argparse.ArgumentParser(
        description="Find the videos of an index that show what a sentence says, and when in them they do. Or search by an example: "
        "a clip or a picture.", allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("index", help="what `python -m c4c.index --out` wrote: a folder, or s3://…")
    parser.add_argument(
        "sentences", nargs="*", metavar="sentence", help="what the videos show; one that begins with - comes after --"
    )
    parser.add_argument("--queries", help="a file with a sentence a line; - reads standard input")
    parser.add_argument("--video", type=Path, help="search by this clip; needs the checkpoint that made the index")
    parser.add_argument("--image", type=Path, help="search by this picture; needs the checkpoint, too")
    parser.add_argument("-k", type=int, default=10, help="results a query (default: 10)")
    parser.add_argument("--path", help="a glob over videos' names ('cooking/*'), or a folder of the index")
    parser.add_argument("--min-duration", type=float, metavar="S", help="of videos, in seconds")
    parser.add_argument("--max-duration", type=float, metavar="S", help="of videos, in seconds")
    parser.add_argument(
        "--segments", action="store_true", help="several moments of a video, not only its best; none overlap"
    )
    parser.add_argument(
        "--ann", action="store_true", help="by the index's ANN: quicker in millions of segments, and may miss some"
    )
    parser.add_argument("--candidates", type=int, default=200, metavar="N", help="segments that a head which compares frames (wti, "
                        "seqWTI, tightTransf) scores one by one (default: 200)")  # fmt: skip
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE",
        help='write {"query", "results": [{"video", "start", "end", "score", "path", "id"}]}, a line a query, to FILE or standard '
        "output; with sentences, put it behind them",
    )  # fmt: skip
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the results with their pictures as one page")
    parser.add_argument("--no-pictures", action="store_true", help="no thumbnails on the terminal")
    parser.add_argument("--ckpt", help="for --video and --image: where the checkpoint of the index is now")
    parser.add_argument(
        "--device", help="cuda or cpu (default: sentences on the CPU, examples on a GPU where there is one)"
    )
    args = parser.parse_intermixed_args()
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Search. Mistakes are found first; what takes long to import comes after that."""
    from c4c.files import require_writable
    from c4c.retrieval.index.filters import Choice
    from c4c.retrieval.search.query import choose_queries, unquoted
    from c4c.retrieval.search.show import Out

    if args.json not in (None, "-") and not (args.sentences or args.queries or args.video or args.image):
        raise ValueError(f"--json took {args.json!r} for the name of its file: put --json behind the sentences")
    queries = choose_queries(args.sentences, args.queries, args.video, args.image, args.ckpt)
    require_device(args.device)
    if args.k < 1:
        raise ValueError(f"-k {args.k}: must be at least 1")
    how = {
        "path": args.path, "min_duration": args.min_duration, "max_duration": args.max_duration, "exact": not args.ann,
        "per_video": not args.segments, "candidates": args.candidates,
    }  # fmt: skip
    choice = Choice(**how)
    if args.json not in (None, "-"):
        require_writable(f"--json {args.json}", Path(args.json), lambda start: start.startswith(b'{"query"'))
    if args.html:
        require_writable(f"--html {args.html}", args.html, lambda start: b"c4c search" in start)
        if args.json and Path(args.json).resolve() == args.html.resolve():
            raise ValueError(f"--json and --html both name {args.html}: name two files")
    with quick_imports():
        from c4c.retrieval.search.searcher import Searcher

        searcher = Searcher.open(args.index, checkpoint=args.ckpt, device=args.device)
    for note in filter(None, (unquoted(args.sentences), *searcher.ignored(choice))):
        print(f"note: {note}", file=sys.stderr)
    with Out(searcher, args.json, args.html, pictures=not args.no_pictures) as out:
        for query in queries:
            out.show(query, *query.ask(searcher, args.k, how))
    return 0


if __name__ == "__main__":
    sys.exit(main())
