"""The page of a study: its tables and plots in one file that needs nothing else.

page     what template.html, page.css and page.js are given; c4c/pages fills them
columns  the columns of a table: which number, and how it is written
rows     a row of a table with its seeds
plots    lines over a number that was varied, and dots for what is no number
"""

from pathlib import Path

from c4c.files import replace_text
from c4c.study.page.page import page_of
from c4c.study.results import StudyResult


def write_page(path: Path, result: StudyResult) -> None:
    """Write the page of a study to `path`, an HTML file. A kill leaves the old page or the new one.

    Raises OSError if the file cannot be written.
    """
    replace_text({path: page_of(result).decode()})
