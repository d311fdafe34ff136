"""Writes the lists of docs/models.md: how each architecture of transformers is computed.

python tools/models_table.py docs/models.md     # 2 minutes
"""

import logging
import sys
import warnings
from collections import defaultdict
from pathlib import Path

import transformers

from emogen.errors import ModelError
from emogen.model.plain_rows import generates, pads, require_causal
from emogen.model.shared_prefix import share_prefix

sys.path.insert(0, "tests")
import architectures

BEGIN, END = "<!-- written by tools/models_table.py -->", "<!-- end -->"
PREFIX = [5, 9, 17, 33, 4, 8, 21] * 5  # longer than the windows of the tiny models
LONGEST = 80


def verdict(name: str) -> tuple[str, str]:
    """The heading that an architecture belongs under; and its name, with the reason if there is one."""
    try:
        model = architectures.make(name)
    except Exception:  # whatever a configuration raises that was made smaller
        return "Not tried", name
    warnings_of_model = _Collector()
    logging.getLogger("emogen").addHandler(warnings_of_model)
    try:
        require_causal(model)
        if share_prefix(model, PREFIX, LONGEST):
            return "Shared prefix", name
        has_cache, padded = generates(model, PREFIX, LONGEST, 0), pads(model, PREFIX, LONGEST)
    except ModelError as error:
        return ("Refused" if "see those that follow" in str(error) else "Not tried"), name
    finally:
        logging.getLogger("emogen").removeHandler(warnings_of_model)
    reason = warnings_of_model.messages[0].split("model: ")[1].split(". ")[0]
    if has_cache and padded:
        return "Rows in full", f"{name} ({reason})"
    return "Rows in full, answers without a cache", f"{name} ({reason})"


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def main() -> None:
    """Replace the lists between the two marks."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    page = Path(sys.argv[1])
    found = defaultdict(list)
    for name in architectures.NAMES:
        heading, entry = verdict(name)
        found[heading].append(entry)
        print(f"{heading}: {entry}", file=sys.stderr)
    lines = [f"With transformers {transformers.__version__}:", ""]
    for heading in ("Shared prefix", "Rows in full", "Rows in full, answers without a cache", "Refused", "Not tried"):
        lines += [f"**{heading}** ({len(found[heading])}): {', '.join(found[heading])}.", ""]
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
