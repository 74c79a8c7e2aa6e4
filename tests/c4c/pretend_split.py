"""A split without files: as much of one as those ask for who want names and captions."""

from dataclasses import dataclass
from types import SimpleNamespace


@dataclass
class PretendSplit:
    """texts: of each video, by its id."""

    texts: dict[str, list[str]]
    digest: str = ""
    path: str = "train"

    @property
    def parts(self) -> list["PretendSplit"]:
        return [self]

    def __len__(self) -> int:
        return len(self.texts)

    def video(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(id=list(self.texts)[index])

    def captions(self, index: int) -> list[dict]:
        return [{"text": text} for text in list(self.texts.values())[index]]
