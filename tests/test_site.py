"""The site: pages are processed as for publication, built, and every link is followed.

Quarto itself is not needed: `nbdev_proc_nbs` only looks for it, and `smalldocs` builds the
processed project.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest
from nbdev.config import get_config
from tree import NOTEBOOKS, ROOT, cells, page

PROCESS = 'from nbdev.quarto import nbdev_proc_nbs; nbdev_proc_nbs(n_workers=0)'
TOP = ('nbs', 'zsad', 'settings.ini', 'setup.py', '_quarto.yml', 'README.md')


def is_empty_export(source):
    "Whether a cell is exported and holds nothing but its directives."
    rest = [l for l in source.splitlines() if l.strip() and not l.lstrip().startswith('#|')]
    return not rest and bool(re.search(r'^\s*#\|\s*exports?\b', source, re.M))


def test_no_exported_cell_is_empty():
    assert is_empty_export('#| exports\n\n') and not is_empty_export('#| default_exp core')
    empty = [page(p) for p in NOTEBOOKS for s in cells(p) if is_empty_export(s)]
    assert not empty, (
        f'exported cells with nothing but a directive in {empty}: Quarto stops there; delete them'
    )


def test_the_sidebar_lists_every_page_once():
    listed = re.findall(r'^\s+- (\S+\.ipynb)$', (ROOT / '_quarto.yml').read_text(), re.M)
    assert sorted(listed) == sorted(f'{page(p)}.ipynb' for p in NOTEBOOKS)


def copy_tree(to):
    "Copy what the site is made from."
    for name in TOP:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name,
                to / name,
                symlinks=True,
                ignore=shutil.ignore_patterns('__pycache__', '.*'),
            )
        else:
            shutil.copy(ROOT / name, to / name)


def run(to, *command):
    "Run Python in the copy, with a stand-in for Quarto and without the user's settings."
    (to / 'bin').mkdir(exist_ok=True)
    (to / 'bin' / 'quarto').write_text('#!/bin/sh\necho "Quarto was called: $*" >&2\nexit 1\n')
    (to / 'bin' / 'quarto').chmod(0o755)
    home = {k: str(to / 'home') for k in ('XDG_CONFIG_HOME', 'IPYTHONDIR')}
    env = {
        **os.environ,
        **home,
        'PATH': f'{to / "bin"}{os.pathsep}{os.environ["PATH"]}',
        'PYTHONPATH': str(to),
    }
    done = subprocess.run(
        [sys.executable, *command], cwd=to, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def output_name(path):
    "Name of the page that a processed notebook becomes."
    head = ''.join(json.loads(path.read_text())['cells'][0]['source'])
    return re.search(r'^output-file: (\S+)$', head, re.M).group(1)


class Page(HTMLParser):
    "Anchors and links of a page."

    def __init__(self, path):
        super().__init__()
        self.anchors, self.links = set(), []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors |= {given[k] for k in ('id', 'name') if given.get(k)}
        self.links += [given[k] for k in ('href', 'src') if given.get(k)]


class Links:
    "Follows the links of a built site; `names` maps published names to files here."

    def __init__(self, site, names, config):
        self.site, self.names = site, names
        self.pages = {p: Page(p) for p in sorted(site.rglob('*.html'))}
        self.home = f'{config.doc_host}{config.doc_baseurl}/'
        self.source = f'{config.git_url}/blob/{config.branch}/'

    def fault(self, page, link):
        "What is wrong with a link, or None; pages elsewhere are not asked."
        if link.startswith(self.source):
            return self.source_fault(link.removeprefix(self.source))
        inside = link.startswith(self.home)
        url = urlsplit(link.removeprefix(self.home) if inside else link)
        if url.scheme or url.netloc:
            return None
        base = self.site if inside else page.parent
        target = (base / unquote(url.path)).resolve() if url.path else page
        target = target / 'index.html' if target.is_dir() else target
        target = self.names.get(target, target)
        if not target.exists():
            return 'no such file'
        known = (
            target not in self.pages
            or not url.fragment
            or unquote(url.fragment) in self.pages[target].anchors
        )
        return None if known else 'no such anchor'

    def source_fault(self, rest):
        "What is wrong with a link to a line of the source, or None."
        name, _, line = rest.partition('#L')
        if not (ROOT / name).exists():
            return 'no such file'
        there = len((ROOT / name).read_text().splitlines())
        return None if int(line or 1) <= there else f'{there} lines only'

    def broken(self):
        "All broken links, (page, link, what is wrong)."
        found = [
            (p.name, l, self.fault(p, l)) for p, page in self.pages.items() for l in page.links
        ]
        return [f for f in found if f[2]]


def test_broken_links_are_found(tmp_path):
    "The check itself: a missing file, a missing anchor, here and under the published name."
    home, source = 'https://zsad.github.io/zsad/', 'https://github.com/zsad/zsad/blob/main/'
    good = [
        '#one',
        'b.html#two',
        f'{home}public.html#two',
        'https://example.org/x',
        f'{source}setup.py#L3',
    ]
    bad = [
        '#two',
        'b.html#one',
        'c.html',
        f'{home}public.html#one',
        f'{home}c.html',
        f'{source}setup.py#L9999',
        f'{source}no.py',
    ]
    (tmp_path / 'a.html').write_text(
        '<p id="one">' + ''.join(f'<a href="{l}">x</a>' for l in good + bad)
    )
    (tmp_path / 'b.html').write_text('<p id="two">')
    links = Links(tmp_path, {tmp_path / 'public.html': tmp_path / 'b.html'}, get_config(path=ROOT))
    assert [f[1] for f in links.broken()] == bad


def build(to):
    "Process and build the copied project; return the processed notebooks, names below _proc."
    run(to, 'setup.py', '-q', 'egg_info')  # entry point `nbdev`: names in prose become links
    printed = run(to, '-c', PROCESS)
    assert 'Traceback' not in printed and 'Quarto was called' not in printed, printed[-3000:]
    processed = sorted((to / '_proc').rglob('*.ipynb'))
    assert len(processed) == len(NOTEBOOKS) > 60
    return [p.relative_to(to / '_proc') for p in processed]


def test_the_site_builds_and_no_link_is_broken(tmp_path):
    copy_tree(tmp_path)
    processed = build(tmp_path)
    assert {p.with_suffix('').as_posix() for p in processed} == {page(p) for p in NOTEBOOKS}
    published = {p: p.parent / output_name(tmp_path / '_proc' / p) for p in processed}
    twice = [p for p, n in Counter(published.values()).items() if n > 1]
    assert not twice, f'pages that overwrite each other: {twice}; rename the notebooks'
    if sys.version_info < (3, 11):
        pytest.skip('smalldocs, which builds the pages, needs Python 3.11')
    run(tmp_path, '-m', 'smalldocs.cli', 'render', '-q', '_proc')
    site = tmp_path / '_proc' / '_docs'
    names = {site / name: site / p.with_suffix('.html') for p, name in published.items()}
    links = Links(site, names, get_config(path=ROOT))
    assert len(links.pages) == len(NOTEBOOKS)
    every = [l for p in links.pages.values() for l in p.links]
    sources = sum(l.startswith(links.source) for l in every)
    symbols = sum(l.startswith(links.home) for l in every)
    assert sources > 500 and symbols > 50, 'the entry point nbdev in setup.py is not found'
    assert not links.broken(), links.broken()
