"""The adaptor for mteb gives mteb's own evaluation what the model itself says, on a small task that is made here."""

import importlib.util
import runpy

import numpy as np
import pytest

from c4c.retriever import Retriever
from tests.c4c.retrieval.encoders import write
from tests.c4c.retrieval.test_search import draw
from tests.examples.conftest import ROOT

mteb = pytest.importorskip("mteb")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.slow

from mteb.abstasks.retrieval import AbsTaskRetrieval  # noqa: E402 it may be missing
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402

TEXTS = [f"a yellow bar that grows in {i} seconds" for i in range(6)]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("mteb_model", ROOT / "examples" / "mteb_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return [draw(folder / f"{i}.mp4", frames=6 + 5 * i, size=(32 + 16 * i, 80 - 8 * i)) for i in range(len(TEXTS))]


def task(files, category: str, as_bytes: bool) -> AbsTaskRetrieval:
    """A task of these videos, and of a text each."""
    names = [str(i) for i in range(len(files))]
    kept = [
        {"path": None, "bytes": file.read_bytes()} if as_bytes else {"path": str(file), "bytes": None} for file in files
    ]
    texts = datasets.Dataset.from_dict({"id": names, "text": TEXTS})
    videos = datasets.Dataset.from_dict({"id": names, "video": kept}).cast_column("video", datasets.Video())

    class Small(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=f"Small{category}", description="small", dataset={"path": "none/none", "revision": "1"}, type="Any2AnyRetrieval",
            eval_langs=["eng-Latn"], eval_splits=["test"], main_score="ndcg_at_10", reference=None, category=category,
            modalities=["text", "video"], date=None, domains=None, task_subtypes=None, license=None, annotations_creators=None,
            dialect=None, sample_creation=None, bibtex_citation=None,
        )  # fmt: skip

        def load_data(self, num_proc=None, **kwargs):
            queries, corpus = (texts, videos) if category == "t2v" else (videos, texts)
            split = RetrievalSplitData(
                queries=queries, corpus=corpus, relevant_docs={name: {name: 1} for name in names}, top_ranked=None
            )
            self.dataset, self.data_loaded = {"default": {"test": split}}, True

    return Small()


@pytest.mark.parametrize(
    ("head", "category"), [("meanP", "t2v"), ("meanP", "v2t"), ("wti", "t2v"), ("wti", "v2t"), ("tightTransf", "v2t")]
)
def test_mteb_finds_what_the_model_says(head, category, example, files, tmp_path):
    path = write(tmp_path / "model.safetensors", head, seed=4)
    model = example.VideoTextModel(str(path), device="cpu")
    done = mteb.evaluate(
        model, task(files, category, as_bytes=category == "t2v"), cache=None, co2_tracker=False, show_progress_bar=False,
        prediction_folder=tmp_path / "found",
    )  # fmt: skip
    [scores] = done.task_results[0].scores["test"]
    own = Retriever.load(path, device="cpu").similarity(TEXTS, files)
    own = own if category == "t2v" else own.T
    ranks = (own > np.diag(own)[:, None]).sum(axis=1)
    assert [scores[f"recall_at_{k}"] for k in (1, 3, 5)] == pytest.approx(
        [np.mean(ranks < k) for k in (1, 3, 5)], abs=1e-5
    )
    assert len(set(ranks.tolist())) > 1 and scores["main_score"] < 1
    assert (
        model.mteb_model_meta.embed_dim == 32 and model.mteb_model_meta.revision == model.encoder.identity.digest[:12]
    )


def test_similarity_of_pairs(example, files, tmp_path):
    path = write(tmp_path / "model.safetensors", "wti")
    model = example.VideoTextModel(str(path), device="cpu")
    texts = model._packed(model.encoder.texts(TEXTS[:2]), example.TEXT)
    videos = np.concatenate(
        [model._packed(model._video({"path": str(file), "bytes": None}), example.VIDEO) for file in files[:2]]
    )
    assert np.allclose(model.similarity_pairwise(texts, videos), np.diag(model.similarity(texts, videos)), atol=1e-6)
    assert np.allclose(model.similarity(videos, texts), model.similarity(texts, videos).T, atol=1e-6)


def test_the_command(example, files, tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "model.safetensors")
    monkeypatch.setattr(mteb, "get_tasks", lambda tasks: [task(files, name, as_bytes=True) for name in tasks])
    words = ["--ckpt", str(path), "--tasks", "t2v", "v2t", "--out", str(tmp_path / "results"), "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["mteb_model.py", *words])
    example.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["Smallt2v (test)", "Smallv2t (test)"]
    assert all("R@1 " in line and "R@10 100.0" in line for line in lines)
    assert list((tmp_path / "results").rglob("Smallt2v.json"))


def test_mistakes_are_told_in_one_sentence(tmp_path, monkeypatch, capsys):
    ckpt = str(write(tmp_path / "model.safetensors"))
    for words, told in (
        (["--ckpt", str(tmp_path / "none")], "there is no run folder"),
        (["--ckpt", ckpt, "--tasks", "nope"], "--tasks nope: 'nope' not found"),
    ):
        monkeypatch.setattr("sys.argv", ["mteb_model.py", *words, "--out", str(tmp_path / "results")])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "examples" / "mteb_model.py"), run_name="__main__")
        err = capsys.readouterr().err
        assert ended.value.code == 1 and err.splitlines()[-1].startswith(f"error: {told}"), err
        assert "Traceback" not in err


def test_what_is_neither_text_nor_video_is_refused(example, tmp_path):
    model = example.VideoTextModel(str(write(tmp_path / "model.safetensors")), device="cpu")

    class Inputs:
        dataset = datasets.Dataset.from_dict({"video": ["a"], "audio": ["b"]})

    with pytest.raises(ValueError, match="audio and video"):
        model.encode(Inputs())
