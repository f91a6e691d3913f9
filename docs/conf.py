"""Sphinx's settings for the site: `make docs` builds it offline, and every warning is an error.

Pages are Markdown (MyST). A page whose head names a kernel is a notebook: its `{code-cell}` blocks are executed by myst-nb,
and what they print is on the page. `_ext/` has our own extensions: labels for the sections of the theory, docstrings, the
gallery.
"""

import os
import sys
from importlib.metadata import version as version_of
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    "PYTHONWARNINGS": "ignore:IProgress not found",  # progress bars need no widgets here
}

project = "bayes_klrl"
author = "The bayes_klrl authors"
copyright = "The bayes_klrl authors, Apache-2.0"  # noqa: A001  (Sphinx reads this name)
release = version = version_of("bayes_klrl")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "docstrings",
    "gallery_cards",
    "theory_labels",
]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
nitpicky = False  # base classes of torch and Pyro have no page to link to, and nothing is downloaded

# -- Markdown and notebooks
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE / "_build" / ".jupyter_cache")
nb_execution_timeout = 900  # seconds per cell; an idle machine needs 30
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_merge_streams = True
nb_ipywidgets_js = {}  # nothing is loaded from the network

# -- docstrings
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True}
python_maximum_signature_line_length = 80
python_display_short_literal_types = True
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # the signature has the types
default_role = "code"  # `name` in a docstring is code

# -- the pages
html_theme = "pydata_sphinx_theme"
html_title = "bayes_klrl"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "logo": {"text": "bayes_klrl"},
    "header_links_before_dropdown": 7,
    "navigation_with_keys": False,
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system has it
html_sidebars = {"start": [], "gallery": []}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
