"""A hook of mkdocs: links between notebooks, and to files outside the site, work in the built pages.

mkdocs follows links in Markdown pages alone. A notebook reaches it as HTML, where `06_audio.ipynb` would stay as it is.
"""
import posixpath
import re

from mkdocs.exceptions import PluginError
from mkdocs.utils import get_relative_url

LINK = re.compile(r'href="(?![a-z]+:|#|/)([^"#]+\.(?:ipynb|md|py|json|csv)|\.\./[^"#]*)(#[^"]*)?"')


def on_page_content(html, page, config, files):
    "Point each link of a page at the page that is made from its target, or at the file in the repository."
    def new_target(found):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), found[1]))
        target = files.get_file_from_path(path)
        anchor = found[2] or ""
        if target: return f'href="{get_relative_url(target.url, page.url)}{anchor}"'
        if not path.startswith("../"): raise PluginError(f"{page.file.src_uri} links to {found[1]}, which is not there")
        return f'href="{config.repo_url}/blob/main/{path[3:]}{anchor}"'
    return LINK.sub(new_target, html)
