"""`launch/eval.py`: the same bits from any number of ranks, and the files it writes."""

import json
import pickle
import sys
import types

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from c4c.export import export
from c4c.models.clip4clip import CLIP4Clip
from c4c.retrieval.feature_file import FeatureFile
from c4c.retrieval.views import Views
from shards.split import Split
from tests.launch.evaluations import metrics_of, refused, validated
from tests.launch.runs import lines
from tests.pipelines.test_loader import damage

pytestmark = [pytest.mark.launch, pytest.mark.timeout(1200)]


def test_any_number_of_ranks_gives_the_same_bits(runs, launcher, forks, tmp_path):
    """17 videos and captions: the last block is short, and of 3 ranks one has no block of videos at all."""
    run, results = runs["2 ranks"], {}
    ways = {
        0: "data.eval_batch_size=8",
        1: "data.eval_batch_size=32",
        2: "data.eval_batch_size=3",
        3: "data.eval_batch_size=1",
    }
    for ranks, word in ways.items():
        out, dump = tmp_path / f"{ranks}.json", tmp_path / f"{ranks}.npz"
        words = ["--ckpt", run, "--json", out, "--dump", dump, "--device", launcher.device]
        rerank = ["--bank-videos", "--rerank", "dsl", "qbnorm", word]  # a setting after an option that takes many words
        code, said, err = forks.run(["launch/eval.py", *map(str, words), *rerank], ranks)
        assert code == 0, err
        assert said.count("text to video, DSL (sees all queries)") == said.count("video to text, QB-Norm") == 1
        results[ranks] = json.loads(out.read_text()), dump.read_bytes()
    assert results[1] == results[2] == results[3] == results[0]
    assert metrics_of(tmp_path / "0.json") == validated(run, 10), "and as the run itself on 2 ranks"
    rerank = results[0][0]["rerank"]
    assert rerank["DSL"]["sees_all_test_queries"] and not rerank["QB-Norm"]["sees_all_test_queries"]
    assert (rerank["QB-Norm"]["bank"], rerank["QB-Norm"]["bank_texts"]) == (str(launcher.train), 200)
    assert set(rerank["DSL"]["t2v"]) == set(rerank["QB-Norm"]["v2t"]) == {"R1", "R5", "R10", "MdR", "MnR"}


def test_heads_that_compare_frames_give_the_same_bits_on_any_number_of_ranks(model, launcher, forks, tmp_path):
    export(CLIP4Clip(model.spec, "wti", segments=5).eval(), tmp_path / "w.safetensors")
    words = [
        "--ckpt",
        tmp_path / "w.safetensors",
        "--data",
        launcher.train,
        "--rerank",
        "dsl",
        "--device",
        launcher.device,
    ]
    for ranks in (1, 3):  # 200 captions: two runs of texts, so that one rank ranks none
        files = ["--json", tmp_path / f"{ranks}.json", "--dump", tmp_path / f"{ranks}.npz"]
        code, _, err = forks.run(["launch/eval.py", *map(str, words + files), f"data.eval_batch_size={ranks}"], ranks)
        assert code == 0, err
    for name in ("json", "npz"):
        assert (tmp_path / f"1.{name}").read_bytes() == (tmp_path / f"3.{name}").read_bytes()


def test_features_are_the_same_bytes_from_any_number_of_ranks(model, launcher, forks, tmp_path):
    """Of two splits, whose 217 captions a rank writes in parts."""
    export(model, tmp_path / "w.safetensors")
    files = [tmp_path / f"{ranks}.safetensors" for ranks in (1, 2)]
    for ranks, file in enumerate(files, 1):
        words = ["--ckpt", tmp_path / "w.safetensors", "--data", launcher.train, launcher.test, "--out", file]
        code, said, err = forks.run(["c4c/features.py", *map(str, words), "--device", launcher.device], ranks)
        assert code == 0, err
        assert said.startswith(
            f"{file}: features of 57 videos and 217 captions by {tmp_path / 'w.safetensors'}, meanP, "
        )
    assert files[0].read_bytes() == files[1].read_bytes()
    made = FeatureFile(str(files[0]))
    assert [(one.videos, one.digest) for one in made.splits] == [
        (len(split), split.digest) for split in map(Split, (launcher.train, launcher.test))
    ]
    assert made.ids[40] == Split(launcher.test).video(0).id and made.scale == pytest.approx(model.scale().item())


def test_features_of_a_split_with_a_damaged_video(model, launcher, forks, tmp_path):
    """It is named, all others have theirs, and a run that can read it after all learns of it from the matches alone."""
    export(model, tmp_path / "w.safetensors")
    split = Split(launcher.train)
    name = split.video(7).id
    damaged = damage(split, [split.video(7).key], tmp_path / "split", slice(None))
    for ranks in (1, 2):
        words = [
            "--ckpt",
            tmp_path / "w.safetensors",
            "--data",
            damaged.path,
            "--out",
            tmp_path / f"{ranks}.safetensors",
        ]
        code, said, err = forks.run(["c4c/features.py", *map(str, words), "--device", launcher.device], ranks)
        assert code == 0, err
        assert f"{name} cannot be decoded and has no features: crc32c" in err
        assert "meanP, but for 1 video that cannot be decoded, " in said
    files = [tmp_path / f"{ranks}.safetensors" for ranks in (1, 2)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert FeatureFile(str(files[0])).unreadable.nonzero()[0].tolist() == [7]
    more = damage(split, [split.video(i).key for i in range(11)], tmp_path / "more", slice(None))
    for ranks in (1, 2):  # six and five of them
        words = ["--ckpt", tmp_path / "w.safetensors", "--data", more.path, "--out", tmp_path / "none.safetensors"]
        code, said, err = forks.run(["c4c/features.py", *map(str, words), "--device", launcher.device], ranks)
        assert code == 1 and "11 of 40 videos of" in err and "more than data.max_bad_fraction=0.01 allows" in err, err
        assert not (tmp_path / "none.safetensors").exists()
    run = tmp_path / "run"
    words = launcher.words(f"run.dir={run}", f"train.teacher={files[0]}", "data.num_frames=5", "train.max_steps=2")
    code, said, err = forks.run(["launch/train.py", *words], 2)
    assert code == 0, err
    assert "of 1 video of this training it says nothing" in err and len(lines(run / "metrics.jsonl")) == 2


def by_mmaction2(rows: list[dict]) -> dict[str, float]:
    """As mmaction2 describes its RetrievalMetric: rows are pairs, features are normalised once more, cosines of all texts with all
    videos; a text's rank is where its own video's score stands among the sorted ones, and every equal score counts as such a place."""
    texts = np.array([row["features"]["text_feature"].cpu().numpy() for row in rows])
    videos = np.array([row["features"]["video_feature"].cpu().numpy() for row in rows])
    texts, videos = (x / np.sqrt((x * x).sum(axis=1))[:, None] for x in (texts, videos))
    places = []
    for scores, own in zip(texts.dot(videos.T), range(len(rows)), strict=True):
        descending = sorted(scores.tolist(), reverse=True)
        places += [place for place, score in enumerate(descending) if score == scores[own]]
    found = {f"R{k}": 100 * sum(place < k for place in places) / len(places) for k in (1, 5, 10)}
    return found | {"MdR": float(np.median(places)) + 1, "MnR": sum(places) / len(places) + 1}


def test_dumps(runs, evaluate, launcher, tmp_path):
    """All hold the same scores, and mmaction2's metric gives our numbers for its layout."""
    ranks, out = tmp_path / "ranks.jsonl", tmp_path / "out.json"
    for name in ("a.npz", "a.parquet", "a.pkl"):
        assert evaluate("--ckpt", runs["1 rank"], "--dump", tmp_path / name, "--ranks", ranks, "--json", out)[0] == 0
    split = Split(launcher.test)
    keys = [split.video(i).id for i in range(17)]
    texts = [split.captions(i)[0]["text"] for i in range(17)]
    with np.load(tmp_path / "a.npz") as dump:
        assert set(dump) == {"similarity", "texts", "keys", "video_of_text"}
        similarity = dump["similarity"]
        assert similarity.shape == (17, 17) and similarity.dtype == np.float32
        assert (dump["texts"].tolist(), dump["keys"].tolist()) == (texts, keys)
        assert dump["video_of_text"].tolist() == list(range(17)) and dump["video_of_text"].dtype == np.int64
    own = np.diag(similarity)
    assert [row["rank"] for row in lines(ranks)] == (similarity >= own[:, None]).sum(axis=1).tolist()

    table = pq.read_table(tmp_path / "a.parquet")
    assert table["text"].to_pylist() == texts and table["video"].to_pylist() == keys
    assert np.array_equal(np.array(table["similarity"].to_pylist(), np.float32), similarity)
    assert json.loads(table.schema.metadata[b"keys"]) == keys

    rows = pickle.loads((tmp_path / "a.pkl").read_bytes())
    assert len(rows) == 17 and [row["video_id"] for row in rows] == keys and rows[0]["img_shape"] == (64, 64)
    assert all(type(row["features"]["text_feature"]) is torch.Tensor for row in rows)
    assert len((tmp_path / "a.pkl").read_bytes()) < 17 * 2 * 2000, "each vector is alone in its memory"
    assert by_mmaction2(rows) == pytest.approx(json.loads(out.read_text())["t2v"], abs=1e-3)


def test_what_was_found_for_each_text(runs, evaluate, tmp_path):
    to, out = tmp_path / "found.jsonl", tmp_path / "out.json"
    words = ["--ckpt", runs["1 rank"], "--topk", "3"]
    assert evaluate(*words, "--topk-to", to, "--dump", tmp_path / "a.npz")[0] == 0
    rows = lines(to)
    with np.load(tmp_path / "a.npz") as dump:
        best = np.argsort(-dump["similarity"], axis=1, kind="stable")[:, :3]
        for i, row in enumerate(rows):
            assert list(row) == ["text", "video", "rank", "found"]
            assert (row["text"], row["video"]) == (dump["texts"][i], dump["keys"][i])
            assert [hit["video"] for hit in row["found"]] == dump["keys"][best[i]].tolist()
            scores = [hit["score"] for hit in row["found"]]
            assert scores == pytest.approx(dump["similarity"][i][best[i]].tolist(), abs=1e-6)
            if row["rank"] <= 3:
                assert row["found"][row["rank"] - 1]["video"] == row["video"]
    code, printed, err = evaluate(*words, "--json", out)
    assert code == 0 and [json.loads(line) for line in printed.splitlines()] == rows, "alone on standard output"
    assert "text to video" in err


def test_several_splits(runs, evaluate, launcher, tmp_path):
    out = tmp_path / "out.json"
    code, printed, err = evaluate(
        "--ckpt", runs["1 rank"], "--data", launcher.test, launcher.train, "data.threads=1", "--json", out
    )
    assert (code, err) == (0, "")
    result = json.loads(out.read_text())
    assert list(result) == [str(launcher.test), str(launcher.train)]
    assert [row["n_texts"] for row in result.values()] == [17, 200]
    assert {k: result[str(launcher.test)][k] for k in ("t2v", "v2t")} == {
        k: validated(runs["1 rank"], 10)[k] for k in ("t2v", "v2t")
    }
    assert "17 texts, 17 videos" in printed and "200 texts, 40 videos" in printed
    for words in (
        ["--dump", tmp_path / "a.npz"],
        ["--topk", "3"],
        ["--ranks", tmp_path / "r"],
        ["--report", tmp_path / "r.html"],
    ):
        said = refused(evaluate("--ckpt", runs["1 rank"], "--data", launcher.test, "--data", launcher.train, *words))
        assert "is of one split, and --data names 2: evaluate them one at a time" in said
    assert "names a split twice" in refused(evaluate("--ckpt", runs["1 rank"], "--data", launcher.test, launcher.test))


@pytest.mark.parametrize("head", ["meanP", "wti"])
def test_several_clips_and_crops(head, model, evaluate, launcher, tmp_path):
    """The videos are wider than high, so that crops differ."""
    export(CLIP4Clip(model.spec, head, segments=5).eval(), tmp_path / "m.safetensors")
    words = ["--ckpt", tmp_path / "m.safetensors", "--data", launcher.test, "--json", tmp_path / "out.json"]
    scores = {}
    for views in (Views(), Views(2, 1), Views(1, 3), Views(2, 3)):
        dump, options = tmp_path / f"{views}.npz", ["--clips", views.clips, "--crops", views.crops]
        code, printed, _ = evaluate(*words, "--dump", dump, *options)
        assert code == 0 and f"encoded     {17 * len(views)} {'clips' if len(views) > 1 else 'videos'} in " in printed
        result = json.loads((tmp_path / "out.json").read_text())
        assert (result.get("clips", 1), result.get("crops", 1)) == (views.clips, views.crops)
        with np.load(dump) as file:
            scores[views] = file["similarity"]
    for crop in ("start", "centre", "end"):
        assert evaluate(*words, "--dump", tmp_path / f"{crop}.npz", f"data.crop={crop}")[0] == 0
        with np.load(tmp_path / f"{crop}.npz") as file:
            scores[crop] = file["similarity"]
    assert np.array_equal(scores["centre"], scores[Views()])
    assert not np.allclose(scores["start"], scores["end"], atol=1e-4)
    together = np.stack([scores[crop] for crop in ("start", "centre", "end")]).mean(axis=0)
    if head == "wti":  # the mean of the scores
        assert np.allclose(scores[Views(1, 3)], together, atol=1e-6)
    else:  # of the mean of the videos' vectors, normalised: each video's scores in the same proportion
        ratio = scores[Views(1, 3)] / together
        assert np.allclose(ratio, ratio[:1], atol=1e-3) and (ratio >= 1 - 1e-6).all()
    assert not np.allclose(scores[Views(2, 1)], scores[Views()], atol=1e-5)


def test_the_report_gets_what_was_found(runs, evaluate, launcher, tmp_path, monkeypatch):
    calls = []
    module = types.ModuleType("c4c.retrieval.report")
    module.write_report = lambda *values, views, tell: calls.append((*values, views))
    monkeypatch.setitem(sys.modules, "c4c.retrieval.report", module)
    assert evaluate("--ckpt", runs["1 rank"], "--report", tmp_path / "r.html", "--rerank", "dsl")[0] == 0
    ((path, found, run, name, views),) = calls
    assert views == (1, 1)
    assert (path, run, name) == (tmp_path / "r.html", runs["1 rank"], str(runs["1 rank"] / "checkpoints/step00000010"))
    assert list(found.rows) == ["DSL"] and found.metrics["n_texts"] == len(found.texts) == 17
    assert list(found.timings) == ["decode wait", "towers", "captions", "ranking", "re-ranking"]
    assert all(seconds >= 0 for seconds in found.timings.values())
    places, scores = found.top_texts(2)
    similarity = torch.from_numpy(found.similarity())
    assert torch.equal(places, similarity.T.sort(dim=1, descending=True, stable=True).indices[:, :2])
    assert torch.equal(scores, similarity.T.gather(1, places))


def test_what_cannot_be_written_is_said_before_a_video_is_decoded(
    runs, model, evaluate, launcher, tmp_path, monkeypatch
):
    def decode(*_, **__):
        raise AssertionError("a video was decoded")

    monkeypatch.setattr("c4c.retrieval.features.EvalLoader", decode)
    export(CLIP4Clip(model.spec, "wti", segments=5).eval(), tmp_path / "w.safetensors")
    late = ["--ckpt", tmp_path / "w.safetensors", "--data", launcher.test]
    run = ["--ckpt", runs["1 rank"]]
    gone = tmp_path / "gone"
    for words, said in (
        ([*run, "--dump", tmp_path / "a.csv"], "the name must end with .pkl, .pickle, .parquet or .npz"),
        ([*run, "--dump", gone / "a.npz"], f"there is no folder {gone}"),
        ([*run, "--dump", tmp_path / "a.npz", "--json", tmp_path / "a.npz"], "both name"),
        ([*run, "--report", tmp_path / "w.safetensors"], "it is a page, so the name must end with .html"),
        ([*run, "--ranks", tmp_path / "w.safetensors"], "would replace a file of another kind"),
        ([*late, "--dump", tmp_path / "a.pkl"], "this head compares frames one by one: write .npz or .parquet"),
        ([*run, "--data", launcher.train, "--dump", tmp_path / "a.pkl"], "mmaction2's metric takes one text a video, and train"),
        ([*run, "--topk", "0"], "--topk 0: must be from 1 to 1000"),
        ([*run, "--topk-to", tmp_path / "a"], "says where --topk K writes: give --topk too"),
        ([*run, "--clips", "0"], "--clips 0: must be from 1 to 100"),
        ([*run, "--crops", "3", "data.crop=end"], "--crops 3 shows every crop: leave data.crop=end out"),
        ([*run, "--crops", "3", "data.resize_mode=squash", "data.resize=0"], "data.resize_mode=squash crops nothing; leave --crops out"),
        ([*run, "--rerank", "qbnorm", "--bank", ""], "--bank is empty: is a variable of the shell not set?"),
        ([*run, "--device", ""], "--device is empty"),
        ([*run, "--rerank", "dls"], "--rerank must be dsl or qbnorm, or both; got dls"),
        ([*run, "--bank", launcher.train], "--bank is for --rerank qbnorm: give that too"),
        ([*late, "--rerank", "qbnorm"], "names no data.train: give --bank SPLIT"),
        ([*run, "--rerank", "qbnorm", "--bank", launcher.test], "its captions are the test queries; name a training split"),
        ([*run, "--rerank", "qbnorm", "--bank-videos", "--clips", "2"], "--bank-videos takes one clip and crop of each video"),
    ):  # fmt: skip
        assert said in refused(evaluate(*words)), words
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=1000))
    said = refused(evaluate(*run, "--dump", tmp_path / "a.npz"))
    assert "scores of 17 texts and 17 videos take 0.0 GB, and 0.0 GB are free there" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w.json", "w.safetensors"]


def test_a_dump_that_does_not_fit_leaves_the_old_one(runs, evaluate, tmp_path, monkeypatch):
    assert evaluate("--ckpt", runs["1 rank"], "--dump", tmp_path / "a.npz")[0] == 0
    before = (tmp_path / "a.npz").read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.lib.format.write_array", full)
    code, _, err = evaluate("--ckpt", runs["1 rank"], "--dump", tmp_path / "a.npz")
    assert code == 1 and "a.npz could not be written: No space left on device" in err
    assert (tmp_path / "a.npz").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
