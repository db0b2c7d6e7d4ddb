"""Small data sets of the shapes world in the formats of the real ones.

`python -m hooked_vlm.data.miniatures KIND OUT` writes one, to see what a reader expects, and to try
a whole experiment without a download.
"""

from __future__ import annotations

import csv
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from hooked_vlm.data import shapes
from hooked_vlm.data.facial_expressions import EMOTIONS, FOLDERS, SIDE
from hooked_vlm.data.svo_probes import COLUMNS, GROUPS

PIXELS = 96  # sides of the images of all but faces
URL = "https://example.org/shapes/{}"


def write_miniature(kind: str, out: str | Path, n: int = 24, seed: int = 0) -> Path:
    """Writes a small data set.

    Args:
        kind: one of `KINDS`: `svo-probes`: `svo_probes.csv`, `image_urls.txt` and `images`, with
            triplets such as 'red circle,above,blue square'; `mit-states`: `images/red circle/0.jpg`
            and so on; `facial-expressions`: scenes in place of faces, in folders of emotions that
            mean nothing, and the same as `fer2013.csv`; `coco-qa`: `color_coco_qa.csv`, whose
            questions have five words, and `images`.
        out: a folder that is not there, or empty.
        n: how many scenes; of `facial-expressions`, of each split.
        seed: the same seed writes the same data set.

    Returns:
        The folder.

    Raises:
        ValueError: another kind, or no scene.
        FileExistsError: there is something at `out`. Nothing is written then.
    """
    if kind not in KINDS:
        raise ValueError(f"no kind of miniature {kind!r}; there are {', '.join(KINDS)}")
    if n < 1:
        raise ValueError(f"n must be positive, got {n}")
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is there and not empty; give another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
        made = Path(folder) / "made"
        (made / "images").mkdir(parents=True)
        KINDS[kind](made, n, seed)
        if out.exists():
            out.rmdir()
        shutil.move(made, out)
    return out


def _svo_probes(out: Path, n: int, seed: int) -> None:
    """One line for each scene; subject, verb and object differ in turn.

    Subjects and objects differ in their colours, and verbs are of one word: other words of the
    set then have as many tokens as both options, as their exchange needs.
    """
    rng = np.random.default_rng([seed, 2])
    lines = []
    for index, scene in enumerate(shapes.scenes(n, seed)):
        part = index % 3
        variant = scene.variants("relation" if part == 1 else "color")
        differing = [one for one in variant if _differs(scene, one) == part]
        other = differing[int(rng.integers(len(differing)))]
        row: dict[str, Any] = {"sentence": scene.caption()}
        for side, one in (("pos", scene), ("neg", other)):
            name = f"{index}-{side}.jpg"
            _save(one.image(PIXELS), out / "images" / name)
            row |= {f"{side}_triplet": ",".join(_triplet(one)), f"{side}_url": URL.format(name)}
        lines.append(row | {group: group == GROUPS[part] for group in GROUPS})
    _table(out / "svo_probes.csv", ["sentence", *COLUMNS], lines)
    urls = [line[f"{side}_url"] for line in lines for side in ("pos", "neg")]
    (out / "image_urls.txt").write_text("\n".join(urls) + "\n", encoding="utf-8")


def _triplet(scene: shapes.Scene) -> tuple[str, str, str]:
    return scene.first.words, scene.relation.removesuffix(" of"), scene.second.words


def _differs(scene: shapes.Scene, other: shapes.Scene) -> int:
    """Which part of the triplets differs."""
    pairs = zip(_triplet(scene), _triplet(other), strict=True)
    return [one != another for one, another in pairs].index(True)


def _mit_states(out: Path, n: int, seed: int) -> None:
    """Each scene in the folder of its first shape."""
    count: Counter[str] = Counter()
    for scene in shapes.scenes(n, seed):
        words = scene.first.words
        (out / "images" / words).mkdir(exist_ok=True)
        _save(scene.image(PIXELS), out / "images" / words / f"{count[words]}.jpg")
        count[words] += 1


def _facial_expressions(out: Path, n: int, seed: int) -> None:
    """Scenes in place of faces, emotions in turn."""
    scenes = iter(shapes.scenes(3 * n, seed))
    lines: list[dict[str, Any]] = []
    folders = {emotion: folder for folder, emotion in FOLDERS.items()}
    usages = {"train": ["Training"], "validation": ["PublicTest", "PrivateTest"]}
    for split in usages:
        for index in range(n):
            number = index % len(EMOTIONS)
            emotion = EMOTIONS[number]
            grey = next(scenes).image(SIDE).convert("L")
            inside = out / "images" / split / folders.get(emotion, emotion)
            inside.mkdir(parents=True, exist_ok=True)
            _save(grey, inside / f"{index}.jpg")
            pixels = " ".join(map(str, np.asarray(grey).ravel().tolist()))
            usage = usages[split][index % len(usages[split])]
            lines.append({"emotion": number, "pixels": pixels, "Usage": usage})
    _table(out / "fer2013.csv", ["emotion", "pixels", "Usage"], lines)


def _coco_qa(out: Path, n: int, seed: int) -> None:
    """Two questions for each scene, the colour of each shape."""
    lines: list[dict[str, Any]] = []
    for number, scene in enumerate(shapes.scenes(n, seed), start=1):
        _save(scene.image(PIXELS), out / "images" / f"{number:012d}.jpg")
        for question in scene.questions():
            if question.attribute == "color" and question.foil is None:
                told = {"question": question.text, "answer": question.answer}
                line = {f"{name}_count": said for name, said in told.items()}
                lines.append({"": len(lines), "train_image_id_count": number, **line})
    columns = ["", "train_image_id_count", "question_count", "answer_count"]
    _table(out / "color_coco_qa.csv", columns, lines)


KINDS: dict[str, Callable[[Path, int, int], None]] = {
    "svo-probes": _svo_probes,
    "mit-states": _mit_states,
    "facial-expressions": _facial_expressions,
    "coco-qa": _coco_qa,
}


def _save(image: Image.Image, file: Path) -> None:
    image.save(file, quality=95, subsampling=0)  # so that colours keep their edges


def _table(file: Path, columns: Sequence[str], lines: Iterable[dict[str, Any]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, columns)
        writer.writeheader()
        writer.writerows(lines)


def main(
    kind: Annotated[str, typer.Argument(help=f"One of {', '.join(KINDS)}.")],
    out: Annotated[Path, typer.Argument(help="A folder that is not there, or empty.")],
    n: Annotated[int, typer.Option(help="How many scenes.")] = 24,
    seed: Annotated[int, typer.Option(help="The same seed writes the same.")] = 0,
) -> None:
    """Writes a small data set of drawn shapes in the format of a real one."""
    try:
        typer.echo(f"wrote {write_miniature(kind, out, n, seed)}")
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    typer.run(main)
