"""The picture of the README: the first screen of a run's report.

python tools/report_picture.py runs/demo-baseline docs/report.png
"""

import sys
from pathlib import Path


def main() -> None:
    """Open report.html of a run folder in Debian's Chromium, and save what a reader sees first."""
    from playwright.sync_api import sync_playwright

    run, picture = map(Path, sys.argv[1:])
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium")
        page = browser.new_page(viewport={"width": 1200, "height": 700}, color_scheme="light")
        page.goto((run / "report.html").resolve().as_uri())
        page.screenshot(path=picture)
        browser.close()
    print(f"{picture}: {picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
