"""Search an index in the browser:  python launch/serve.py my.index   then open http://127.0.0.1:8000/

python launch/serve.py my.index --host 0.0.0.0 --port 8080      # for others too: with a token, which is printed
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # outside its environment too: then an error says what to do

from c4c.errors import exit_code
from c4c.launched import leave, let_threads_sleep, open_streams, quick_imports
from c4c.option_checks import require_checkpoint, require_not_empty
from c4c.retrieval.serve.options import MAX_UPLOAD_MB, TOKEN_VARIABLE, ServeOptions, bind, require_index


def main() -> int:
    """The command; returns its exit code."""
    let_threads_sleep()
    open_streams()  # for --help, too
    parser = argparse.ArgumentParser(
        description="Serve a page that searches an index: type a sentence, or drop a clip or a picture, and play what is found.",
        allow_abbrev=False,
    )
    parser.add_argument("index", help="what `python -m c4c.index --out` wrote: a folder, or s3://…")
    parser.add_argument(
        "--host", default="127.0.0.1", help="the address to listen at (default: 127.0.0.1, this machine alone)"
    )
    parser.add_argument("--port", type=int, default=8000, help="(default: 8000; 0: one that is free)")
    parser.add_argument(
        "--token",
        help=f"what requests must carry; the environment variable {TOKEN_VARIABLE} gives it too, hidden from other users. One is "
        "made up and printed where --host is not this machine alone",
    )
    parser.add_argument(
        "--ckpt", help="where the checkpoint of the index is now; needed to search by a clip or picture"
    )
    parser.add_argument(
        "--device", help="cuda or cpu (default: sentences on the CPU, examples on a GPU where there is one)"
    )
    parser.add_argument(
        "--max-upload-mb",
        type=int,
        default=MAX_UPLOAD_MB,
        help=f"the largest clip or picture (default: {MAX_UPLOAD_MB})",
    )
    parser.add_argument(
        "--root-path", default="", help="the path under which a reverse proxy serves the page, as in /search"
    )
    args = parser.parse_args()
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes. Mistakes are found first; what takes long to import comes after that."""
    token = os.environ.get(TOKEN_VARIABLE, "") if args.token is None else args.token
    require_not_empty([("token", args.token)])
    options = ServeOptions(
        index=args.index, host=args.host, port=args.port, token=token, checkpoint=args.ckpt, device=args.device,
        max_upload_mb=args.max_upload_mb, root_path=args.root_path.rstrip("/"),
    ).with_token()  # fmt: skip
    require_index(options.index)
    require_checkpoint(options.checkpoint)  # else it would come out with the first upload
    with bind(options.host, options.port) as listener:
        with quick_imports():
            from c4c.retrieval.search.searcher import Searcher
            from c4c.retrieval.serve.server import serve

        serve(Searcher.open(options.index, checkpoint=options.checkpoint, device=options.device), options, listener)
    leave(0, join_threads=False)  # nobody waits for their searches any more
    return 0


if __name__ == "__main__":
    sys.exit(main())
