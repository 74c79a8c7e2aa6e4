"""`python -m c4c.export --ckpt runs/x [--tag best] --to PATH [--format F]`: the weights of a run, or of any checkpoint, elsewhere.

c4c           model.safetensors: c4c's names; what the model is stands in the file's metadata and in model.json beside it
official      CLIP4Clip's own layout, as its --init_model reads it (a .bin or .pth file by torch.save)
open_clip     a folder for open_clip.create_model_from_pretrained("local-dir:FOLDER")
transformers  a folder for CLIPModel or SiglipModel.from_pretrained("FOLDER")
onnx          a folder with video.onnx and text.onnx (opset 18, free numbers of videos, frames, captions and words)
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from c4c.errors import exit_code
from c4c.helptext import add_checkpoint_options
from c4c.option_checks import require_checkpoint

if TYPE_CHECKING:  # imports come after what they would hold up: --help and paths that cannot be
    from c4c.models.clip4clip import CLIP4Clip
    from pipelines.config import DataConfig

FORMATS = ("c4c", "official", "open_clip", "transformers", "onnx")
# of each format that is a folder, the file that marks it
_FOLDERS = {"open_clip": "open_clip_config.json", "transformers": "preprocessor_config.json", "onnx": "c4c.json"}


def export(
    model: "CLIP4Clip", path: Path, format: str = "c4c", data: "DataConfig | None" = None, half: bool = False
) -> list[str]:
    """Write the model's weights to `path`; returns notes for people.

    data: how clips and captions are made for it, which goes along where the format can say it; None: as its backbone says.
    half: fp16, for onnx. Raises ValueError if the path's ending or the model does not suit the format, and OSError.
    """
    check_target(path, format, half)
    if format in ("c4c", "official"):
        from c4c.models.export import files

        files.write(model, data, path, official=format == "official")
        return files.unsaid(model, data) if format == "official" else []
    if format == "onnx":
        from c4c.models.export import onnx

        return onnx.write(model, data, path, half)
    from c4c.models.export import huggingface, openclip

    return (openclip if format == "open_clip" else huggingface).write(model, data, path)


def check_target(path: Path, format: str, half: bool = False, named: str = "--to") -> None:
    """Raise ValueError if the path's ending does not suit the format, or it cannot be written there. named: the option."""
    from c4c.files import looked_in, require_folder, require_writable

    if half and format != "onnx":
        raise ValueError(f"--half is for --format onnx; --format {format} keeps fp32")
    if marker := _FOLDERS.get(format):
        if path.suffix in (".safetensors", ".bin", ".pth", ".pt", ".onnx"):
            raise ValueError(f"{named} {path}: --format {format} writes a folder; name one, without an ending")
        require_folder(f"{named} {path}", path)
        if not path.parent.exists():
            raise ValueError(
                f"{named} {path}: there is no folder {path.parent}{looked_in(path)}. Make it first, or name another"
            )
        if path.is_dir() and any(path.iterdir()) and not (path / marker).is_file():
            raise ValueError(f"{named} {path} is a folder with other files in it: name another, or delete it first")
        return
    official = format == "official"
    if official != (path.suffix != ".safetensors"):
        right = "any ending but .safetensors" if official else "the ending .safetensors"
        others = "" if official else f"; for another layout name --format: {', '.join(FORMATS[1:])}"
        raise ValueError(f"{named} {path}: {'the official' if official else 'this'} layout takes {right}{others}")
    require_writable(f"{named} {path}", path, _is_weights)
    if not official:
        beside = path.with_suffix(".json")
        require_writable(f"{named} {path} also writes {beside}, which", beside, lambda start: b'"spec"' in start)


def _is_weights(start: bytes) -> bool:
    """Whether a file begins as safetensors, a zip of torch or a pickle of torch does."""
    return start[8:9] == b"{" or start[:2] in (b"PK", b"\x80\x02")


def main() -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m c4c.export", description="Write a model's weights in a layout of c4c or another program.",
        epilog=(__doc__ or "").partition("\n\n")[2], formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_checkpoint_options(parser)
    parser.add_argument("--to", type=Path, required=True, help="the file or folder to write")
    parser.add_argument("--format", choices=FORMATS, help="the layout (default: c4c)")
    parser.add_argument("--official", action="store_true", help="the same as --format official")
    parser.add_argument("--half", action="store_true", help="with --format onnx: the towers in fp16")
    args = parser.parse_args()
    return exit_code(lambda: _command(args))


def _command(args: argparse.Namespace) -> int:
    if args.official and args.format not in (None, "official"):
        raise ValueError(f"--official and --format {args.format} name two layouts: leave one of them away")
    layout = "official" if args.official else args.format or "c4c"
    weights, about, notes = run(args.ckpt, args.tag, args.to, layout, args.half, args.backbone, not args.no_ema)
    print(f"{args.to}: {about}, {weights / 1e6:.1f} M weights")
    for note in notes:
        print(note)
    return 0


def _how_to_evaluate(data: "DataConfig") -> str:
    """What a layout of another program does not say, as settings of launch/eval.py."""
    from pipelines.config import DataConfig

    usual = DataConfig()
    names = ("num_frames", "max_words", "sampling", "fps", "frame_order", "resize", "crop", "paragraph")
    words = [
        f"data.{name}={str(value).lower()}"
        for name in names
        if (value := getattr(data, name)) != getattr(usual, name) or name in names[:2]
    ]
    return f"the layout does not say how clips and captions are made of videos: evaluate it with {' '.join(words)}"


def run(
    ckpt: str, tag: str | None, to: Path, format: str = "c4c", half: bool = False, backbone: str | None = None,
    ema: bool = True,
) -> tuple[int, str, list[str]]:  # fmt: skip
    """Export; returns the number of weights, head, patches and the run's checkpoint in words, and notes. Raises ValueError and OSError.

    tag, backbone, ema: as `c4c.models.pretrained.open_checkpoint` takes them.
    """
    check_target(to, format, half)
    require_checkpoint(ckpt)
    if format == "onnx":
        from c4c.models.export.onnx import require_packages

        require_packages()
    from c4c.models.pretrained import check_names, open_checkpoint, weights_taken
    from c4c.training.run_folder import located
    from c4c.zero import checkpoint
    from c4c.zero.patches import quiet_libraries

    quiet_libraries()
    check_names(ckpt, tag, backbone, ema)
    ckpt, asked, ema = located(ckpt, tag, ema)
    folder = Path(ckpt) if (Path(ckpt) / "config.yaml").is_file() else None
    tag = checkpoint.resolve(folder, asked) if folder else None  # once: the run may go on meanwhile
    model, data = open_checkpoint(ckpt, tag, backbone, ema)
    model.resize_pictures(data.image_size)
    notes = export(model, to, format, data, half)
    if format not in ("c4c", "onnx"):
        notes.append(_how_to_evaluate(data))
    kind = weights_taken(ckpt, tag, ema)
    if folder:
        kind = f", {tag}{kind}"
        notes += [f"note: {gone}"] if (gone := checkpoint.better_gone(folder, asked)) else []
    return sum(p.numel() for p in model.parameters()), f"{model.head.name}, {model.linear_patch}{kind}", notes


if __name__ == "__main__":
    sys.exit(main())
