"""SVO-Probes: pairs of photographs that differ in the subject, the verb or the object.

Source of the data: Hendricks and Nematzadeh (arXiv 2106.09141), `svo_probes.csv`. Source of the
questions: NOTICE (arXiv 2406.16320), whose language model's rewriting of them is not done here.
"""

from __future__ import annotations

import ast
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import unquote, urlsplit

import numpy as np

from hooked_vlm.data.choices import Choice, Choices, Vocabulary, word_spans
from hooked_vlm.data.pictures import Pictures
from hooked_vlm.data.report import BadRow, LeftOut, OnBad, Rows
from hooked_vlm.data.tables import Row, cell, read_table, table_rows

PARTS = ("subject", "verb", "object")
GROUPS = ("subj_neg", "verb_neg", "obj_neg")  # which part differs, in the order of `PARTS`
COLUMNS = ("pos_triplet", "neg_triplet", "pos_url", "neg_url", *GROUPS)
Order = Literal["positive first", "drawn"]
Side = Literal["positive", "negative"]
_ING = "verb, -ing"


@dataclass(frozen=True)
class _Line:
    """Two photographs and their triplets, which differ in one part.

    Attributes:
        part: which part differs, by its place in `PARTS`.
        triplets: of the positive and of the negative photograph.
        urls: theirs.
    """

    part: int
    triplets: tuple[tuple[str, ...], tuple[str, ...]]
    urls: tuple[str, str]

    def question(self, swapped: bool) -> str:
        """The question which of the two it is, the positive one named first."""
        first, second = (triplet[self.part] for triplet in self.triplets)
        words = list(self.triplets[0])
        words[self.part] = f"{second} or {first}" if swapped else f"{first} or {second}"
        return f"is {' '.join(words)}?"


def read_svo_probes(
    csv: str | Path,
    images: str | Path,
    *,
    seed: int,
    on_bad: OnBad = "raise",
    files: str | Path | None = None,
    prompts: str | Path | None = None,
    order: Order = "positive first",
    exclude: Collection[str] = ("person",),
    check_images: bool = True,
) -> Choices:
    """Two choices for each line: one with the positive photograph clean, one with the negative.

    A line that says `subj_neg` is asked 'is {subject} or {other subject} {verb} {object}?', and so
    on; both choices ask the same. The report counts each line twice, once for each photograph.

    Args:
        csv: `svo_probes.csv` with columns `pos_triplet`, `neg_triplet`, `pos_url`, `neg_url`,
            `subj_neg`, `verb_neg` and `obj_neg`; others are not read. A triplet is `man,run,sea`,
            or a list of such, of which the first counts.
        images: the folder of the photographs. Each is looked for under the last part of its URL.
        seed: draws the order of the options, where it is drawn.
        on_bad: `raise` refuses the first bad line, `drop` leaves bad lines out and counts them.
        files: a JSON object of file names by URL, or a CSV with columns `url` and `file`, for
            photographs that have other names in the folder.
        prompts: a CSV with columns `prompt_before` and `prompt_after`: questions as made here, and
            as they are to be asked, in better grammar. The options must stand in both; a verb may
            do so in its -ing form, which then is the option.
        order: `positive first`, as published, where of all choices with the positive photograph
            the first option is right; or `drawn` for each line.
        exclude: questions with one of these words are left out.
        check_images: whether photographs are decoded, so that unreadable ones are found here.

    Raises:
        ValueError: a file that has no such columns or gives no choice; a bad line, if not dropped:
            one that does not say what differs, whose triplets are empty or differ in something
            else, that repeats an earlier one, or whose photographs are not there, cannot be read,
            or bear a name that fits several URLs.
        FileNotFoundError: there is no such file.
    """
    csv = Path(csv)
    if order not in get_args(Order):
        raise ValueError(f"order is 'positive first' or 'drawn', not {order!r}")
    table = list(table_rows(csv, COLUMNS))
    found = _Files(Path(images), files, [row for _, row in table if not isinstance(row, BadRow)])
    rewritten = (
        None if prompts is None else _two_columns(Path(prompts), "prompt_before", "prompt_after")
    )
    asking = _Asking(found, Pictures(check_images), rewritten, exclude)
    rows, rng = Rows(on_bad, csv), np.random.default_rng(seed)
    items: list[Choice] = []
    lines: list[_Line] = []
    seen: dict[tuple[str, ...], int] = {}
    for number, row in table:
        swapped = order == "drawn" and bool(rng.integers(2))
        for side in get_args(Side):
            with rows.row(f"line {number}, {side} image clean"):
                line = _line(row)
                if side == "positive":
                    lines.append(line)
                key = (line.question(False), *line.urls)
                if seen.setdefault(key, number) != number:
                    raise BadRow("duplicate", f"asks the same of the same as line {seen[key]}")
                items.append(asking.choice(line, side, f"{number} {side}", swapped))
    report = rows.report("choices")
    vocabularies = _vocabularies(lines, exclude)
    if rewritten is not None:
        verbs = vocabularies["verb"].words
        vocabularies[_ING] = Vocabulary(tuple(sorted({ing_form(verb) for verb in verbs})))
    return Choices(items, report, vocabularies, "svo-probes")


def _line(row: Row | BadRow) -> _Line:
    if isinstance(row, BadRow):
        raise row
    flags = [cell(row, group).lower() for group in GROUPS]
    if sorted(flags) != ["false", "false", "true"]:
        raise BadRow("does not say what differs", f"one of {GROUPS} must be True, not {flags}")
    part = flags.index("true")
    pos, neg = (_triplet(cell(row, f"{side}_triplet")) for side in ("pos", "neg"))
    differ = [index for index in range(3) if pos[index] != neg[index]]
    if differ != [part]:
        raise BadRow(
            "triplets differ in something else",
            f"{GROUPS[part]} says that the {PARTS[part]} differs, and {','.join(pos)!r} and "
            f"{','.join(neg)!r} differ in {' and '.join(PARTS[i] for i in differ) or 'nothing'}",
        )
    urls = cell(row, "pos_url"), cell(row, "neg_url")
    if not all(urls) or urls[0] == urls[1]:
        raise BadRow("not two URLs", f"the photographs are {urls[0]!r} and {urls[1]!r}")
    return _Line(part, (pos, neg), urls)


def _triplet(said: str) -> tuple[str, ...]:
    """Subject, verb and object of `man,run,sea` or `['man,run,sea', ...]`."""
    first = said
    if said.startswith("["):
        try:
            first = str([*ast.literal_eval(said), ""][0])
        except (ValueError, SyntaxError, TypeError) as error:
            raise BadRow("no triplet", f"{said!r} is no list of triplets") from error
    words = tuple(word.strip() for word in first.split(","))
    if len(words) != 3 or not all(words):
        raise BadRow("no triplet", f"{said!r} is not subject, verb and object: man,run,sea")
    return words


@dataclass(frozen=True)
class _Asking:
    """Makes choices of lines.

    Attributes:
        files: of URLs.
        pictures: checks them.
        rewritten: questions as they are to be asked; None for as they are made.
        exclude: words of questions that are left out.
    """

    files: _Files
    pictures: Pictures
    rewritten: Mapping[str, str] | None
    exclude: Collection[str]

    def choice(self, line: _Line, side: Side, name: str, swapped: bool) -> Choice:
        """The choice of a line of which one side is clean.

        Raises:
            BadRow: there is none.
        """
        text = line.question(swapped)
        if unwanted := [word for word in self.exclude if word_spans(word, text)]:
            raise LeftOut(f"has the word {unwanted[0]!r}")
        options = tuple(triplet[line.part] for triplet in line.triplets)
        roles = {part: line.triplets[0][i] for i, part in enumerate(PARTS) if i != line.part}
        vocabulary = PARTS[line.part]
        if self.rewritten is not None:
            text = self._rewritten(text)
            spoken = _both_spoken(options, vocabulary, text)
            vocabulary = vocabulary if spoken == options else _ING
            options = spoken
            heard = {role: _spoken(word, role, text) for role, word in roles.items()}
            roles = {role: word for role, word in heard.items() if word is not None}
        files = [self.files[url] for url in line.urls]
        for file in files:
            self.pictures.check(file)
        clean, other = (0, 1) if side == "positive" else (1, 0)
        try:
            return Choice(
                files[clean],
                text,
                options[clean],
                options[other],
                files[other],
                group=GROUPS[line.part],
                name=name,
                roles=roles,
                vocabulary=vocabulary,
            )
        except ValueError as error:
            raise BadRow("option named twice", str(error)) from error

    def _rewritten(self, text: str) -> str:
        assert self.rewritten is not None
        if text not in self.rewritten:
            raise BadRow("not rewritten", f"the prompts have no {text!r}")
        return self.rewritten[text].strip().removesuffix("?").rstrip() + "?"


def _both_spoken(options: tuple[str, ...], part: str, text: str) -> tuple[str, ...]:
    """The options in the form in which both stand in a text.

    Raises:
        BadRow: they do not, or one stands there in another form than the other.
    """
    spoken = [one for option in options if (one := _spoken(option, part, text)) is not None]
    if len(spoken) < 2:
        raise BadRow("option lost", f"{' and '.join(options)} do not both stand in {text!r}")
    if len({one == option for one, option in zip(spoken, options, strict=True)}) > 1:
        raise BadRow("options of two forms", f"{options} have different forms in {text!r}")
    return tuple(spoken)


def _spoken(word: str, part: str, text: str) -> str | None:
    """The form in which a word stands in a text; None where it does not."""
    forms = (word, ing_form(word)) if part == "verb" else (word,)
    return next((form for form in forms if word_spans(form, text)), None)


def ing_form(verb: str) -> str:
    """The -ing form of an English verb, by the rules of spelling.

    Verbs of several syllables, of which some double their last letter, keep it single.

    Example:
        >>> [ing_form(verb) for verb in ("run", "ride", "lie", "see", "play", "eat", "open")]
        ['running', 'riding', 'lying', 'seeing', 'playing', 'eating', 'opening']
    """
    vowels = "aeiou"
    if verb.endswith("ie"):
        return f"{verb[:-2]}ying"
    if verb.endswith("e") and not verb.endswith(("ee", "oe", "ye")) and len(verb) > 2:
        return f"{verb[:-1]}ing"
    single = len(verb) > 2 and verb[-2] in vowels and verb[-3] not in vowels
    if single and verb[-1] not in f"{vowels}wxy" and sum(one in vowels for one in verb) == 1:
        return f"{verb}{verb[-1]}ing"
    return f"{verb}ing"


class _Files:
    """The files of URLs."""

    def __init__(self, folder: Path, mapping: str | Path | None, rows: Collection[Row]):
        self.folder = folder
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder of images {str(folder)!r}")
        self.mapping = None if mapping is None else _mapping(Path(mapping))
        urls = {cell(row, f"{side}_url") for row in rows for side in ("pos", "neg")}
        self.bearers = Counter(map(_last_part, urls))

    def __getitem__(self, url: str) -> Path:
        if self.mapping is not None:
            if url not in self.mapping:
                raise BadRow("URL without a file", f"the list of files has no {url!r}")
            return self.folder / self.mapping[url]
        name = _last_part(url)
        if not name:
            raise BadRow("URL without a file name", f"{url!r} ends in no name; give files=")
        if (n := self.bearers[name]) > 1:
            raise BadRow("several URLs of one file name", f"{n} URLs end in {name!r}; give files=")
        return self.folder / name


def _last_part(url: str) -> str:
    return unquote(urlsplit(url).path.rsplit("/", 1)[-1])


def _mapping(file: Path) -> dict[str, str]:
    """Names of files by URL.

    Raises:
        ValueError: a file that says no such thing, or two names for one URL.
    """
    if file.suffix == ".json":
        try:
            told: Any = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is no JSON: {error}") from error
        if not isinstance(told, dict) or not all(isinstance(one, str) for one in told.values()):
            raise ValueError(f"{file} is no JSON object of file names by URL")
        return told
    return _two_columns(file, "url", "file")


def _two_columns(file: Path, key: str, value: str) -> dict[str, str]:
    told: dict[str, str] = {}
    for number, row in read_table(file, (key, value)):
        if not row[key] or not row[value]:
            raise ValueError(f"{file}, line {number}: {key} or {value} missing")
        if told.setdefault(row[key], row[value]) != row[value]:
            raise ValueError(f"{file}, line {number}: another {value} for {row[key]!r}")
    if not told:
        raise ValueError(f"{file} is empty")
    return told


def _vocabularies(lines: Collection[_Line], exclude: Collection[str]) -> dict[str, Vocabulary]:
    """The words of all triplets by their part, without possessives and what is left out."""
    words: defaultdict[str, set[str]] = defaultdict(set)
    for line in lines:
        for triplet in line.triplets:
            for part, word in zip(PARTS, triplet, strict=True):
                if "'" not in word and word not in exclude:
                    words[part].add(word)
    return {part: Vocabulary(tuple(sorted(found))) for part, found in words.items() if found}
