"""False captions of a scene, beyond those of its variants."""

from __future__ import annotations

from hooked_vlm.data import shapes


def swapped_colors(scene: shapes.Scene) -> str:
    """A false caption: the two colours exchanged."""
    first, second = scene.first, scene.second
    return f"a {second.color} {first.kind} {scene.relation} a {first.color} {second.kind}"


def other_axis(scene: shapes.Scene) -> list[str]:
    """False captions: the two relations of the other axis."""
    true = (scene.relation, shapes.OPPOSITES[scene.relation])
    return [
        f"a {scene.first.words} {relation} a {scene.second.words}"
        for relation in shapes.RELATIONS
        if relation not in true
    ]


def other_scene(scene: shapes.Scene, other: shapes.Scene) -> str:
    """Another scene's caption, or one with the colours exchanged where that one is true here."""
    return swapped_colors(scene) if other.caption() in scene.captions() else other.caption()
