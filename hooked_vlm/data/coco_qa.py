"""COCO-QA: open questions about photographs of COCO, as the causal-tracing tool of BLIP has them.

Source of the data: Ren, Kiros and Zemel (arXiv 1505.02074). Source of the tables: Palit et al.
(arXiv 2308.14179).
"""

from __future__ import annotations

from pathlib import Path

from hooked_vlm.data.choices import Question
from hooked_vlm.data.pictures import Pictures
from hooked_vlm.data.report import BadRow, LeftOut, OnBad, Report, Rows
from hooked_vlm.data.tables import Row, cell, table_rows


def read_coco_qa(
    csv: str | Path,
    images: str | Path,
    *,
    n_words: int | None = 7,
    suffix: str = "count",
    on_bad: OnBad = "raise",
    check_images: bool = True,
) -> tuple[list[Question], Report]:
    """One question for each line.

    Args:
        csv: such as `color_coco_qa.csv`, with columns `train_image_id_count`, `question_count` and
            `answer_count`; others are not read.
        images: the folder of the photographs, each called by its number in twelve digits and
            `.jpg`, as COCO distributes them.
        n_words: questions of another number of words are left out, so that all have as many
            tokens where each word is one; None keeps all.
        suffix: what the columns end in, in other tables of the tool.
        on_bad: `raise` refuses the first bad line, `drop` leaves bad lines out and counts them.
        check_images: whether photographs are decoded, so that unreadable ones are found here.

    Raises:
        ValueError: a file that has no such columns or gives no question; a bad line, if not
            dropped: a number that is none, no question or answer, one that asks the same of the
            same photograph as an earlier one, or a photograph that is not there or unreadable.
        FileNotFoundError: there is no such file.
    """
    csv, images = Path(csv), Path(images)
    number_of, question_of, answer_of = columns = [
        f"{name}_{suffix}" for name in ("train_image_id", "question", "answer")
    ]
    rows, pictures = Rows(on_bad, csv), Pictures(check_images)
    questions: list[Question] = []
    seen: dict[tuple[str, str], int] = {}
    for number, row in table_rows(csv, columns):
        with rows.row(f"line {number}"):
            if isinstance(row, BadRow):
                raise row
            text, answer = _filled(row, question_of), _filled(row, answer_of)
            file = images / f"{_image_id(_filled(row, number_of)):012d}.jpg"
            count = sum(any(letter.isalnum() for letter in word) for word in text.split())
            if n_words is not None and count != n_words:
                raise LeftOut(f"not {n_words} words")
            key = (file.name, text.casefold())
            if seen.setdefault(key, number) != number:
                raise BadRow("duplicate", f"asks the same as line {seen[key]}")
            pictures.check(file)
            questions.append(Question(file, text, answer, f"line {number}"))
    return questions, rows.report("questions")


def _filled(row: Row, column: str) -> str:
    if not (said := cell(row, column)):
        raise BadRow("empty cell", f"{column} is empty")
    return said


def _image_id(said: str) -> int:
    """The number of a photograph; pandas writes whole numbers as '123.0' where some are missing."""
    digits = said.removesuffix(".0")
    if not digits.isascii() or not digits.isdigit() or len(digits) > 12:
        raise BadRow("no image number", f"{said!r} is no number of up to twelve digits")
    return int(digits)
