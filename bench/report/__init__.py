"""Every table and picture of a folder of records on one page; many benchmarks in one command."""

from .page import STYLE, TITLE, Section, sections, write

__all__ = ["STYLE", "TITLE", "Section", "sections", "write"]
