"""Write README.md from nbs/index.ipynb with its stored outputs: `python .ci/readme.py`.

`--check` compares instead.
"""

import base64
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


LINK = re.compile(r'\]\((?=[\w/]+\.ipynb)')  # to a page, relative to nbs
STYLE = re.compile(r'<style.*?</style>\n?|^\s+', re.S | re.M)


def kind_of_image(data):
    "Format of the image in an output, or None."
    return next((k for k in ('png', 'jpeg') if f'image/{k}' in data), None)


def text_of(output):
    "Markdown of an output without an image; None where it has nothing to show."
    data = output.get('data', {})
    if 'text/markdown' in data:
        return ''.join(data['text/markdown'])
    if 'text/html' in data:
        return STYLE.sub('', ''.join(data['text/html'])).strip()
    text = data.get('text/plain', output.get('text'))
    return None if text is None else '```\n' + ''.join(text).strip() + '\n```'


def render_code(number, cell):
    "Markdown of a code cell with its outputs, and its pictures {path: bytes}."
    source = ''.join(cell['source'])
    code = '\n'.join(l for l in source.split('\n') if not l.startswith('#|'))
    parts = [] if '#| echo: false' in source else [f'```python\n{code.strip()}\n```']
    pictures = {}
    for output in cell['outputs']:
        data = output.get('data', {})
        kind = kind_of_image(data)
        if kind:
            name = f'nbs/images/index-{number}.{kind}'
            pictures[name] = base64.b64decode(data[f'image/{kind}'])
            parts.append(f'![Image, mask and maps of three parts]({name})')
        elif text_of(output) is not None:
            parts.append(text_of(output))
    return parts, pictures


def render(nb):
    "Markdown of a notebook and the pictures it needs, {path: bytes}."
    parts, pictures = [], {}
    for number, cell in enumerate(nb['cells']):
        if cell['cell_type'] == 'markdown':
            parts.append(LINK.sub('](nbs/', ''.join(cell['source'])))
            continue
        texts, found = render_code(number, cell)
        parts += texts
        pictures |= found
    return '\n\n'.join(parts) + '\n', pictures


if __name__ == '__main__':
    text, pictures = render(json.loads((ROOT / 'nbs' / 'index.ipynb').read_text()))
    if '--check' in sys.argv:
        sys.exit((ROOT / 'README.md').read_text() != text)
    (ROOT / 'README.md').write_text(text)
    for name, data in pictures.items():
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_bytes(data)
