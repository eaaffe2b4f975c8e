"""The share of attributes that were drawn right, by hand."""

from pipelines.evaluate.shapes import attribute_accuracy
from pipelines.shapes.scenes import Scene, Thing


def test_accuracy_by_hand() -> None:
    def scene(shape: str, color: str, background: str | None) -> Scene:
        return Scene((Thing(shape, color, "solid"),), background, "large", "in the center")

    asked = [scene("star", "red", "white"), scene("star", "blue", None)]
    seen = [scene("star", "red", "black"), scene("circle", "blue", "gray")]
    assert attribute_accuracy(asked, seen) == {"shape": 0.5, "color": 1.0, "background": 0.5, "all": 0.0}
