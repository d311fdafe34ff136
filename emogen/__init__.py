"""emogen: multi-label text classification by instruction generation."""

__version__ = "0.1.0"
