"""OpenCV, which few people need. Imports no torch."""

from typing import Any


def import_cv2() -> Any:
    """OpenCV. Raises ImportError that says what to install."""
    try:
        import cv2
    except ImportError as error:
        raise ImportError("edges and scribbles need OpenCV: pip install opencv-python-headless") from error
    return cv2
