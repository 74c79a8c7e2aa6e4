"""Files that an evaluation writes: scores for other programs, what was found for each text, and each text's rank."""

import json
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from c4c.files import replacing
from c4c.launched import seen_enough
from c4c.retrieval.evaluation import Evaluation
from pipelines.captions import texts_of
from pipelines.config import DataConfig
from shards import count
from shards.split import Split

_EPOCH = (1980, 1, 1, 0, 0, 0)  # of members of an .npz: the same scores give the same file


def require_dump(path: Path, split: Split, config: DataConfig, vectors: bool) -> None:
    """Raise ValueError if scores of the split cannot be written to `path`. vectors: whether the head gives one vector a text and
    a video."""
    texts = [len(texts_of(split, index, config)) for index in range(len(split))]
    if path.suffix in (".pkl", ".pickle"):
        kinds = "write .npz or .parquet, which hold the scores"
        if not vectors:
            raise ValueError(
                f"--dump {path}: mmaction2's layout holds a vector of each text and each video, and this head compares frames one by "
                f"one: {kinds}"
            )
        if (several := next((i for i, n in enumerate(texts) if n != 1), None)) is not None:
            raise ValueError(
                f"--dump {path}: mmaction2's metric takes one text a video, and {split.video(several).id} in {split.path} has "
                f"{texts[several]}: {kinds}, or set data.paragraph=true"
            )
        return
    size, free = 4 * sum(texts) * len(split), shutil.disk_usage(path.absolute().parent).free
    if size > free:
        raise ValueError(
            f"--dump {path}: scores of {count(sum(texts), 'text')} and {count(len(split), 'video')} take {size / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free there"
        )


def write_dump(path: Path, evaluation: Evaluation) -> None:
    """Write the scores as the file's suffix says: .npz, .parquet, or .pkl in mmaction2's layout. Raises OSError that names the file.

    .npz: similarity float32 [texts, videos], texts, keys (the videos' ids), video_of_text int64 [texts]. .parquet: a row a text
    with text, video, video_of_text and similarity, a list of all videos' scores; their ids are the schema's metadata `keys`, as JSON.

    .pkl: what mmaction2's `tools/test.py --dump` writes with its RetrievalMetric: a list with a dict for each pair, whose
    features.video_feature and features.text_feature are float32 tensors [D] of unit length, and img_shape and video_id say what it is of.
    (mmengine/evaluator/metric.py DumpResults, mmaction/models/similarity/clip_similarity.py.)
    """
    write = {".npz": _npz, ".parquet": _parquet}.get(path.suffix, _pickle)
    with replacing(path) as file:
        write(file, evaluation)


def _npz(file: BinaryIO, evaluation: Evaluation) -> None:
    shape = len(evaluation.texts), len(evaluation.keys)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with _member(archive, "similarity") as member:  # row by row: the whole need not fit in memory
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for _, scores in evaluation.tiles():
                member.write(np.ascontiguousarray(scores.cpu().numpy(), "<f4").tobytes())
        others = {
            "texts": evaluation.texts,
            "keys": evaluation.keys,
            "video_of_text": evaluation.video_of_text.cpu().numpy(),
        }
        for name, values in others.items():
            with _member(archive, name) as member:
                np.lib.format.write_array(member, np.array(values), allow_pickle=False)


@contextmanager
def _member(archive: zipfile.ZipFile, name: str) -> Iterator[BinaryIO]:
    with archive.open(zipfile.ZipInfo(f"{name}.npy", _EPOCH), "w", force_zip64=True) as member:
        yield member  # type: ignore[misc]  # it can do all that numpy asks of it


def _parquet(file: BinaryIO, evaluation: Evaluation) -> None:
    schema = pa.schema(
        [
            ("text", pa.string()),
            ("video", pa.string()),
            ("video_of_text", pa.int64()),
            ("similarity", pa.list_(pa.float32(), len(evaluation.keys))),
        ],
        {"keys": json.dumps(evaluation.keys, ensure_ascii=False)},
    )
    owner = evaluation.video_of_text.cpu().numpy()
    with pq.ParquetWriter(file, schema) as writer:
        for texts, scores in evaluation.tiles():
            flat = pa.array(scores.cpu().numpy().ravel())
            columns = [
                pa.array(evaluation.texts[texts]),
                pa.array([evaluation.keys[v] for v in owner[texts]]),
                pa.array(owner[texts]),
                pa.FixedSizeListArray.from_arrays(flat, len(evaluation.keys)),
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))


def _pickle(file: BinaryIO, evaluation: Evaluation) -> None:
    texts, videos = evaluation.text_features.cpu(), evaluation.video_features.cpu()
    side = evaluation.data.image_size
    rows = [
        {
            # of a copy: pickle would write all that a view's memory holds
            "features": {"video_feature": videos[v].clone(), "text_feature": texts[t].clone()},
            "img_shape": (side, side),
            "video_id": evaluation.keys[v],
        }
        for t, v in enumerate(evaluation.video_of_text.tolist())
    ]
    pickle.dump(rows, file)


def write_top(to: Path | None, evaluation: Evaluation, k: int) -> None:
    """For each text one JSON object a line: its text, its video, the video's rank, from 1, and the k best videos with their scores;
    null for a score that is not a number.

    to: None for standard output. Raises OSError.
    """
    places, scores = evaluation.top(k)
    owner, ranks = evaluation.video_of_text.tolist(), evaluation.by_text.tolist()
    lines = []
    for i, text in enumerate(evaluation.texts):
        best = zip(places[i].tolist(), scores[i].tolist(), strict=True)
        row = {
            "text": text,
            "video": evaluation.keys[owner[i]],
            "rank": ranks[i] + 1,
            "found": [{"video": evaluation.keys[v], "score": _number(score)} for v, score in best],
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    _write_lines(to, lines)


def _number(score: float) -> float | None:
    return round(score, 6) if abs(score) < float("inf") else None  # which JSON has not


def write_ranks(path: Path, split: Split, config: DataConfig, by_text: Tensor, meta: bool = True) -> None:
    """One JSON object a text: the text, its video's id and meta, and the video's rank, from 1. meta: False leaves it out, which reads
    no JSON members. Raises OSError."""
    ranks_of_texts = iter(by_text.tolist())
    lines = []
    for index in range(len(split)):
        video = split.video(index)
        more = {"meta": split.json(video).get("meta", {})} if meta else {}
        for text in texts_of(split, index, config):
            row = {"rank": next(ranks_of_texts) + 1, "video": video.id, "text": text, **more}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    _write_lines(path, lines)


def _write_lines(to: Path | None, lines: list[str]) -> None:
    if to is None:
        try:
            with seen_enough():
                print(end="".join(lines), flush=True)
        except OSError as error:
            raise OSError(f"what was found cannot be printed ({error.strerror}); --topk-to FILE writes it") from error
        return
    with replacing(to) as file:
        file.write("".join(lines).encode())
