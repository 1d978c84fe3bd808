"""Values of every row of the exhibits, figures and METHODS on a few fixed images, stage by stage.

`python tests/snapshot.py` compares them with tests/snapshots.json and names the operation where the
first difference stands; `--store` writes them anew, and refuses to where an operation gives other
values under the revision that it had. `--rows NAME ...` looks at some rows only.
"""

import argparse
import hashlib
import json
import sys
from collections import defaultdict
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch

from zsad.core.identity import identity_key
from zsad.encoder.loading import load_encoder, untrained
from zsad.encoder.spec import EncodeSpec
from zsad.papers.exhibits import EXHIBITS
from zsad.papers.pictures import PICTURES
from zsad.pipeline.detector import build, fuse_terms, resolve_artifact, run_terms
from zsad.pipeline.identity import method_identity, revs_of
from zsad.pipeline.inputs import select_images
from zsad.pipeline.references import REFERENCES, Reference
from zsad.pipeline.rows import METHODS
from zsad.pipeline.scores import SCORES, SET_STEPS, upsample
from zsad.pipeline.terms import TERMS
from zsad.rendered.procad import design
from zsad.rendered.scene import render

FILE = Path(__file__).with_name('snapshots.json')
CATEGORIES = dict(bottle='object', carpet='texture')
SMALL, LARGE = 6, 18  # images that references are drawn from: for most rows, for many references
DIGITS = 7  # significant digits that are stored
# of the largest stored value of a stage; other CPU instructions move 5e-6 (mutual), else 4e-6
TOLERANCE = 2e-5

# --- images


@lru_cache
def pool(category: str) -> tuple:  # ((id, label, number, defect), ...)
    "List 18 images of a category, 9 of them normal; rows score the first ones."
    kinds = design(category, 'procad').kind.defects
    good = [(f'{category}/good/{i:03}', 0, 1000 + i, 'good') for i in range(9)]
    names = [kinds[i % len(kinds)] for i in range(9)]
    bad = [(f'{category}/{k}/{i // len(kinds):03}', 1, 2000 + i, k) for i, k in enumerate(names)]
    first = [good[0], bad[0], bad[1], good[1], good[2], bad[2]]
    return (*first, *good[3:], *bad[3:])


@lru_cache
def shots(category: str) -> tuple:
    "List 6 normal training images of a category."
    return tuple((f'{category}/train/{i:03}', 0, i, 'good') for i in range(6))


@lru_cache(None)
def image(category: str, number: int, defect: str):
    return render(design(category, 'procad'), number, defect).image


# --- rows


def row_key(m, control: str) -> str:
    "Identify a row by what it means, revisions aside; heads are told apart by the artifact's name."
    if m.terms:
        what = {k: v for k, v in method_identity(m).items() if k != 'revs'}
    else:
        what = dict(encode=m.encode, prompts=m.prompts)  # the artifact says the rest
    return identity_key(dict(method=what, seed=m.seed, control=control, artifact=m.artifact))


def all_rows() -> dict:  # key -> dict(name, method, control, labels)
    "Collect the distinct rows of all exhibits, figures and of METHODS."
    found = {}
    shown = [
        (e.name, r.label, r.method, r.control)
        for e in (*EXHIBITS.values(), *PICTURES.values())
        for r in e.rows
        if r.method is not None and r.control != 'bfloat16'  # its values depend on the processor
    ]
    for exhibit, label, m, control in shown + [('METHODS', n, m, '') for n, m in METHODS.items()]:
        row = dict(name=f'{m.name} on {control}' if control else m.name, method=m, control=control)
        found.setdefault(row_key(m, control), dict(row, labels=[]))['labels'].append(
            [exhibit, label]
        )
    return found


def why_not(m, encoder) -> str:
    "Say why a row cannot be run on an encoder; '' where it can."
    if max([p.depth or 0 for p in m.encode.paths], default=0) > encoder.blocks:
        return f'needs more than {encoder.blocks} blocks'
    try:
        resolve_artifact(m, encoder)
    except FileNotFoundError:
        return 'artifact not shipped'
    return ''


def images_scored(m, kind: str) -> int:
    "Count the images of a category that a row scores: fewer of what takes long."
    subsets = max([p.get('subsets', 1) for _, p in m.terms], default=1)
    if subsets > 1:
        return 2 * subsets
    slow = m.encode.views != 'one' or m.encode.windows or m.has('adapted')
    return (2 if kind == 'object' else 1) if slow else 3


# --- tokens, each encoded once


class Encodings:
    "Encoders, preprocessed images and tokens; paths, windows and views are encoded apart and kept."

    def __init__(self, rows):
        self.rows, self.x, self.kept, self.texts, self.paths = (
            rows,
            {},
            {},
            defaultdict(dict),
            defaultdict(tuple),
        )
        for row in rows.values():
            m, encoder = row['method'], self.encoder(row['control'])
            if why_not(m, encoder):
                continue
            spec = build(m, (), encoder).method.encode
            group = row['control'], m.interpolation, spec.stage, spec.layers
            self.paths[group] = tuple(dict.fromkeys(self.paths[group] + spec.paths))

    @cached_property
    def shipped(self):
        return load_encoder('mini', device='cpu', dtype='float32')

    @cached_property
    def plain(self):
        return load_encoder('mini-plain', device='cpu', dtype='float32')

    @cached_property
    def drawn(self):
        return untrained(self.shipped)

    def encoder(self, control):
        return {
            '': lambda: self.shipped,
            'plain training': lambda: self.plain,
            'random weights': lambda: self.drawn,
        }[control]()

    def images(self, control, interpolation, category, which) -> torch.Tensor:
        key = interpolation, category, which
        if key not in self.x:
            prep = replace(self.encoder(control).preprocess, interpolation=interpolation)
            self.x[key] = prep([image(category, number, defect) for _, _, number, defect in which])
        return self.x[key]

    def tokens(self, control, m, category, which):
        "Encode images for a row whose block numbers are resolved."
        encoder, spec = self.encoder(control), m.encode

        def once(part):
            key = control, m.interpolation, category, which, part
            if key not in self.kept:
                self.kept[key] = encoder.tokens(
                    self.images(control, m.interpolation, category, which), part
                )
            return self.kept[key]

        paths = self.paths[control, m.interpolation, spec.stage, spec.layers]
        t = once(
            EncodeSpec(
                paths if set(spec.paths) <= set(paths) else spec.paths, spec.layers, spec.stage
            )
        )
        windows = once(EncodeSpec((), windows=spec.windows)).windows if spec.windows else {}
        views = once(EncodeSpec((), views=spec.views)).views if spec.views != 'one' else None
        return replace(
            t, patches={p: t.patches[p] for p in spec.paths}, windows=windows, views=views
        )


# --- stages


def spots(n: int, count: int) -> np.ndarray:
    return np.linspace(0, n - 1, count).round().astype(int)


def summary(t: torch.Tensor) -> list:
    "Give mean, deviation, lowest, highest and eight values at fixed places of every image."
    out = []
    for a in t.detach().cpu():
        v = a.double().flatten()
        if len(v) == 1:
            out.append([float(v)])
        else:
            out.append(
                [
                    *map(float, (v.mean(), v.std(correction=0), v.min(), v.max())),
                    *v[spots(len(v), 8)].tolist(),
                ]
            )
    return out


def token_stages(tokens, spec) -> list:
    named = {
        p: f'{p.attention}' + ('' if p.depth is None else f', depth {p.depth}')
        for p in tokens.patches
    }
    out = [('encoding class token', tokens.cls)]
    out += [
        (f'encoding path {named[p]}, {spec.stage}', t.transpose(0, 1))
        for p, t in tokens.patches.items()
    ]
    out += [(f'encoding windows {k}', t) for k, t in tokens.windows.items()]
    return out if tokens.views is None else out + [('encoding views', tokens.views)]


def references_of(kept, control, m, category, name, which) -> tuple:  # Reference, numbers drawn
    "Draw the references of a row by its own sampler."
    if not m.reference:
        return None, None
    sampler, params = m.reference
    if sampler == 'shots':
        ids = [i for i, *_ in shots(category)]
        drawn = [
            ids.index(i) for i in REFERENCES[sampler](ids, seed=m.seed, category=name, **params)
        ]
        used = sorted(set(drawn))
        t = kept.tokens(control, m, category, tuple(shots(category)[i] for i in used))
        t = select_images(t, [used.index(i) for i in drawn])
        return Reference(t, torch.arange(len(drawn)).expand(len(which), -1)), torch.tensor([drawn])
    few = pool(category)[: SMALL if params.get('count', 1) < SMALL else LARGE]
    rows = REFERENCES[sampler](
        [i for i, *_ in which],
        m.seed,
        pool=[i for i, *_ in few],
        labels=[label for _, label, *_ in few],
        category=name,
        **params,
    )
    return Reference(kept.tokens(control, m, category, few), rows), rows


def scoring_stages(det, s) -> list:
    "Take the scoring inputs through terms, fusion, smoothing, upsampling, score and set steps."
    m, s = det.method, run_terms(det.method, s)
    out = [(f'term {name}', s.maps[name]) for name, _ in m.terms]
    out.append(('fusion', fuse_terms(replace(m, smoothing='none'), s).grid))
    s = fuse_terms(m, s)
    s = replace(s, map=upsample(s.grid, det.encoder.preprocess.size, m.align_corners))
    score = SCORES[m.score[0]](s, **m.score[1])
    out += [('smoothing', s.grid), ('upsampling', s.map), (f'score {m.score[0]}', score)]
    for name, params in m.set_steps:
        score = SET_STEPS[name](score, s.tokens.cls, **params)
        out.append((f'set_step {name}', score))
    return out


def row_stages(kept, row, category: str, kind: str) -> list:  # [(stage, numbers)]
    "Compute all stages of a row on the images of a category."
    control = row['control']
    prompts = row['method'].prompts
    boards = prompts == 'winclip/task'  # its prompts differ from those of winclip for boards alone
    name = 'pcb1' if boards and kind == 'object' else category
    det = build(row['method'], {name: kind}, kept.encoder(control), kept.texts[control])
    m, which = det.method, pool(category)[: images_scored(det.method, kind)]
    x, ids = kept.images(control, m.interpolation, category, which), [i for i, *_ in which]
    tokens = kept.tokens(control, m, category, which)
    reference, drawn = references_of(kept, control, m, category, name, which)
    s = det.scoring_inputs(name, tokens, reference, x, ids)
    out = [('preprocessing', x), *token_stages(tokens, m.encode)]
    if drawn is not None:
        out.append((f'reference {m.reference[0]}', drawn))
    if s.class_embeddings is not None:
        some = s.prompt_embeddings[spots(len(s.prompt_embeddings), 6)]
        out += [('prompts, single', some), ('prompts', s.class_embeddings)]
    if m.terms:
        out += scoring_stages(det, s)
    p = det.predict(tokens, [name] * len(ids), reference and {name: reference}, x, ids)
    head = (
        f"head {det.trained.about['head']}"
        if not m.terms
        else 'the order of steps in Detector.score_category'
    )
    return [(stage, summary(t)) for stage, t in (*out, (f'{head}', p.map), (f'{head}', p.score))]


def compute(names=(), categories=CATEGORIES) -> dict:
    "Compute the stages of all rows, or of those of some names: {'rows', 'revs', 'skipped'}."
    rows = {k: r for k, r in all_rows().items() if not names or r['name'] in names}
    kept, out = Encodings(rows), dict(rows={}, revs={}, skipped={})
    for key, row in rows.items():
        encoder = kept.encoder(row['control'])
        why = why_not(row['method'], encoder)
        if why:
            out['skipped'][key] = [row['name'], why]
            continue
        det = build(row['method'], (), encoder)
        out['revs'] |= revs_of(
            det.method, det.trained.about['head'] if det.trained and det.trained.head else ''
        )
        stages = [
            [c, stage, t]
            for c, kind in categories.items()
            for stage, t in row_stages(kept, row, c, kind)
        ]
        out['rows'][key] = dict(name=row['name'], labels=row['labels'], stages=stages)
    return out


# --- stored values


def rounded(t):
    return [[float(f'{v:.{DIGITS}g}') for v in a] for a in t]


def pack(now: dict) -> str:
    "Write values as JSON, one row or one list of values a line; equal lists are written once."
    values, rows = {}, {}
    for key, row in now['rows'].items():
        refs = []
        for category, stage, t in row['stages']:
            text = json.dumps(rounded(t), separators=(',', ':'))
            name = hashlib.sha256(text.encode()).hexdigest()[:10]
            values[name] = text
            refs.append([category, stage, name])
        rows[key] = json.dumps(
            dict(name=row['name'], labels=row['labels'], stages=refs), separators=(',', ':')
        )

    def block(d):
        return '{\n' + ',\n'.join(f'{json.dumps(k)}:{v}' for k, v in d.items()) + '\n}'

    parts = dict(
        revs=json.dumps(dict(sorted(now['revs'].items()))),
        skipped=block({k: json.dumps(v) for k, v in now['skipped'].items()}),
        rows=block(rows),
        values=block(values),
    )
    return block(parts) + '\n'


def unpack(text: str) -> dict:
    stored = json.loads(text)
    for row in stored['rows'].values():
        row['stages'] = [[c, stage, stored['values'][name]] for c, stage, name in row['stages']]
    return stored


def operation_of(stage: str) -> str:
    "Name whose revision stands for a stage: an operation, 'encoding' or 'pipeline'."
    if stage.startswith('encoding'):
        return 'encoding'
    kinds = [registry.kind for registry in (TERMS, SCORES, REFERENCES, SET_STEPS)]
    return stage if stage.split(' ')[0] in (*kinds, 'head') else 'pipeline'


def differs(was: list, now: list):
    "Give (image, number of the value, stored, computed) of the largest difference, or None."
    if [len(a) for a in was] != [len(a) for a in now]:
        return 0, 0, f'{len(was)} images', f'{len(now)} images'
    a, b = (np.concatenate([np.asarray(t, float) for t in part]) for part in (was, now))
    off = np.abs(a - b)
    off[np.isnan(a) != np.isnan(b)] = np.inf
    k = int(np.nanargmax(off)) if np.isfinite(off).any() or np.isinf(off).any() else 0
    if not off[k] > TOLERANCE * max(np.nanmax(np.abs(a)), 1e-12):
        return None
    place = [(i, j) for i, t in enumerate(was) for j in range(len(t))][k]
    return *place, float(a[k]), float(b[k])


def first_difference(was: dict, now: dict):
    "Compare the stages in the order of the data flow: (category, stage, image, place, was, is)."
    for (c, stage, a), (c2, stage2, b) in zip(was['stages'], now['stages']):
        if (c, stage) != (c2, stage2):
            return c2, stage2, 0, 0, f'stage {stage!r}', f'stage {stage2!r}'
        found = differs(a, b)
        if found:
            return c, stage, *found
    return None


def compare(stored: dict, now: dict, whole: bool = True) -> list:  # [(row name, operation, text)]
    "List what differs between stored and computed values, by row."
    out = []
    for key, row in now['rows'].items():
        if key not in stored['rows']:
            out.append((row['name'], 'row', 'is not among the stored rows'))
            continue
        found = first_difference(stored['rows'][key], row)
        if not found:
            continue
        category, stage, i, j, was, is_ = found
        where = f'{stage!r} on {category}, image {i}, value {j}'
        text = f'first differs at {where}: {was!r} stored, {is_!r} now'
        out.append((row['name'], operation_of(stage), text))
    gone = set(stored['rows']) - set(now['rows']) if whole else ()
    return out + [
        (stored['rows'][k]['name'], 'row', 'is stored and no longer computed') for k in gone
    ]


def message(stored: dict, now: dict, whole: bool = True) -> str:
    "Describe what differs, operation by operation, and what to do; '' where nothing does."
    found, lines = defaultdict(list), []
    for name, op, text in compare(stored, now, whole):
        found[op].append((name, text))
    for op, rows in found.items():
        if op == 'row':
            lines += [f'{name}: {text}; store the values of today' for name, text in rows]
            continue
        rev = now['revs'].get(op)
        names = ', '.join(name for name, _ in rows[:12])
        lines.append(
            f'{op} (rev {rev}) gives other values in {len(rows)} rows: {names}\n'
            f'  {rows[0][0]} {rows[0][1]}\n'
            f'  Fix the code, or raise the rev of {RAISE.get(op, op)} and run '
            '`python tests/snapshot.py --store`'
        )
    for op, rev in now['revs'].items():
        if stored['revs'].get(op) != rev:
            lines.append(
                f'{op} has rev {rev}, the stored values are of rev {stored["revs"].get(op)}: '
                'run `python tests/snapshot.py --store`, and commit the new values with the new rev'
            )
    return '\n'.join(lines)


RAISE = dict(
    pipeline='the pipeline, PIPELINE_REV in nbs/core/identity.ipynb',
    encoding='encoding, ENCODING_REV in nbs/core/identity.ipynb',
)


def refused(stored: dict, now: dict) -> list:
    "List operations that give other values under the revision they had."
    changed = {op for _, op, _ in compare(stored, now) if op != 'row'}
    return sorted(op for op in changed if stored['revs'].get(op) == now['revs'].get(op))


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument('--store', action='store_true', help='write the values of today')
    ask.add_argument('--rows', nargs='+', default=(), help='names of rows; all without')
    ask.add_argument('--categories', nargs='+', choices=list(CATEGORIES), default=list(CATEGORIES))
    given = ask.parse_args()
    torch.set_num_threads(1)
    now = compute(given.rows, {c: CATEGORIES[c] for c in given.categories})
    stored = unpack(FILE.read_text()) if FILE.exists() else dict(rows={}, revs={})
    if given.store:
        if given.rows or len(given.categories) < len(CATEGORIES):
            ask.error('--store writes all rows; leave --rows and --categories out')
        same = refused(stored, now)
        if same:
            print(
                f'not stored: {", ".join(same)} give other values under the rev they had\n'
                f'{message(stored, now)}',
                file=sys.stderr,
            )
            return 1
        FILE.write_text(pack(now))
        return 0
    whole = not given.rows and len(given.categories) == len(CATEGORIES)
    for row in stored['rows'].values():
        row['stages'] = [s for s in row['stages'] if s[0] in given.categories]
    text = message(stored, now, whole)
    print(text or f'{len(now["rows"])} rows as stored')
    return 1 if text else 0


if __name__ == '__main__':
    sys.exit(main())
