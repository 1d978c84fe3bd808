"""Write README.md from nbs/index.ipynb with its stored outputs: `python .ci/readme.py`; `--check` compares instead."""

import base64
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def render(nb):
    "Markdown of a notebook and the pictures it needs, {path: bytes}."
    parts, pictures = [], {}
    for i, c in enumerate(nb['cells']):
        text = ''.join(c['source'])
        if c['cell_type'] == 'markdown':
            parts.append(text)
            continue
        code = '\n'.join(l for l in text.split('\n') if not l.startswith('#|'))
        if '#| echo: false' not in text:
            parts.append(f'```python\n{code.strip()}\n```')
        for o in c['outputs']:
            data = o.get('data', {})
            kind = next((k for k in ('png', 'jpeg') if f'image/{k}' in data), None)
            if kind:
                name = f'nbs/images/index-{i}.{kind}'
                pictures[name] = base64.b64decode(data[f'image/{kind}'])
                parts.append(f'![Image, mask and maps of three parts]({name})')
            elif 'text/markdown' in data:
                parts.append(''.join(data['text/markdown']))
            elif 'text/html' in data:
                parts.append(
                    re.sub(
                        r'<style.*?</style>\n?|^\s+',
                        '',
                        ''.join(data['text/html']),
                        flags=re.S | re.M,
                    ).strip()
                )
            elif 'text/plain' in data or 'text' in o:
                parts.append(
                    '```\n' + ''.join(data.get('text/plain', o.get('text', ''))).strip() + '\n```'
                )
    return '\n\n'.join(parts) + '\n', pictures


if __name__ == '__main__':
    text, pictures = render(json.loads((ROOT / 'nbs' / 'index.ipynb').read_text()))
    if '--check' in sys.argv:
        sys.exit((ROOT / 'README.md').read_text() != text)
    (ROOT / 'README.md').write_text(text)
    for name, data in pictures.items():
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_bytes(data)
