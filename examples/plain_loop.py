"""The loader in a plain PyTorch loop:  python examples/plain_loop.py [--data data/demo/train]

Everything but the batches is ordinary PyTorch: a tiny two-tower model, Adam, and a contrastive loss. `make demo` packs the data.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from pipelines.config import DataConfig
from pipelines.loader import Loader
from shards import ShardError
from shards.split import Split

SIDE, FRAMES, WORDS = 64, 4, 24
VOCABULARY = 49408  # of CLIP's tokenizer


class TwoTowers(nn.Module):
    """Mean colours of a grid for the video, the mean of word vectors for the text."""

    def __init__(self, width: int = 64, grid: int = 8):
        super().__init__()
        self.video = nn.Sequential(nn.AdaptiveAvgPool2d(grid), nn.Flatten(), nn.Linear(3 * grid * grid, width))
        self.words = nn.EmbeddingBag(VOCABULARY, width, mode="mean", padding_idx=0)

    def forward(self, frames: torch.Tensor, frame_mask: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """frames [B, F, 3, H, W], frame_mask bool [B, F], tokens int64 [B, L] -> scores [texts, videos]."""
        features = self.video(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])  # [B*F, D] -> [B, F, D]
        shown = frame_mask[..., None]
        video = (features * shown).sum(1) / shown.sum(1).clamp(min=1)
        return 20 * normalize(self.words(tokens), dim=1) @ normalize(video, dim=1).T


def main() -> None:
    """Train for a number of steps, across epochs."""
    parser = argparse.ArgumentParser(description="The loader in a plain PyTorch loop.")
    parser.add_argument("--data", type=Path, default=Path("data/demo/train"), help="a packed split")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    try:
        split = Split(args.data)
    except ShardError as error:
        parser.error(str(error))

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = TwoTowers().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    config = DataConfig(num_frames=FRAMES, image_size=SIDE, max_words=WORDS, sampling="segment")
    with Loader(split, config, batch_size=args.batch_size, seed=0, device=device) as loader:
        # batches(epoch, step, count) starts at any position: resuming needs no other state
        for batch in loader.batches(epoch=0, step=0, count=args.steps):
            scores = model(batch.frames, batch.frame_mask, batch.tokens)[batch.valid][:, batch.valid]
            own = torch.arange(len(scores), device=device)
            loss = (cross_entropy(scores, own) + cross_entropy(scores.T, own)) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if batch.step % 10 == 0:
                print(
                    f"epoch {batch.epoch} step {batch.step:3} loss {loss.item():.3f} waited {1000 * batch.wait_s:.0f} ms"
                )


if __name__ == "__main__":
    main()
