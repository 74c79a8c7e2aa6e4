"""`python -m c4c.export --ckpt runs/x [--tag best] --to model.safetensors`: one file of weights from a run, or from any.

model.safetensors   c4c's names; what the model is stands in the file's metadata and in model.json beside it
--official          CLIP4Clip's own layout, as its --init_model reads it (a .bin or .pth file by torch.save)
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imports come after what they would hold up: --help and paths that cannot be
    from c4c.models.clip4clip import CLIP4Clip


def describe(model: "CLIP4Clip") -> dict:
    """What `c4c.models.weights.read` needs to build the model again."""
    return {
        "spec": model.spec,
        "head": model.head.name,
        "linear_patch": model.linear_patch,
        "blocks": model.blocks,
        "segments": model.segments,
    }


def export(model: "CLIP4Clip", path: Path, official: bool) -> None:
    """Write the model's weights to `path`. Raises ValueError if the file's ending or the model does not suit the layout, and
    OSError."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from c4c.files import discard, replace_text, with_usual_mode
    from c4c.models.weights import to_official

    state = {k: v.detach().contiguous().cpu() for k, v in model.state_dict().items()}
    check_ending(path, official)
    beside = path.with_name(f".{path.name}.tmp")
    try:
        if official:
            torch.save(to_official(state, model.spec), beside)
        else:
            about = json.dumps(describe(model), sort_keys=True)
            save_file(state, beside, metadata={"format": "pt", "c4c": about})
            replace_text({path.with_suffix(".json"): json.dumps(describe(model), indent=2) + "\n"})
        with_usual_mode(beside)
        os.replace(beside, path)
    except (RuntimeError, SafetensorError) as error:  # what torch and safetensors make of a full disk
        reason = str(error).partition("\n")[0]
        raise OSError(f"{path} could not be written ({reason}): is there room on the disk?") from error
    finally:
        discard(beside)


def check_ending(path: Path, official: bool) -> None:
    """Raise ValueError if the file's ending does not suit the layout."""
    if official != (path.suffix != ".safetensors"):
        right = "any ending but .safetensors" if official else "the ending .safetensors"
        raise ValueError(f"--to {path}: {'the official' if official else 'this'} layout takes {right}")


def _is_weights(start: bytes) -> bool:
    """Whether a file begins as safetensors, a zip of torch or a pickle of torch does."""
    return start[8:9] == b"{" or start[:2] in (b"PK", b"\x80\x02")


def main() -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m c4c.export", description="Write a model's weights as one file.")
    parser.add_argument("--ckpt", type=Path, required=True, help="a run folder, or weights of any kind c4c reads")
    parser.add_argument("--tag", help="a checkpoint of the run: its name, or best (the latest)")
    parser.add_argument("--to", type=Path, required=True, help="the file to write")
    parser.add_argument("--official", action="store_true", help="in the official CLIP4Clip layout")
    args = parser.parse_args()
    try:
        weights, about = run(args.ckpt, args.tag, args.to, args.official)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.to}: {about}, {weights / 1e6:.1f} M weights")
    return 0


def run(ckpt: Path, tag: str | None, to: Path, official: bool) -> tuple[int, str]:
    """Export; returns the number of weights, and head and patches in words. Raises ValueError and OSError."""
    from c4c.files import require_writable
    from c4c.training.run_folder import is_run

    check_ending(to, official)
    require_writable(f"--to {to}", to, _is_weights)
    if not official:
        beside = to.with_suffix(".json")
        require_writable(f"--to {to} also writes {beside}, which", beside, lambda start: b'"spec"' in start)
    if tag and not is_run(str(ckpt)):
        raise ValueError(f"--tag {tag} names a run's checkpoint, and {ckpt} is no run folder")
    from c4c.models.clip4clip import CLIP4Clip
    from c4c.zero.patches import quiet_libraries

    quiet_libraries()
    model = CLIP4Clip.from_checkpoint(ckpt, tag=tag)
    export(model, to, official)
    return sum(p.numel() for p in model.parameters()), f"{model.head.name}, {model.linear_patch}"


if __name__ == "__main__":
    sys.exit(main())
