"""What a user would load videos with instead, each as a function from a file to the clip that a model takes.

All take the same frames: of one a second at most FRAMES, evenly (CLIP4Clip's rule), scaled with the short side at SIDE, cut
to a square and normalised. They are called in the worker processes of a torch DataLoader, one thread each; libraries are
imported where they are used, so that one that is missing costs its own rows only.
"""

from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

FRAMES, SIDE = 12, 224
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_RESIZE = 256  # mmaction2's short side


class Clips(torch.utils.data.Dataset):
    """(frames [FRAMES, 3, SIDE, SIDE] float32, normalised, 0 where a short video has none; their numbers, -1 there)."""

    def __init__(self, load, files: list[Path]):
        self.load, self.files = load, files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        frames, numbers = self.load(str(self.files[i]))
        clip, shown = torch.zeros(FRAMES, 3, SIDE, SIDE), torch.full((FRAMES,), -1)
        clip[: len(frames)], shown[: len(frames)] = frames, torch.as_tensor(numbers)
        return clip, shown


def official(path: str):
    """OpenCV, a seek a second, every frame through PIL and torchvision's transforms, then the choice of 12."""
    import cv2
    from PIL import Image
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

    prepare = Compose([Resize(SIDE, InterpolationMode.BICUBIC), CenterCrop(SIDE), ToTensor(), Normalize(MEAN, STD)])
    video = cv2.VideoCapture(path)
    fps, count = int(video.get(cv2.CAP_PROP_FPS)), int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    pictures, numbers = [], []
    for number in range(0, count, fps):
        video.set(cv2.CAP_PROP_POS_FRAMES, number)
        good, picture = video.read()
        if not good:
            break
        pictures.append(prepare(Image.fromarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))))
        numbers.append(number)
    video.release()
    if len(numbers) > FRAMES:
        chosen = np.linspace(0, len(numbers) - 1, FRAMES, dtype=int)
        pictures, numbers = [pictures[i] for i in chosen], [numbers[i] for i in chosen]
    return torch.stack(pictures), numbers


def decord(path: str):
    """decord's get_batch as in mmaction2, whose recipe scales to 256 (bilinear) and cuts out 224."""
    import cv2
    from decord import VideoReader

    video = VideoReader(path, num_threads=1)
    numbers = clip_frames(len(video), Fraction(video.get_avg_fps()).limit_denominator(1001))
    pictures = video.get_batch(numbers).asnumpy()
    height, width = pictures.shape[1:3]
    scale = _RESIZE / min(height, width)
    size = int(width * scale + 0.5), int(height * scale + 0.5)
    left, top = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
    scaled = [
        cv2.resize(p, size, interpolation=cv2.INTER_LINEAR)[top : top + SIDE, left : left + SIDE] for p in pictures
    ]
    return normalised(torch.from_numpy(np.stack(scaled)).permute(0, 3, 1, 2)), numbers


def torchcodec(path: str):
    """torchcodec's get_frames_at; of its two ways to find frames the faster one."""
    from torchcodec.decoders import VideoDecoder

    video = VideoDecoder(path, seek_mode="approximate", num_ffmpeg_threads=1)
    numbers = clip_frames(video.metadata.num_frames, Fraction(video.metadata.average_fps).limit_denominator(1001))
    return transformed(video.get_frames_at(numbers.tolist()).data), numbers


def pyav_sequential(path: str):
    """PyAV, every frame up to the last wanted one."""
    import av

    with av.open(path) as file:
        stream = file.streams.video[0]
        stream.codec_context.thread_count = 1
        numbers = clip_frames(stream.frames, stream.average_rate)
        due, pictures = set(numbers.tolist()), []
        for number, frame in enumerate(file.decode(stream)):
            if number in due:
                pictures.append(frame.to_ndarray(format="rgb24"))
                if len(pictures) == len(due):
                    break
    return transformed(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)), numbers


def pyav_seek(path: str):
    """PyAV, seeking where another keyframe lies between one wanted frame and the next."""
    import av

    with av.open(path) as file:
        stream = file.streams.video[0]
        stream.codec_context.thread_count = 1
        numbers = clip_frames(stream.frames, stream.average_rate)
        tick = 1 / (stream.average_rate * stream.time_base)
        keys = np.array([e.timestamp for e in stream.index_entries if e.is_keyframe])
        pictures, frames, group = [], iter(()), -1
        for number in numbers.tolist():
            stamp = round(number * tick) + stream.start_time
            key = np.searchsorted(keys, stamp, side="right")
            if key != group:
                file.seek(stamp, stream=stream)
                frames, group = file.decode(stream), key
            pictures.append(next(f for f in frames if f.pts >= stamp).to_ndarray(format="rgb24"))
    return transformed(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)), numbers


def clip_frames(count: int, fps: Fraction) -> np.ndarray:
    """CLIP4Clip's rule: the first frame of every second, and of more than FRAMES an even choice."""
    seconds = np.arange(0, count, max(1, int(fps)))
    return seconds[np.linspace(0, len(seconds) - 1, min(FRAMES, len(seconds)), dtype=int)]


def transformed(frames: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 3, H, W] as torchvision's transforms make it ready: bicubic, antialiased."""
    from torchvision.transforms import v2

    frames = v2.functional.resize(frames, SIDE, v2.InterpolationMode.BICUBIC, antialias=True)
    return normalised(v2.functional.center_crop(frames, [SIDE, SIDE]))


def normalised(frames: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (frames.float() / 255 - mean) / std


# how often each decodes a frame that it does not hand over follows from where a file's keyframes are


def decoded(way: str, path: Path) -> tuple[int, int]:
    """(frames decoded, frames used) of a file: from the keyframe before each wanted frame where a way seeks for every
    one (OpenCV looks for it 16 frames further back), where it seeks in order once a group of pictures."""
    import av

    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        packets = sorted((p.pts, p.is_keyframe) for p in file.demux(stream) if p.size)
        numbers = clip_frames(len(packets), stream.average_rate)
    keys = np.array([number for number, (_, key) in enumerate(packets) if key])
    if way == "official":
        every = np.arange(0, len(packets), max(1, int(stream.average_rate)))
        return int((every - _key(keys, np.maximum(every - 16, 0)) + 1).sum()), len(numbers)
    if way == "sequential":
        return int(numbers[-1]) + 1, len(numbers)
    last = {int(key): int(number) for key, number in zip(_key(keys, numbers), numbers, strict=True)}
    return sum(number - key + 1 for key, number in last.items()), len(numbers)


def _key(keys: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    return keys[np.searchsorted(keys, numbers, side="right") - 1]
