"""c4c's models under mteb (pip install "mteb>=2.12,<3"):  python examples/mteb_model.py --ckpt runs/msrvtt --tasks MSRVTTT2V MSRVTTV2T

From Python, as with any model of mteb's:

    import mteb
    from mteb_model import VideoTextModel

    mteb.evaluate(VideoTextModel("runs/msrvtt"), mteb.get_tasks(tasks=["MSRVTTT2V"]))

Note that mteb's MSR-VTT is not the 1k-A split of the papers: it has 879 of its 1000 pairs. Fewer videos are easier to tell apart, so its
numbers stand beside those of mteb, and not beside published R@K; launch/eval.py gives those.

mteb hands over video files. Their frames are chosen and decoded by c4c, as in training: torchcodec, which mteb's own models need, is not.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import datasets
import mteb
import numpy as np
import torch
from mteb.models import ModelMeta
from tqdm import tqdm

from c4c.errors import exit_code
from c4c.retrieval.encoder import Encoder
from pipelines.example_clips import clip_of_video

TEXT, VIDEO = -1.0, 1.0  # what stands behind each row of features of a head that compares frames: which side it is of


class VideoTextModel:
    """mteb's EncoderProtocol for texts and videos.

    model_name: a run folder, or any checkpoint that launch/eval.py takes.
    """

    def __init__(
        self, model_name: str, revision: str | None = None, *, device: str | None = None, backbone: str | None = None, **kwargs: Any
    ):  # fmt: skip
        self.encoder = Encoder.load(model_name, revision, backbone, device)
        identity, model = self.encoder.identity, self.encoder.model
        weights = sum(weight.numel() for weight in model.parameters())
        self.mteb_model_meta = ModelMeta(
            loader=None, name=f"c4c/{Path(model_name).name.replace(':', '-')}", revision=identity.digest[:12], release_date=None,
            languages=["eng-Latn"], n_parameters=weights, memory_usage_mb=weights * 4 / 2**20, max_tokens=self.encoder.max_words,
            embed_dim=identity.width, license=None, open_weights=None, public_training_code=None, public_training_data=None,
            framework=["PyTorch"], similarity_fn_name=None if self.encoder.late else "cosine", use_instructions=False,
            training_datasets=None, modalities=["text", "video"],
        )  # fmt: skip

    def encode(self, inputs: Any, **kwargs: Any) -> np.ndarray:
        """Texts or videos of a DataLoader of mteb's -> unit vectors float32 [N, D]; features [N, T, D + 1] for heads that compare
        frames or words."""
        columns = set(inputs.dataset.column_names) & {"text", "video", "audio", "image"}
        if columns == {"text"}:
            texts = [text for batch in inputs for text in batch["text"]]
            return self._packed(self.encoder.texts(texts), TEXT)
        if columns != {"video"}:
            raise ValueError(
                f"this model takes texts or videos, and was given {' and '.join(sorted(columns)) or 'neither'}"
            )
        rows = inputs.dataset.cast_column("video", datasets.Video(decode=False))["video"]
        shown = tqdm(rows, desc="videos", disable=not kwargs.get("show_progress_bar", True))
        return self._packed(torch.cat([self._video(row) for row in shown]), VIDEO)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """[N, M]: the head's scores, without the temperature."""
        a, b = torch.as_tensor(embeddings1), torch.as_tensor(embeddings2)
        if not self.encoder.late:
            return a @ b.T
        if a[0, 0, -1] == VIDEO:  # videos ask, and texts are found
            return self.similarity(b, a).T
        text, video = a[..., :-1], b[..., :-1]
        return self.encoder.score(text if self.encoder.model.head.tokens else text[:, 0], video).cpu()

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """[N]: of each pair."""
        pairs = zip(torch.as_tensor(embeddings1), torch.as_tensor(embeddings2), strict=True)
        return torch.stack([self.similarity(a[None], b[None])[0, 0] for a, b in pairs])

    def _video(self, row: dict[str, Any]) -> torch.Tensor:
        """row: the path of a file, or its bytes, as `datasets` keeps videos."""
        with tempfile.NamedTemporaryFile(suffix=Path(row["path"] or "").suffix) as file:
            if row["bytes"] is not None:
                file.write(row["bytes"])
                file.flush()
            pixels, mask = clip_of_video(row["path"] if row["bytes"] is None else file.name, self.encoder.data)
        return self.encoder.videos(self.encoder.clips(pixels[None], mask[None]), mask[None])

    def _packed(self, features: torch.Tensor, side: float) -> np.ndarray:
        if self.encoder.late:  # [N, D] or [N, T, D] -> [N, T, D + 1]
            features = features if features.dim() == 3 else features[:, None]
            features = torch.nn.functional.pad(features, (0, 1), value=side)
        return features.cpu().numpy()


def main() -> int:
    """Evaluate a checkpoint on tasks of mteb's, and print R@1, R@5 and R@10. Raises ValueError for a task that mteb does not know."""
    parser = argparse.ArgumentParser(description="Evaluate a model of c4c with mteb.")
    parser.add_argument("--ckpt", required=True, help="a run folder, or any checkpoint that launch/eval.py takes")
    parser.add_argument("--backbone", help="what a file's weights are of, where it does not say")
    parser.add_argument(
        "--tasks", nargs="+", default=["MSRVTTT2V", "MSRVTTV2T"], help="names of mteb's tasks (default: its MSR-VTT)"
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="a folder for mteb's results")
    parser.add_argument("--device", help="cuda or cpu")
    args = parser.parse_args()
    try:
        tasks = mteb.get_tasks(tasks=args.tasks)
    except KeyError as error:
        raise ValueError(f"--tasks {' '.join(args.tasks)}: {str(error.args[0]).removeprefix('KeyError: ')}") from error
    model = VideoTextModel(args.ckpt, device=args.device, backbone=args.backbone)
    results = mteb.evaluate(model, tasks, cache=mteb.ResultCache(args.out))
    for result in results.task_results:
        for split, rows in result.scores.items():
            recalls = "  ".join(f"R@{k} {100 * rows[0][f'recall_at_{k}']:.1f}" for k in (1, 5, 10))
            print(f"{result.task_name} ({split}): {recalls}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
