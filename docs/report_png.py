"""Take a picture of the report's page: python docs/report_png.py PAGE.html FILE.png en-US light.

Down to the first row of charts, so that it ends between things. Chinese needs a font that has it,
such as that of Debian's package fonts-noto-cjk.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

page, file, locale, scheme = sys.argv[1:]
with sync_playwright() as driver:
    browser = driver.chromium.launch(executable_path=shutil.which("chromium"))
    size = {"width": 1180, "height": 1500}
    shown = browser.new_page(viewport=size, locale=locale, color_scheme=scheme)
    shown.goto(Path(page).resolve().as_uri())
    end = "document.querySelector('.charts figure').getBoundingClientRect().bottom"
    shown.set_viewport_size({"width": 1180, "height": int(shown.evaluate(end)) + 16})
    shown.screenshot(path=file)
