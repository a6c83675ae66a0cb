"""The site: ``make docs`` builds it into build/docs. Reference pages are made from the sources by ``_ext/sources.py``."""

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "pytest-batchinv"
author = "the authors of pytest-batchinv"
copyright = "2026, the authors of pytest-batchinv"
version = release = version_of("pytest-batchinv")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "sources"]
exclude_patterns = ["_ext", "examples"]
html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_theme_options = {"footer_icons": []}
pygments_style, pygments_dark_style = "default", "github-dark"

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "deflist"]
smartquotes = False  # "--option" is no dash
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True

autodoc_typehints = "none"  # the signature in the text says what matters
autodoc_member_order = "bysource"

linkcheck_timeout = 20
linkcheck_workers = 4
