"""From a folder of videos to a trained model:  python examples/own_videos.py [--folder runs/own_videos_example]

Draws 24 short videos of moving discs and writes their captions, then runs the four commands that you would run on your own
folder: pack, check, train, evaluate. It takes less than a minute on two CPU cores and needs no GPU. Only the settings that
make the model tiny are special; with real videos use `--cfg own.yaml` as it is.
"""

import argparse
import csv
import itertools
import shlex
import subprocess
import sys
from pathlib import Path

import av
import numpy as np

ROOT = Path(__file__).parents[1]
COLOURS = {"red": (220, 30, 30), "green": (20, 170, 50), "blue": (40, 60, 230), "yellow": (240, 220, 40),
           "white": (240, 240, 240), "purple": (150, 40, 190)}  # fmt: skip
GROUNDS = {"black": (15, 15, 15), "grey": (120, 120, 120), "orange": (255, 140, 20), "pink": (250, 150, 200)}
SIDE, SECONDS, FPS = 96, 2, 12


def draw_video(path: Path, colour: tuple[int, int, int], ground: tuple[int, int, int]) -> None:
    """A disc that moves from left to right, as an H.264 mp4."""
    y, x = np.mgrid[:SIDE, :SIDE]
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=FPS)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for centre in np.linspace(SIDE / 3, SIDE * 2 / 3, SECONDS * FPS):
            picture = np.full((SIDE, SIDE, 3), ground, np.uint8)
            picture[(x - centre) ** 2 + (y - SIDE / 2) ** 2 < (SIDE / 3) ** 2] = colour
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode(None))


def make_folder(folder: Path) -> None:
    """24 videos, and a csv with the header `video,caption`."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "captions.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["video", "caption"])
        for colour, ground in itertools.product(COLOURS, GROUNDS):
            name = f"{colour}_on_{ground}.mp4"
            draw_video(folder / name, COLOURS[colour], GROUNDS[ground])
            table.writerow([name, f"a {colour} disc on {ground}"])
            table.writerow([name, f"something {colour} moves in front of a {ground} wall"])


def run(*command: str | Path) -> None:
    """Show a command and run it."""
    print(f"\n$ {shlex.join(map(str, command))}", flush=True)
    subprocess.run([sys.executable, *map(str, command[1:])], check=True, cwd=ROOT)


def main() -> None:
    """Make, pack, check, train and evaluate."""
    parser = argparse.ArgumentParser(description="From a folder of videos to a trained model.")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/own_videos_example"), help="where everything is written"
    )
    parser.add_argument("--epochs", type=int, default=15, help="of two steps each")
    args = parser.parse_args()
    folder = args.folder.resolve()
    videos, shards, runs = folder / "videos", folder / "shards", folder / "run"
    make_folder(videos)
    run("python", "-m", "c4c.shard", "folder", "--videos", videos, "--captions", videos / "captions.csv", "--out", shards,
        "--short-side", "64")  # fmt: skip
    run("python", "-m", "c4c.shard", "verify", shards)
    # Testing on the training videos only shows that the model can learn them: use another split for real work.
    run("python", "launch/train.py", "--cfg", "own.yaml", f"data.train={shards}", f"data.test={shards}", f"run.dir={runs}",
        "model.backbone=ViT-demo-16-small", "model.init_from=scratch", "engine.precision=fp32",
        "data.image_size=64", "data.resize=0", "data.num_frames=2", "data.max_words=12",
        "train.batch_size=24", f"train.epochs={args.epochs}", "train.lr=1e-3", "train.warmup_epochs=1", "train.eval_every=0",
    )  # fmt: skip
    run("python", "launch/eval.py", "--ckpt", runs, "--json", folder / "metrics.json")


if __name__ == "__main__":
    main()
