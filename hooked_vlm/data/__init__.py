"""Data: pairs of clean and corrupt inputs, choices they are built from, and the shapes world."""

from hooked_vlm.data import shapes
from hooked_vlm.data.builders import (
    Form,
    other_questions,
    prompt_form,
    semantic_image_pairs,
    symmetric_token_replacement,
)
from hooked_vlm.data.choices import Choice, Choices, Question, Vocabulary
from hooked_vlm.data.coco_qa import read_coco_qa
from hooked_vlm.data.facial_expressions import read_facial_expressions
from hooked_vlm.data.mit_states import read_mit_states
from hooked_vlm.data.pairs import Pair, read_pairs, read_pairs_report, shapes_pairs
from hooked_vlm.data.readers import read_choices
from hooked_vlm.data.report import Report
from hooked_vlm.data.shapes_choices import shapes_choices
from hooked_vlm.data.svo_probes import read_svo_probes

__all__ = [
    "Choice",
    "Choices",
    "Form",
    "Pair",
    "Question",
    "Report",
    "Vocabulary",
    "other_questions",
    "prompt_form",
    "read_choices",
    "read_coco_qa",
    "read_facial_expressions",
    "read_mit_states",
    "read_pairs",
    "read_pairs_report",
    "read_svo_probes",
    "semantic_image_pairs",
    "shapes",
    "shapes_choices",
    "shapes_pairs",
    "symmetric_token_replacement",
]
