"""How Sphinx builds the docs; `make docs` runs it. The pages are Markdown, and index.rst is their order."""

from importlib import metadata

project = "LoRAM"
copyright = "the LoRAM authors, Apache-2.0"
release = metadata.version("loram")

extensions = ["myst_parser"]
exclude_patterns = ["README.md"]  # index.rst includes it
highlight_language = "none"  # a block without a language is a command line or its output
myst_heading_anchors = 3  # links such as `recipes.md#dry-run` reach headings of levels 1 to 3

html_theme = "furo"
html_title = "LoRAM"
html_copy_source = False
html_use_index = False
