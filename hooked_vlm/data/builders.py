"""From choices to pairs: the image is exchanged, or the words that are asked for.

Source: NOTICE (arXiv 2406.16320), whose semantic image pairs were called semantic minimal pairs in
its first version.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from hooked_vlm.data.choices import Choice, Choices, Vocabulary
from hooked_vlm.data.pairs import Pair
from hooked_vlm.data.report import BadRow, LeftOut, OnBad, Report, Rows

ToStrTokens = Callable[[str], list[str]]
Tokens = Literal["aligned", "equal"]
SHORT_ANSWER = "Answer the question using a single word or phrase."  # as LLaVA-1.5 is asked


@dataclass(frozen=True)
class Form:
    """How a question is put to a model.

    Attributes:
        template: what is said, with `{question}` where the question stands.
        capital: whether the question begins with a capital letter.
        capital_answers: whether answer and foil do.

    Raises:
        ValueError: a template without `{question}`, or with other fields.

    Example:
        >>> Form("Q: {question}", capital=True).of_question("is this red or blue?")
        'Q: Is this red or blue?'
    """

    template: str = "{question}"
    capital: bool = False
    capital_answers: bool = False

    def __post_init__(self) -> None:
        try:
            said = self.template.format(question="?!")
        except (LookupError, ValueError) as error:
            raise ValueError(
                f"the template {self.template!r} has another field than {{question}}"
            ) from error
        if said.count("?!") != 1:
            raise ValueError(f"the template {self.template!r} needs {{question}}, and once")

    def of_question(self, text: str) -> str:
        """What a model is asked."""
        return self.template.format(question=_capital(text) if self.capital else text)

    def of_answer(self, word: str) -> str:
        """What a model is to answer."""
        return _capital(word) if self.capital_answers else word


PLAIN = Form()


def prompt_form(task: str, *, short_answer: bool = False, capital_answers: bool = False) -> Form:
    """How a question is put to the models of a task.

    Args:
        task: `vqa`, the question as it is; `llava`, with a capital letter, as its tokenizer minds
            case.
        short_answer: of `llava` whether LLaVA-1.5's request for a short answer follows, in a line
            of its own. The released checkpoints were trained with it, and answer with a capital
            letter then; the toy was not.
        capital_answers: whether answer and foil begin with a capital letter.

    Raises:
        ValueError: a task without questions, or one that was not trained with the request.

    Example:
        >>> form = prompt_form("llava", short_answer=True, capital_answers=True)
        >>> form.of_question("is this red or blue?").splitlines()
        ['Is this red or blue?', 'Answer the question using a single word or phrase.']
        >>> form.of_answer("red")
        'Red'
    """
    if task not in ("vqa", "llava"):
        raise ValueError(
            f"task {task!r} answers no questions: a choice is put to models of task 'vqa' or "
            "'llava'; for others make pairs of captions (Pair, read_pairs, shapes_pairs)"
        )
    if task == "llava":
        template = f"{{question}}\n{SHORT_ANSWER}" if short_answer else "{question}"
        return Form(template, capital=True, capital_answers=capital_answers)
    if short_answer:
        raise ValueError("short_answer is a request to task 'llava'; 'vqa' is asked without")
    return Form(capital_answers=capital_answers)


def semantic_image_pairs(
    choices: Choices | Iterable[Choice], *, form: Form = PLAIN, on_bad: OnBad = "raise"
) -> tuple[list[Pair], Report]:
    """Pairs whose corrupt image is one of which the foil is right, under the same question.

    Args:
        choices: what to ask.
        form: how it is put.
        on_bad: `raise` refuses a choice without another image, `drop` leaves it out.

    Raises:
        ValueError: a choice without another image, if not dropped.

    Example:
        >>> choice = Choice("a.jpg", "is it black or white?", "white", "black", "b.jpg", name="1")
        >>> (pair,), report = semantic_image_pairs([choice])
        >>> pair.corrupt_image, pair.texts
        ('b.jpg', ['is it black or white?', 'is it black or white?'])
    """
    rows = Rows(on_bad)
    pairs: list[Pair] = []
    for choice in choices:
        with rows.row(f"choice {choice.name!r}"):
            if choice.other_image is None:
                raise BadRow("no other image", f"it has no image that shows {choice.foil!r}")
            pairs.append(_pair(choice, form, corrupt=None))
    return pairs, rows.report()


def symmetric_token_replacement(
    choices: Choices,
    to_str_tokens: ToStrTokens,
    *,
    seed: int,
    tokens: Tokens = "aligned",
    form: Form = PLAIN,
    on_bad: OnBad = "raise",
) -> tuple[list[Pair], Report]:
    """Pairs whose corrupt question names two other options, about the same image.

    Both options are replaced by words of the choice's vocabulary that are neither similar to one of
    the options nor to each other, and that the question does not have. Answer and foil remain those
    of the clean question.

    Args:
        choices: what to ask.
        to_str_tokens: the tokens of a text, such as `model.to_str_tokens`.
        seed: the same seed draws the same words for a choice, whatever stands before it.
        tokens: `aligned`: each word has as many tokens as the option in whose place it stands, so
            that every other token keeps its position; `equal`: words are drawn freely, and choices
            whose number of tokens changes are left out and counted. Positions between the options
            may then hold other words than in the clean question.
        form: how it is put.
        on_bad: `raise` refuses a choice for which there are no two words, `drop` leaves it out.

    Raises:
        ValueError: another `tokens`; a choice for which there are no words, if not dropped.

    Example:
        >>> choice = Choice("a.jpg", "is it black or red?", "red", "black", vocabulary="color")
        >>> colors = {"color": Vocabulary(("black", "red", "blue", "light blue"))}
        >>> _, report = symmetric_token_replacement(
        ...     Choices([choice], Report(1), colors), str.split, seed=0, on_bad="drop")
        >>> print(report)
        kept 0 of 1 rows
          1 dropped, no words for the options: choice ''
    """
    if tokens not in get_args(Tokens):
        raise ValueError(f"tokens is 'aligned' or 'equal', not {tokens!r}")

    def n_tokens(text: str) -> int:
        return len(to_str_tokens(form.of_question(text)))

    rows = Rows(on_bad)
    pairs: list[Pair] = []
    for choice in choices:
        with rows.row(f"choice {choice.name!r}"):
            if choice.vocabulary is None:
                raise BadRow("no vocabulary", "it has no vocabulary, whose words replace options")
            vocabulary = choices.vocabularies[choice.vocabulary]
            rng = np.random.default_rng([seed, *choice.name.encode()])
            words = _words(choice, vocabulary, rng, n_tokens if tokens == "aligned" else None)
            corrupt = _replaced(choice, words)
            n, made = n_tokens(choice.text), n_tokens(corrupt)
            if n != made:
                raise LeftOut("number of tokens changed", f"{n} tokens became {made}")
            pairs.append(_pair(choice, form, corrupt))
    return pairs, rows.report()


def other_questions(
    choices: Choices | Iterable[Choice],
    to_str_tokens: ToStrTokens,
    *,
    form: Form = PLAIN,
    on_bad: OnBad = "raise",
) -> tuple[list[Pair], Report]:
    """Pairs whose corrupt question has another answer, about the same image, with the same options.

    For models that do not read the options, such as the toys, to which replacing them does nothing.

    Args:
        choices: what to ask.
        to_str_tokens: the tokens of a text, such as `model.to_str_tokens`; pairs of unequal numbers
            are left out and counted.
        form: how it is put.
        on_bad: `raise` refuses a choice without another question, `drop` leaves it out.

    Raises:
        ValueError: a choice without another question, if not dropped.
    """
    rows = Rows(on_bad)
    pairs: list[Pair] = []
    for choice in choices:
        with rows.row(f"choice {choice.name!r}"):
            if choice.other_text is None:
                raise BadRow("no other question", "no question about its image has another answer")
            texts = map(form.of_question, (choice.text, choice.other_text))
            n, made = (len(to_str_tokens(text)) for text in texts)
            if n != made:
                raise LeftOut("number of tokens changed", f"{n} tokens became {made}")
            pairs.append(_pair(choice, form, choice.other_text))
    return pairs, rows.report()


Replaced = Mapping[str, str]  # words by the option in whose place they stand


def _words(
    choice: Choice,
    vocabulary: Vocabulary,
    rng: np.random.Generator,
    n_tokens: Callable[[str], int] | None,
) -> Replaced:
    """Two words in the place of the options.

    Args:
        choice: has the options.
        vocabulary: has the words.
        rng: draws them.
        n_tokens: of a question, which neither word may change; None where it may change.

    Raises:
        BadRow: there are none.
    """
    options = choice.answer, choice.foil
    asked = _spaced(" ".join((choice.text, *choice.roles.values())))
    found = []
    for option, other in (options, options[::-1]):
        words = vocabulary.instead_of(option, beside=(other,))
        drawn = rng.permutation(len(words)).tolist()
        found.append([words[index] for index in drawn if _spaced(words[index]) not in asked])
    n = 0 if n_tokens is None else n_tokens(choice.text)

    def fits(replaced: Replaced) -> bool:
        return n_tokens is None or n_tokens(_replaced(choice, replaced)) == n

    fitting: dict[str, bool] = {}  # of the second words, each tried once
    for word in found[0]:
        if not fits({choice.answer: word}):
            continue
        for beside in found[1]:
            if beside not in fitting:
                fitting[beside] = fits({choice.foil: beside})
            if fitting[beside] and not vocabulary.near(word, beside):
                return {choice.answer: word, choice.foil: beside}
    raise BadRow(
        "no words for the options",
        f"the vocabulary {choice.vocabulary!r} has no two words that fit in the place of "
        f"{choice.answer!r} and {choice.foil!r}",
    )


def _replaced(choice: Choice, words: Replaced) -> str:
    """The question with other words in the place of options."""
    text = choice.text
    spans = zip((choice.answer, choice.foil), choice.spans, strict=True)
    for option, (begin, end) in sorted(spans, key=lambda one: one[1], reverse=True):
        if option in words:
            text = text[:begin] + words[option] + text[end:]
    return text


def _pair(choice: Choice, form: Form, corrupt: str | None) -> Pair:
    """The pair of a choice with a corrupt question, or with the other image."""
    answer, foil = map(form.of_answer, (choice.answer, choice.foil))
    said = {
        role: word
        for role, word, asked in (("answer", choice.answer, answer), ("foil", choice.foil, foil))
        if word != asked  # where they are the same, they are roles by themselves
    }
    return Pair(
        choice.image,
        form.of_question(choice.text),
        corrupt_image=choice.other_image if corrupt is None else None,
        corrupt_text=None if corrupt is None else form.of_question(corrupt),
        answer=answer,
        foil=foil,
        name=choice.name,
        roles={**choice.roles, **said},
    )


def _spaced(text: str) -> str:
    """The words of a text in lower case, with a space before and behind each."""
    return " ".join(["", *re.findall(r"[^\W_]+", text.casefold()), ""])


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
