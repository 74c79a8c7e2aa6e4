"""What comes out of the lanes: the frames that were asked for, and their pixels."""

import io
import json
from contextlib import closing
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from crc32c import crc32c
from PIL import Image

from pipelines.config import DataConfig
from pipelines.eval_loader import EvalLoader
from pipelines.frame_sampling import extractor_frames, segment_frames
from pipelines.lanes import Lane, lane_name
from pipelines.loader import Loader
from pipelines.requests import ClipRequest
from pipelines.stages.fetch import BadSample, Reader, Source
from pipelines.stages.resize import resized
from shards.split import Split
from shards.video.geometry import scaled_size
from shards.video.picture import grid
from tests.pipelines.conftest import NUMBERED, SIDE, pack_videos
from tests.pipelines.test_loader import run
from tests.videos import encode_pictures, number_in

pytestmark = pytest.mark.slow  # imports DALI

CLIP = DataConfig(num_frames=8, image_size=SIDE).filled()
LANES = {"copy": "video", "intra": "intra"}


def pixels(frames: torch.Tensor, config: DataConfig = CLIP) -> np.ndarray:
    """Normalised [..., 3, H, W] back to float levels [..., H, W, 3], 0 to 255."""
    config = config.filled()
    levels = (frames.cpu().movedim(-3, -1) * torch.tensor(config.std) + torch.tensor(config.mean)) * 255
    return levels.numpy()


def number_shown(levels: np.ndarray) -> int:
    return number_in(levels.round().clip(0, 255).astype(np.uint8))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((np.asarray(a, np.float64) - b) ** 2)))


def resized_and_cropped(picture: np.ndarray, short_side: int, crop: int) -> np.ndarray:
    """The recipe without DALI: PIL's antialiased bicubic to torchvision's size, torchvision's centre crop."""
    image = Image.fromarray(picture)
    image = image.resize(scaled_size(*image.size, short_side), Image.Resampling.BICUBIC)
    left, top = (round((n - crop) / 2) for n in image.size)
    return np.asarray(image.crop((left, top, left + crop, top + crop)))


def wanted_frames(name: str, rule: str) -> list[int]:
    frames, options = NUMBERED[name]
    if rule == "segment":
        return segment_frames(frames, CLIP.num_frames).tolist()
    return extractor_frames(frames, options.get("fps", 25), CLIP.num_frames, rule).tolist()


@pytest.mark.parametrize("rule", ["uniform", "head", "tail", "segment"])
@pytest.mark.parametrize("profile", LANES)
def test_the_loader_hands_over_the_frames_asked_for(numbered, profile, rule):
    split, seen = getattr(numbered, profile), set()
    with Loader(split, replace(CLIP, sampling=rule), batch_size=5, seed=0) as loader:
        for batch in loader.batches(count=loader.steps_per_epoch):
            levels = pixels(batch.frames)
            for row, key in enumerate(batch.keys):
                used = batch.frame_mask[row].numpy()
                numbers = batch.frame_numbers[row]
                assert [number_shown(levels[row, i]) for i in np.flatnonzero(used)] == numbers[used].tolist(), key
                assert np.array_equal(used, np.arange(CLIP.num_frames) < used.sum()), "empty slots come last"
                assert (numbers[~used] == -1).all() and not batch.frames[row, ~used].any()
                if rule == "segment":  # drawn at random: see below for which
                    assert used.all() and (np.diff(numbers) >= -1).all()
                else:
                    assert numbers[used].tolist() == wanted_frames(key, rule)
                seen.add(key)
    assert seen == set(NUMBERED)


@pytest.mark.parametrize("rule", ["uniform", "segment"])
@pytest.mark.parametrize("profile", LANES)
def test_evaluation_sees_the_frames_of_the_rule(numbered, profile, rule):
    split = getattr(numbered, profile)
    reader = EvalLoader(split, replace(CLIP, sampling=rule, eval_batch_size=5))
    for indices, frames, mask in reader:
        for index, levels, used in zip(indices, pixels(frames), mask.numpy(), strict=True):
            video = split.video(int(index))
            shown = [number_shown(picture) for picture in levels[used]]
            wanted = np.array(wanted_frames(video.key, rule))
            if profile == "intra" and rule == "segment":
                kept = np.array([n for n in range(video.source_frames) if grid(n, video.fps, 3)])
                wanted = np.array([kept[np.abs(kept - n).argmin()] for n in wanted])
            assert shown == wanted.tolist(), video.key
    reader.close()


def test_segment_draws_anew_for_every_seed_epoch_and_pair_within_the_segments(numbered):
    config = replace(CLIP, sampling="segment", num_frames=12, image_size=16)
    drawn = {}
    for seed, epochs in ((2, 5), (3, 1)):
        with Loader(numbered.copy, config, batch_size=4, seed=seed) as loader:
            for batch in loader.batches(count=epochs * loader.steps_per_epoch):
                for key, (_, caption), numbers in zip(batch.keys, batch.pairs, batch.frame_numbers, strict=True):
                    if key == "long_25":
                        drawn[seed, batch.epoch, caption] = numbers - np.arange(12) * 35
    assert len(drawn) == 12
    assert all((offsets >= 0).all() and (offsets <= 35).all() for offsets in drawn.values())
    # nowhere do four draws come again, be it in another place of the clip
    runs = [tuple(offsets[i : i + 4]) for offsets in drawn.values() for i in range(9)]
    assert len(set(runs)) == len(runs)


def textured(count: int, size: tuple[int, int]) -> list[np.ndarray]:
    """Noise of all scales that drifts, one half each way; as in nature, only its coarse part is coloured."""
    width, height = size
    draw = np.random.default_rng(0)
    sheet = np.zeros((height, width, 3))
    for scale in (1, 2, 4, 8, 16):
        noise = draw.normal(size=(height // scale + 2, width // scale + 2, 3 if scale >= 8 else 1)) * scale**0.5
        sheet += noise.repeat(scale, 0).repeat(scale, 1)[:height, :width]
    sheet = 128 + sheet / np.abs(sheet).std() * 35
    out = []
    for i in range(count):
        upper, lower = np.roll(sheet, 2 * i, axis=1), np.roll(sheet, -i, axis=1)
        moved = np.concatenate([upper[: height // 2], lower[height // 2 :]])
        out.append(moved.clip(0, 255).astype(np.uint8))
    return out


@pytest.fixture(scope="module")
def moving(tmp_path_factory):
    """{profile: split} of two textured clips, the file bytes by key, and every frame as it decodes."""
    sizes, options = {"wide": (322, 182), "tall": (182, 246)}, {"crf": "12", "bf": "3", "g": "250"}
    files = {f"{n}.mp4": encode_pictures(textured(51, s), 25, s, "libx264", "mp4", options) for n, s in sizes.items()}
    folder = tmp_path_factory.mktemp("moving")
    splits = {profile: pack_videos(folder / profile, files, profile, short_side=96) for profile in LANES}
    exact = {}
    for name, data in files.items():
        with av.open(io.BytesIO(data)) as file:
            exact[name.split(".")[0]] = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    return splits, exact


def all_frames(split, config: DataConfig, device="cpu") -> dict[str, np.ndarray]:
    """{key: levels [frames, H, W, 3]}"""
    reader = EvalLoader(split, config, device=device)
    out = {}
    for indices, frames, mask in reader:
        for i, index in enumerate(indices):
            out[split.video(int(index)).key] = pixels(frames[i][mask[i]])
    reader.close()
    return out


@pytest.mark.parametrize("resize", [96, 110], ids=["no margin", "margin"])
def test_video_lane_pixels_are_those_of_pil_and_torchvision(moving, resize):
    splits, exact = moving
    config = DataConfig(num_frames=3, image_size=96, resize=resize)
    for key, levels in all_frames(splits["copy"], config).items():
        reference = np.stack([resized_and_cropped(exact[key][n], resize, 96) for n in (0, 25, 50)])
        found = psnr(levels, reference)
        print(f"video lane, {key}, short side {resize}: {found:.1f} dB")
        assert found >= 65
        assert found - psnr(levels[:, :, 1:], reference[:, :, :-1]) > 15, "one pixel aside would be far worse"


@pytest.mark.parametrize("crop", [96, 84], ids=["no margin", "margin"])
def test_stored_jpegs_come_out_as_pil_decodes_them(moving, crop):
    split = moving[0]["intra"]
    for key, levels in all_frames(split, DataConfig(num_frames=3, image_size=crop, resize=96)).items():
        video = next(v for v in map(split.video, range(len(split))) if v.key == key)
        for i, number in enumerate((0, 25, 50)):
            (place,) = np.flatnonzero(video.frames.number == number)
            jpeg = split.read(video, int(video.frames.offset[place]), int(video.frames.size[place]))
            picture = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
            assert np.abs(levels[i] - resized_and_cropped(picture, 96, crop)).max() <= 2


def test_intra_lane_resizes_what_is_stored_at_another_size(moving):
    split = moving[0]["intra"]
    for key, levels in all_frames(split, DataConfig(num_frames=3, image_size=64)).items():
        video = next(v for v in map(split.video, range(len(split))) if v.key == key)
        (place,) = np.flatnonzero(video.frames.number == 25)
        jpeg = split.read(video, int(video.frames.offset[place]), int(video.frames.size[place]))
        picture = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
        assert psnr(levels[1], resized_and_cropped(picture, 64, 64)) >= 45


def test_frames_stored_at_the_recipes_size_are_not_resized(numbered, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a resize in the graph")

    monkeypatch.setattr("pipelines.stages.graph.fn.resize", refuse)
    monkeypatch.setattr("pipelines.stages.resize.interpolate", refuse)

    def shown(split: Split, config: DataConfig) -> None:
        request = ClipRequest(split.video(0), np.arange(2))
        with closing(Lane(split, config, torch.device("cpu"), 1)) as lane:
            lane.batch([request])

    shown(numbered.intra, CLIP)
    for split, side in ((numbered.intra, SIDE // 2), (numbered.copy, SIDE)):
        with pytest.raises(AssertionError, match="a resize"):
            shown(split, replace(CLIP, image_size=side))


@pytest.mark.parametrize(("width", "height"), [(81, 60), (60, 107), (48, 48), (40, 30)])
def test_pictures_are_resized_as_pil_does(width, height):
    pictures = list(np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8))
    config = DataConfig(image_size=48).filled()
    size = scaled_size(width, height, 48)
    for picture, cut, whole in zip(
        pictures, resized(pictures, config, False), resized(pictures, config, True), strict=True
    ):
        expected = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)).astype(int)
        assert whole.shape == expected.shape and np.abs(whole - expected).max() <= 1
        left, top = (round((n - 48) / 2) for n in size)
        assert np.array_equal(cut, whole[top : top + 48, left : left + 48])


def test_both_lanes_show_the_same_picture(moving):
    config = DataConfig(num_frames=3, image_size=96)
    video, intra = (all_frames(moving[0][profile], config) for profile in LANES)
    grey = np.array([0.299, 0.587, 0.114])
    for key in video:
        light, colour = psnr(video[key] @ grey, intra[key] @ grey), psnr(video[key], intra[key])
        print(f"video lane against intra lane, {key}: {light:.1f} dB in luma, {colour:.1f} dB in colour")
        assert light >= 34  # the JPEG's loss; one pixel aside it is 20
        assert colour >= 23  # the stored JPEGs halve the colour planes, and this clip is hard on that


def test_the_crop_window_is_torchvisions_for_every_size(numbered):
    # pictures given to the graph as they are: the pixel's own place is written in it
    crop = 32
    config = DataConfig(num_frames=1, image_size=crop, mean=(0.0,) * 3, std=(1.0,) * 3)
    sizes = [(n, crop) for n in range(crop, 3 * crop)] + [(crop, n) for n in range(crop, 3 * crop)]
    lane = Lane(numbered.copy, config, torch.device("cpu"), len(sizes))
    requests, pictures = [], []
    for width, height in sizes:
        video = replace(numbered.copy.video(0), width=width, height=height)
        requests.append(ClipRequest(video, np.array([0])))
        x, y = np.meshgrid(np.arange(width), np.arange(height))
        pictures.append(Source([np.stack([x, y, x * 0], axis=2).astype(np.uint8)], np.array([0])))
    plan = lane.batch(requests, pictures)
    frames, mask = plan.frames, lane.mask(plan.clips, plan.rows)
    lane.close()
    corners = (frames[:, 0, :2, 0, 0] * 255).round().int().tolist()
    assert corners == [[round((width - crop) / 2), round((height - crop) / 2)] for width, height in sizes]
    assert mask.all() and frames.shape == (len(sizes), 1, 3, crop, crop)


def test_normalisation(numbered):
    config = DataConfig(num_frames=2, image_size=16).filled()
    lane = Lane(numbered.copy, config, torch.device("cpu"), 1)
    flat = [np.full((16, 16, 3), colour, np.uint8) for colour in ((255, 0, 100), (3, 128, 254))]
    video = replace(numbered.copy.video(0), width=16, height=16)
    frames = lane.batch([ClipRequest(video, np.array([0, 1]))], [Source(flat, np.array([0, 1]))]).frames
    lane.close()
    mean, std = torch.tensor(config.mean), torch.tensor(config.std)
    expected = (torch.tensor([[255, 0, 100], [3, 128, 254]]) / 255 - mean) / std
    assert torch.allclose(frames[0], expected[:, :, None, None].expand(2, 3, 16, 16), atol=1e-5)


def test_which_lane(numbered):
    assert lane_name(numbered.copy, DataConfig()) == "video"
    assert lane_name(numbered.intra, DataConfig()) == "intra"
    assert lane_name(numbered.intra, DataConfig(lane="video")) == "video"
    with pytest.raises(ValueError, match=r"data\.lane=intra needs shards of independent JPEGs.*has profile copy"):
        lane_name(numbered.copy, DataConfig(lane="intra"))


def test_the_video_lane_reads_intra_shards_too(numbered):
    for key, levels in all_frames(numbered.intra, replace(CLIP, lane="video")).items():
        assert [number_shown(picture) for picture in levels] == wanted_frames(key, "uniform")


def test_nothing_to_decode(numbered):
    lane = Lane(numbered.intra, CLIP, torch.device("cpu"), 4)
    plan = lane.batch([])
    frames, mask = plan.frames, lane.mask(plan.clips, plan.rows)
    lane.close()
    assert frames.shape == (0, CLIP.num_frames, 3, SIDE, SIDE) and mask.shape == (0, CLIP.num_frames)


@pytest.mark.parametrize("profile", LANES)
def test_a_row_past_the_end_of_the_file_is_a_bad_sample(numbered, profile):
    split = getattr(numbered, profile)
    lane = Lane(split, CLIP, torch.device("cpu"), 2)
    good = split.video(0)
    lost = replace(good, offset=10**9)
    first, second = lane.batch([ClipRequest(lost, np.array([0])), ClipRequest(good, np.array([0]))]).clips
    lane.close()
    assert isinstance(first.error, BadSample) and "cut short" in str(first.error)
    assert second.error is None and second.source.decoded >= 1


@pytest.mark.gpu
@pytest.mark.parametrize("profile", LANES)
def test_a_gpu_shows_what_the_cpu_shows(moving, profile):
    config = DataConfig(num_frames=3, image_size=64)
    split = moving[0][profile]
    cpu, gpu = (all_frames(split, config, device) for device in ("cpu", "cuda"))
    for key in cpu:
        found = psnr(cpu[key], gpu[key])
        print(f"{LANES[profile]} lane, {key}, GPU against CPU: {found:.1f} dB")
        assert found >= 35  # other decoders and colour conversions, the same frame and the same window
        assert psnr(gpu[key][1], cpu[key][0]) < found - 10


@pytest.mark.gpu
@pytest.mark.parametrize("profile", LANES)
def test_the_loader_hands_over_the_frames_asked_for_on_a_gpu(numbered, profile):
    with Loader(getattr(numbered, profile), CLIP, batch_size=5, seed=0, device="cuda") as loader:
        for batch in loader.batches(count=loader.steps_per_epoch):
            assert batch.frames.is_cuda and batch.tokens.is_cuda and batch.valid.is_cuda
            for row, key in enumerate(batch.keys):
                shown = [number_shown(p) for p in pixels(batch.frames[row][batch.frame_mask[row]])]
                assert shown == wanted_frames(key, "uniform"), key


@pytest.mark.filterwarnings("ignore:.*cannot be used and is replaced")
def test_a_broken_header_that_was_packed_so_does_not_reach_the_decoder(numbered, monkeypatch, tmp_path):
    read, broken = Reader._bytes, {}

    def spoilt(self, video, offset, size):
        data = read(self, video, offset, size)
        if video.key != "wide_30":
            return data
        cut = data[:100]
        broken[cut] = crc32c(data)
        return cut

    monkeypatch.setattr(Reader, "_bytes", spoilt)
    monkeypatch.setattr("pipelines.stages.fetch.crc32c", lambda data: broken.get(data) or crc32c(data))
    listed = tmp_path / "quarantine.jsonl"
    batches = run(numbered.intra, 6, quarantine=listed)
    (entry,) = map(json.loads, listed.read_text().splitlines())
    assert entry["key"] == "wide_30" and "cannot be decoded: its header is cut off" in entry["reason"]
    assert not any("wide_30" in batch.keys for batch in batches)
