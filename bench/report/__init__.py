"""Show every table and picture of a folder of records on one page, and run many benchmarks by one command."""

from .page import TITLE, Section, sections, write

__all__ = ["TITLE", "Section", "sections", "write"]
