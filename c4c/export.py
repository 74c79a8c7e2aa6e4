"""`python -m c4c.export --ckpt runs/x [--tag best] --to model.safetensors`: one file of weights from a run, or from any.

model.safetensors   c4c's names; what the model is stands in the file's metadata and in model.json beside it
--official          CLIP4Clip's own layout, as its --init_model reads it (a .bin or .pth file by torch.save)
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from c4c.engine import quiet_libraries
from c4c.files import replace_text, require_writable
from c4c.model import CLIP4Clip
from c4c.run import is_run
from c4c.weights import to_official


def describe(model: CLIP4Clip) -> dict:
    """What `c4c.weights.read` needs to build the model again."""
    return {
        "spec": model.spec,
        "head": model.head.name,
        "linear_patch": model.linear_patch,
        "blocks": model.blocks,
        "segments": model.segments,
    }


def export(model: CLIP4Clip, path: Path, official: bool) -> None:
    """Write the model's weights to `path`. Raises ValueError if the file's ending does not suit the layout."""
    state = {k: v.detach().contiguous().cpu() for k, v in model.state_dict().items()}
    check_ending(path, official)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    try:
        if official:
            torch.save(to_official(state), beside)
        else:
            about = json.dumps(describe(model), sort_keys=True)
            save_file(state, beside, metadata={"format": "pt", "c4c": about})
            replace_text({path.with_suffix(".json"): json.dumps(describe(model), indent=2) + "\n"})
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def check_ending(path: Path, official: bool) -> None:
    """Raise ValueError if the file's ending does not suit the layout."""
    if official != (path.suffix != ".safetensors"):
        right = "any ending but .safetensors" if official else "the ending .safetensors"
        raise ValueError(f"--to {path}: {'the official' if official else 'this'} layout takes {right}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m c4c.export", description="Write a model's weights as one file.")
    parser.add_argument("--ckpt", type=Path, required=True, help="a run folder, or weights of any kind c4c reads")
    parser.add_argument("--tag", help="a checkpoint of the run: its name, or best (the latest)")
    parser.add_argument("--to", type=Path, required=True, help="the file to write")
    parser.add_argument("--official", action="store_true", help="in the official CLIP4Clip layout")
    args = parser.parse_args()
    quiet_libraries()
    try:
        check_ending(args.to, args.official)
        require_writable("--to", args.to)
        if args.tag and not is_run(str(args.ckpt)):
            raise ValueError(f"--tag {args.tag} names a run's checkpoint, and {args.ckpt} is no run folder")
        model = CLIP4Clip.from_checkpoint(args.ckpt, tag=args.tag)
        export(model, args.to, args.official)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    weights = sum(p.numel() for p in model.parameters())
    print(f"{args.to}: {model.head.name}, {model.linear_patch}, {weights / 1e6:.1f} M weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
