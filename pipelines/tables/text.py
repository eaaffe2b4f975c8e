"""Pure functions of a caption's text."""


def clean(caption: str | None) -> str | None:
    """Without white space around it, None where nothing is left; what UTF-8 cannot hold becomes "?"."""
    return (caption.strip().encode(errors="replace").decode() or None) if caption else None
