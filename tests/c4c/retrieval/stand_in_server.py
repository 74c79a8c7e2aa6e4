"""launch/serve.py with the stand-in for the model:  python stand_in_server.py INDEX [OPTION …]"""

import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

from tests.c4c.retrieval.stand_in import StandIn

if __name__ == "__main__":
    stub = ModuleType("c4c.retrieval.search.searcher")  # the real one imports torch
    stub.Searcher = SimpleNamespace(open=lambda index, **_: StandIn(Path(index)))  # type: ignore[attr-defined]
    sys.modules[stub.__name__] = stub
    sys.argv = ["serve.py", *sys.argv[1:], "--port", "0", "--max-upload-mb", "5"]
    runpy.run_path(str(Path(__file__).parents[3] / "launch" / "serve.py"), run_name="__main__")
