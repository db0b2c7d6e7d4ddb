"""Why methods fail on planted circuits, in words."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True)
class Failure:
    """One reason, and where it shows.

    Attributes:
        methods: names of methods.
        what: roles of nodes that they miss, or of distractors that they name; the empty one stands
            for sites that are neither, and for a map that points elsewhere.
        why: a paragraph.
    """

    methods: tuple[str, ...]
    what: tuple[str, ...]
    why: str

    def covers(self, frame: pd.DataFrame) -> pd.Series:
        """Which rows of a table show it."""

        def shows(row: pd.Series) -> bool:
            if row["method"] not in self.methods:
                return False
            if row["kind"] == "map":
                return bool(row["pointing"] < 1)
            roles = {one if "." not in one else "" for one in (*row["missed"], *row["wrong"])}
            return bool(roles & set(self.what))

        return frame.apply(shows, axis=1).astype(bool)


FAILURES = (
    Failure(
        ("zero ablation",),
        ("primary", "backup"),
        "The backup reads where the primary is silent. Without the primary it takes over, and the"
        " answer stays; without the backup nothing changes, since it rests as long as the primary"
        " reads. One at a time, both seem to be of no use; the card's proof silences them together."
        " A mean or another input in place of the primary still says that it read, so that the"
        " backup goes on resting: these ablations find the primary, for the wrong reason.",
    ),
    Failure(
        (
            "patching, denoise",
            "patching, noise",
            "path patching",
            "greedy circuit",
            "attribution patching",
            "integrated gradients",
            "mean ablation",
            "resample ablation",
        ),
        ("backup",),
        "In the clean, the corrupt and every other run the backup rests, and says the same: there"
        " is nothing to patch, no difference for a gradient to multiply, and its mean is what it"
        " is. Only what silences another head shows it.",
    ),
    Failure(
        ("attribution patching", "integrated gradients"),
        ("eye", "finder", "mover"),
        "The attention that these nodes steer is saturated: a head looks at one patch and no other,"
        " and the slope of a softmax is 0 there, however much a patch at its keys or queries would"
        " change. The corrupt image exchanges the kinds of the shapes alone, which keys read; the"
        " finder and the mover are read by queries. The mean over eight runs between the two passes"
        " the places where attention turns, and finds the eye more often; a turn between two steps"
        " it does not see. What reaches the answer through values is found by both.",
    ),
    Failure(
        ("greedy circuit",),
        ("suppressor",),
        "The suppressor writes against the reader. A set of sites is as faithful without it: greedy"
        " search drops whatever can be spared, and what lowers the answer can.",
    ),
    Failure(
        ("zero ablation",),
        ("suppressor",),
        "Without the suppressor the answer grows surer, by less than a tenth of what it falls"
        " without the reader, for the logits' norm divides by what both wrote. Patching finds it,"
        " since the other answer that it writes against counts, too.",
    ),
    Failure(
        ("NOTICE",),
        ("eye", "answerer", "backup"),
        "NOTICE patches the stack that reads the question. What the image encoder and the answer"
        " decoder do it does not see, nor, as any patch, the backup that rests in both runs.",
    ),
    Failure(
        ("causal tracing",),
        ("eye", "mover", "backup"),
        "The noise stands on what the image encoder gives, so that nothing in front of it is"
        " corrupt and could be restored, nor what depends on the question alone, as the mover does."
        " The backup, too, restores nothing.",
    ),
    Failure(
        ("causal tracing",),
        ("suppressor",),
        "What is measured is the probability of the answer, as published. Under noise it is near"
        " chance, and can hardly fall when the suppressor is restored alone; a logit difference"
        " falls.",
    ),
    Failure(
        ("raw attention",),
        ("eye", "answerer", "mover", "backup"),
        "An MLP attends to nothing; what reads the image's content from a token of text does not"
        " attend to the image; and the backup rests on the class token, which shows nothing.",
    ),
    Failure(
        ("raw attention",),
        ("look-alike", "loud", "outlier", ""),
        "To attend is not to matter. The look-alike and the loud head attend as the reader does,"
        " and nothing reads what they write; the outlier attends to one patch whatever that shows;"
        " and heads that take nothing from the image still spread their attention over it.",
    ),
    Failure(
        ("mean attention",),
        ("",),
        "The mean over heads and positions is that of all that attend, of which one or two heads"
        " look at the shape, from one word. The others drown them, more or less: nowhere does the"
        " shape's cell get a fifth of the mass, where an even share is a ninth.",
    ),
)
