"""Pure functions of a caption's text."""


def clean(caption: str | None) -> str | None:
    """Strip white space and replace what UTF-8 cannot hold by "?". Returns None if nothing is left."""
    return (caption.strip().encode(errors="replace").decode() or None) if caption else None
