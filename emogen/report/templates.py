"""How pages are made from templates: the report, and the grid of rows × templates.

Both include `colours.css` and `rows.js`, which are beside this file.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2


def load_template(path: Path, **filters: Callable[[Any], Any]) -> jinja2.Template:
    """Load the template of a page. It escapes all data, and may include the files of this folder."""
    loader = jinja2.FileSystemLoader([path.parent, Path(__file__).parent])
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= filters
    return environment.get_template(path.name)
