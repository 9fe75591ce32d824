"""The sample pair of `--demo`; see LICENSES.md."""

from importlib import resources


def pair() -> tuple[bytes, bytes]:
    """The files of the content and of the style picture, JPEG."""
    folder = resources.files(__name__)
    return (folder / "content.jpg").read_bytes(), (folder / "style.jpg").read_bytes()
