"""bench/index.py at a size that takes a second: what it measures is what it says."""

import json
import sys

import numpy as np
import pytest

from bench import index

pytestmark = pytest.mark.slow  # imports lancedb


def test_neighbours_of_a_query_are_the_segments_of_its_video():
    vectors, queries = index.mixture(4000, 20)
    again, _ = index.mixture(4000, 20)
    assert np.array_equal(vectors, again)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5) and queries.shape == (20, index.WIDTH)
    best = np.argsort(-(queries @ vectors.T), axis=1)[:, : index.SEGMENTS_A_VIDEO] // index.SEGMENTS_A_VIDEO
    assert (best == best[:, :1]).mean() > 0.9


def test_the_part_of_a_large_index(tmp_path, monkeypatch, capsys):
    pytest.importorskip("faiss")
    out = tmp_path / "index.json"
    out.write_text(json.dumps({"throughput": {"rows": []}}))
    words = ["--part", "million", "--segments", "2000", "--queries", "9", "--json", str(out), "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["index", *words])
    assert index.main() == 0
    report = json.loads(out.read_text())
    recalls = {
        row["name"].partition(",")[0] + str(i): row["recall"] for i, row in enumerate(report["million"]["answers"])
    }
    assert report["throughput"] == {"rows": []} and recalls["LanceDB0"] == recalls["FAISS IndexFlatIP6"] == 1.0
    assert recalls["LanceDB1"] > 0.97 and report["million"]["made"]["ann_bytes"] > 2000 * index.WIDTH / 8
    assert "recall@10" in capsys.readouterr().out
