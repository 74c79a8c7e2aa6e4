"""Stages one after another:  python launch/stages.py --cfg two_stage.yaml [STAGE.key=value ...]

Finished stages are skipped; an unfinished one is resumed.
"""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # outside its environment too: then an error says what to do

from c4c.errors import exit_code
from c4c.launched import open_streams


def main() -> int:
    """The command; returns its exit code."""
    open_streams()  # for --help, too
    parser = argparse.ArgumentParser(description="Run training stages and evaluations in order.", epilog="STAGE.key=value "
                                     "words override settings of one stage, for example pretrain.train.lr=1e-6")  # fmt: skip
    parser.add_argument("--cfg", type=Path, required=True, help="a yaml file: a path, or the name of one in launch/cfg")
    parser.add_argument("--launcher", default="", help="how training is started (the file's, or deepspeed)")
    parser.add_argument("overrides", nargs="*", metavar="STAGE.key=value", help="settings that replace the files'")
    args = parser.parse_intermixed_args()
    return exit_code(lambda: run(args, Path(__file__).parent))


def run(args: argparse.Namespace, folder: Path) -> int:
    """Run the stages. folder: of train.py, eval.py and cfg. Raises ValueError and OSError."""
    from rich.console import Console

    from c4c.training.stages import read, require_data_of, run, table

    console = Console(stderr=True, soft_wrap=True)
    stages = read(args.cfg, args.overrides, [folder / "cfg"], args.launcher)
    require_data_of(stages)
    run(stages, folder, lambda text: console.print(text, highlight=False, markup=False))
    if any(stage.of for stage in stages.stages):
        Console().print(table(stages))
    else:
        console.print("all stages are done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
