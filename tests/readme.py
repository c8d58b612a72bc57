"""Make README.md from nbs/index.ipynb, or check that it is in step: `python tests/readme.py [--write]`."""
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\((?!https?://|#)([^)]+)\)")


def render(cell):
    "The Markdown of one cell; code leaves nothing."
    return "".join(cell["source"]) if cell["cell_type"] == "markdown" else ""


def readme():
    "README.md as index.ipynb has it, with links as seen from the top folder."
    cells = json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n\n".join(t for t in map(render, cells) if t.strip())
    text = LINK.sub(lambda m: f"]({m[1][3:] if m[1].startswith('../') else 'nbs/' + m[1]})", text)
    return "<!-- made from nbs/index.ipynb by `make readme`: edit the notebook -->\n\n" + text + "\n"


if __name__ == "__main__":
    path = ROOT / "README.md"
    if "--write" in sys.argv: path.write_text(readme(), encoding="utf-8")
    elif path.read_text(encoding="utf-8") != readme():
        sys.exit("README.md is not in step with nbs/index.ipynb: run `make readme`")
