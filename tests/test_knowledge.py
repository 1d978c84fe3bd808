"""The knowledge base word by word, descriptions of drawn masks whose answers are known, and the
builder over real HTTP: a server in a thread that answers, is busy, fails, is slow or sends
nonsense.
"""

import base64
import dataclasses
import importlib.util
import io
import itertools
import json
import math
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from zsad.datasets.samples import Sample
from zsad.datasets.sources import SOURCES
from zsad.learned import knowledge_builder as module
from zsad.learned.descriptions import (
    color_words,
    colors_of,
    describe,
    describe_mask,
    measure_mask,
    shape_of,
    shape_word,
    to_lab,
)
from zsad.learned.knowledge import (
    FORMAT,
    background,
    count_tokens,
    knowledge,
    knowledge_of_image,
    look_up,
    parse_base,
    read_base,
    write_base,
)
from zsad.learned.knowledge_builder import build_base, estimate
from zsad.learned.questions import (
    CATEGORY_QUESTION,
    IMAGE_QUESTION,
    Question,
    category_questions,
    check_answer,
    image_questions,
    messages,
)
from zsad.rendered.boards import BOARDS
from zsad.rendered.medical import MEDICAL
from zsad.rendered.novel import NOVEL
from zsad.rendered.procad import KINDS, PROCAD

BASE = read_base()['sets']
OWN = {(s, c): e for s, part in BASE.items() for c, e in part.items() if isinstance(e, dict)}
EVERY = [(s, c) for s, part in BASE.items() for c in part]

# --- what the base holds

PAPER = {
    'mvtec',
    'visa',
    'mpdd',
    'btad',
    'sdd',
    'dagm',
    'brainmri',
    'liverct',
    'resc',
    'br35h',
    'covid',
    'headct',
}  # KAnoCLIP, Sec. 3.1


@pytest.mark.parametrize(
    'dataset,categories',
    [
        ('mvtec', SOURCES['mvtec'].counts),
        ('visa', SOURCES['visa'].counts),
        ('procad', PROCAD),
        ('procad-aux', KINDS),
        ('procad-novel', [k.name for k in NOVEL]),
        ('procad-b', [k.name for k in BOARDS]),
        ('procad-med', [k.name for k in MEDICAL]),
        ('mpdd', 'bracket_black bracket_brown bracket_white connector metal_plate tubes'.split()),
        ('btad', ['01', '02', '03']),
        ('sdd', ['electrical commutators']),
        ('dagm', [f'Class{k}' for k in range(1, 11)]),
    ],
)
def test_every_category_of_a_set_is_there(dataset, categories):
    assert set(BASE[dataset]) == set(categories)


def test_all_sets_of_the_paper_are_there():
    assert PAPER <= set(BASE) and len(BASE['dtd_synthetic']) == 12
    assert [
        list(BASE[s])
        for s in (
            'brainmri',
            'br35h',
            'bmad_brain',
            'headct',
            'covid',
            'liverct',
            'resc',
            'colondb',
            'clinicdb',
        )
    ] == [['brain']] * 4 + [['chest'], ['liver'], ['retina'], ['colon'], ['colon']]


@pytest.mark.parametrize('dataset,category', EVERY)
def test_every_category_has_ten_descriptions_and_a_normal_look(dataset, category):
    e = look_up(category, dataset)
    assert (e.dataset, e.category, len(e.anomalies), e.source) == (
        dataset,
        category,
        10,
        'written for zsad',
    )
    assert (e.at == f'{dataset}/{category}') == ((dataset, category) in OWN)
    assert (
        background(category, dataset) == e.background
        and knowledge(category, dataset) == e.anomalies[:5]
    )


def test_no_description_and_no_normal_look_is_there_twice():
    for texts in (
        [s.lower() for e in OWN.values() for s in e['anomalies']],
        [e['background'] for e in OWN.values()],
    ):
        assert [s for s, n in Counter(texts).items() if n > 1] == []


def test_descriptions_of_a_category_do_not_share_most_of_their_words():
    for at, e in OWN.items():
        thing = set(re.findall(r'\w+', e['noun'].lower())) | set(
            'a an the of in on its with is it one whose across'.split()
        )
        words = [set(re.findall(r'\w+', s.lower())) - thing for s in e['anomalies']]
        for a, b in itertools.combinations(words, 2):
            assert len(a & b) < 0.75 * len(a | b), (at, a, b)


@pytest.mark.parametrize('dataset,category', OWN)
def test_each_phrase_is_short_plain_and_names_the_thing(dataset, category):
    e = OWN[dataset, category]
    for s in e['anomalies']:
        assert s.isascii() and s == s.strip() and s[-1] not in '.,;' and 4 <= len(s.split()) <= 16
        assert e['noun'].split()[-1].lower().rstrip('s') in s.lower(), s
        assert (
            re.search(
                r'[\d_{}<>"]|\b(anomal|defect|abnormal|maybe|may|might|could|because|due|caused|'
                r'image of)',
                s,
            )
            is None
        ), s
        assert re.search(r'colour|grey|fibre|centre|mould|tumour', s) is None, s
        assert count_tokens(s) <= 32
    normal = e['background']
    assert (
        normal[0].isupper()
        and normal[-1] == '.'
        and normal.count('. ') <= 1
        and 8 <= len(normal.split()) <= 45
        and count_tokens(normal) <= 64
    )


def test_tokens_are_those_of_open_clip():
    import open_clip

    tok = open_clip.get_tokenizer('ViT-B-16-plus-240')
    for s in [s for e in OWN.values() for s in (*e['anomalies'][::4], e['background'])]:
        ids = tok([s])[0]
        assert (
            count_tokens(s) == (ids != 0).sum() and ids.argmax() == count_tokens(s) - 1
        )  # nothing was cut off
    assert count_tokens('crack ' * 100) == 102


def test_sets_that_share_a_text_say_so_and_lead_to_it_at_once():
    for (s, c), e in ((at, BASE[at[0]][at[1]]) for at in EVERY if at not in OWN):
        assert tuple(e.split('/')) in OWN and knowledge(c, s, 10) == tuple(
            OWN[tuple(e.split('/'))]['anomalies']
        )
    assert (
        look_up('brain', 'br35h').at == 'brainmri/brain'
        and look_up('Class7', 'dagm').at == 'dagm/Class1'
    )
    assert all(look_up(c, 'procad-aux').anomalies == look_up(c, 'procad').anomalies for c in PROCAD)


# --- asking it


def test_n_only_says_where_the_list_ends():
    for n in range(1, 11):
        assert knowledge('grid', 'procad', n) == knowledge('grid', 'procad', 10)[:n]
    for n in (0, -1, 11, 2.0, '5', None, True):
        with pytest.raises(ValueError, match=rf'n={n!r}.*procad/grid has 10.*from 1 to 10'):
            knowledge('grid', 'procad', n)


def test_without_a_set_the_first_that_has_the_category_answers():
    assert (
        look_up('bottle').dataset == 'mvtec'
        and look_up('gear').dataset == 'procad'
        and look_up('button').dataset == 'procad-aux'
        and look_up('brain').dataset == 'brainmri'
    )


def test_unknown_names_are_answered_with_close_ones():
    with pytest.raises(ValueError, match=r"category='botle'.*close to it: bottle.*user="):
        knowledge('botle')
    with pytest.raises(
        ValueError, match=r"category='metal nut'.*of procad; close to it: metal_nut"
    ):
        knowledge('metal nut', 'procad')
    with pytest.raises(ValueError, match=r"category='qqq'.*of btad; it has 01, 02, 03"):
        knowledge('qqq', 'btad')
    with pytest.raises(ValueError, match=r"category='gear'.*of mvtec"):
        knowledge('gear', 'mvtec')
    with pytest.raises(ValueError, match=r"dataset='mvtek'.*'mvtec'.*None"):
        knowledge('bottle', 'mvtek')
    with pytest.raises(ValueError, match='category=None'):
        knowledge(None)


# --- a file of one's own

ENTRY = dict(noun='mug', background='A mug.', anomalies=['a mug without a handle', 'a cracked mug'])


def content(**sets):
    return dict(format=FORMAT, source='me', sets=sets)


def test_a_users_file_goes_over_the_base(tmp_path):
    f = write_base(
        tmp_path / 'mine.json',
        content(shop=dict(mug=ENTRY, bottle=ENTRY, cup='shop/mug'), mvtec=dict(cable=ENTRY))
        | dict(images=dict(shop={'mug/bad/1': ['x', 'y']})),
    )
    assert (
        knowledge('mug', n=2, user=f) == ('a mug without a handle', 'a cracked mug')
        and look_up('mug', user=f).source == 'me'
    )
    assert (
        look_up('cup', 'shop', f).at == 'shop/mug' and look_up('bottle', user=f).dataset == 'shop'
    )  # the user's sets come first
    assert (
        knowledge('cable', 'procad', 1, f)
        == knowledge('cable', 'procad-aux', 1, f)
        == ('a mug without a handle',)
    )  # aliases are followed afterwards
    assert (
        knowledge('cable', 'procad')
        == knowledge('cable', 'mvtec')
        != knowledge('cable', 'mvtec', 2, f)
    )
    for s, c in EVERY:
        if look_up(c, s).at != 'mvtec/cable':
            assert look_up(c, s, f) == look_up(c, s)
    assert [knowledge_of_image('mug/bad/1', 'shop', m, f) for m in (1, 2, 3)] == [
        ('x',),
        ('x', 'y'),
        ('x', 'y'),
    ] and knowledge_of_image('no', 'shop', user=f) == () == knowledge_of_image('mug/bad/1', 'shop')
    assert look_up('cup', 'shop', read_base(f)) == look_up('cup', 'shop', f)  # read once
    with pytest.raises(ValueError, match='from 1 to 2'):
        knowledge('mug', user=f)


@pytest.mark.parametrize(
    'entry,words',
    [
        ({}, 'noun, background missing'),
        ([], 'noun, background missing'),
        (7, 'missing'),
        (ENTRY | dict(noun=' '), 'noun missing'),
        (ENTRY | dict(background=3), 'background missing'),
        (ENTRY | dict(anomalies=[]), 'anomalies missing'),
        (ENTRY | dict(anomalies='a crack'), 'anomalies missing'),
        (ENTRY | dict(anomalies=['a', '']), "'' among"),
        (ENTRY | dict(anomalies=['a', 4]), '4 among'),
        (ENTRY | dict(anomalies=['a crack', 'A crack']), "'A crack'|'a crack' is there twice"),
        ('mug', "'mug'.*set/category"),
        ('a/b/c', 'set/category'),
    ],
)
def test_entries_that_cannot_be_used_are_named(entry, words, tmp_path):
    with pytest.raises(ValueError, match='shop/mug.*' + f'(?:{words})'):
        parse_base(content(shop=dict(mug=entry)), 'mine')
    with pytest.raises(ValueError):
        write_base(tmp_path / 'x.json', content(shop=dict(mug=entry)))
    assert list(tmp_path.iterdir()) == []  # nothing half written


def test_files_that_are_no_base_are_named(tmp_path):
    f = tmp_path / 'mine.json'
    for text, words in (
        ('{', 'not valid JSON'),
        ('[]', 'not a knowledge base.*zsad-knowledge-1'),
        ('{"sets": {}}', 'not a knowledge base'),
        (json.dumps(content(shop=[])), '"sets" and "images"'),
        (
            json.dumps(content() | dict(images={'shop': {'1': 'one string'}})),
            'shop/1.*list of non-empty',
        ),
    ):
        f.write_text(text)
        with pytest.raises(ValueError, match=rf'mine\.json.*{words}'):
            read_base(f)
    with pytest.raises(FileNotFoundError):
        read_base(tmp_path / 'none.json')
    for at in ('shop/none', 'none/mug', 'shop/b'):
        with pytest.raises(ValueError, match=f"shop/a: its alias '{at}'"):
            look_up(
                'a', 'shop', parse_base(content(shop=dict(mug=ENTRY, a=at, b='shop/mug')), 'mine')
            )


# --- shape


def put(h, w, *, at=(20, 20), size=(90, 120)):
    m = np.zeros(size, bool)
    m[at[0] : at[0] + h, at[1] : at[1] + w] = True
    return m


@pytest.mark.parametrize(
    'h,w', [(1, 1), (1, 40), (40, 1), (3, 60), (5, 5), (20, 11), (7, 14), (31, 3)]
)
def test_a_bar_is_as_long_as_it_is(h, w):
    elongation, slenderness, fill = shape_of(put(h, w))
    a, b = max(h, w), min(h, w)
    inner = b if b % 2 else b - 1
    assert math.isclose(elongation, a / b, rel_tol=1e-9) and math.isclose(
        fill, 3 / math.pi, rel_tol=1e-9
    )
    assert math.isclose(
        slenderness, a * b / inner**2, rel_tol=1e-9
    )  # widths are those of whole pixels around a centre
    for other in (put(h, w, at=(0, 0)), put(h, w, at=(90 - h, 120 - w)), put(h, w).T):
        assert np.allclose(shape_of(other), (elongation, slenderness, fill), rtol=1e-9)


def moments(m):
    "Elongation and fill by a slow loop: every pixel as 11 x 11 points."
    p = [
        (i + (a + 0.5) / 11, j + (b + 0.5) / 11)
        for i, j in zip(*np.nonzero(m))
        for a in range(11)
        for b in range(11)
    ]
    y0, x0 = (sum(c) / len(p) for c in zip(*p))
    yy, xx, xy = (
        sum(t) / len(p)
        for t in zip(*(((y - y0) ** 2, (x - x0) ** 2, (x - x0) * (y - y0)) for y, x in p))
    )
    mean, r = (yy + xx) / 2, math.hypot((yy - xx) / 2, xy)
    return math.sqrt((mean + r) / (mean - r)), m.sum() / (
        4 * math.pi * math.sqrt(mean * mean - r * r)
    )


def test_shape_of_any_piece_is_that_of_a_slow_loop():
    rng = np.random.default_rng(0)
    for _ in range(5):
        m = np.zeros((24, 24), bool)
        m[4:20, 4:20] = rng.random((16, 16)) < 0.4
        elongation, slenderness, fill = shape_of(m)
        e, f = moments(m)
        assert abs(elongation - e) < 0.01 * e and abs(fill - f) < 0.01
        far = max(
            min(
                math.hypot(i - a, j - b)
                for a, b in itertools.product(range(24), repeat=2)
                if not m[a, b]
            )
            for i, j in zip(*np.nonzero(m))
        )
        assert abs(slenderness - m.sum() / max(1, 2 * far - 1) ** 2) < 1e-6


Y, X = np.mgrid[:120, :120] - 60.0
R = np.hypot(Y, X)
CROSS = ((abs(X) < 30) & (abs(Y) < 6)) | ((abs(Y) < 30) & (abs(X) < 6))


@pytest.mark.parametrize(
    'mask,word',
    [
        (R < 20, 'compact'),
        (np.hypot(Y / 2, X) < 12, 'elongated'),
        (abs(X) + abs(Y) < 20, 'compact'),
        ((abs(X - Y) < 4) & (abs(X + Y) < 60), 'long, narrow'),
        ((R < 40) & (R > 36), 'thin, winding'),
        ((R < 40) & (R > 36) & (Y < 10), 'thin, winding'),
        (CROSS, 'irregular'),
        ((R < 30) & ((X > 5) | (Y > 5) | (X < -20)), 'irregular'),
        (abs(Y - 15 * np.sin(X / 6)) + 0 * X < 3.5, 'thin, winding'),
    ],
)
def test_words_for_shapes(mask, word):
    image = np.full((120, 120, 3), 128, 'u1')
    s = measure_mask(image, mask & (R < 58))
    assert shape_word(s) == word


# --- place, size, number

CELLS = [
    'in the upper left',
    'at the top',
    'in the upper right',
    'on the left',
    'in the center',
    'on the right',
    'in the lower left',
    'at the bottom',
    'in the lower right',
]
GRAY = np.full((90, 120, 3), 128, 'u1')


@pytest.mark.parametrize('cell', range(9))
def test_nine_places_in_the_image_and_on_the_object(cell):
    r, c = divmod(cell, 3)
    s = measure_mask(GRAY, put(6, 6, at=(30 * r + 12, 40 * c + 17)))
    assert (s.row, s.column) == (r, c) and f'mark {CELLS[cell]} of the plate covers' in describe(
        'plate', s
    )
    fore = put(30, 30, at=(50, 80))  # the object, far down and right: its own nine cells
    s = measure_mask(GRAY, put(4, 4, at=(50 + 10 * r + 3, 80 + 10 * c + 3)), fore)
    assert (s.row, s.column) == (r, c) and math.isclose(s.share, 16 / 900)
    assert (
        describe_mask(
            GRAY, put(1, 1, at=(50 + 29 * (r == 2), 80 + 29 * (c == 2))), 'x', fore
        ).count(CELLS[6 * (r == 2) + 2 * (c == 2)])
        == 1
    )  # its corners


def test_share_is_of_the_object_and_what_lies_outside_widens_it():
    m = put(10, 10)
    assert math.isclose(measure_mask(GRAY, m).share, 100 / 10800) and math.isclose(
        measure_mask(GRAY, m, put(20, 20)).share, 0.25
    )
    assert math.isclose(
        measure_mask(GRAY, m, put(20, 20, at=(25, 20))).share, 100 / 450
    )  # half of the mask lies outside
    sizes = [
        describe('x', dataclasses.replace(measure_mask(GRAY, m), share=s)).split(',')[0]
        for s in (0.0049, 0.005, 0.0199, 0.02, 0.0599, 0.06, 0.1499, 0.15, 1.0)
    ]
    assert sizes == [
        'A tiny',
        'A small',
        'A small',
        'A medium-sized',
        'A medium-sized',
        'A large',
        'A large',
        'A very large',
        'A very large',
    ]
    parts = [
        re.search(
            '(?:less|about).* percent',
            describe('x', dataclasses.replace(measure_mask(GRAY, m), share=s)),
        )[0]
        for s in (0.001, 0.0099, 0.012, 0.055, 0.4)
    ]
    assert parts == [
        'less than 1 percent',
        'less than 1 percent',
        'about 1 percent',
        'about 6 percent',
        'about 40 percent',
    ]


def test_pieces_are_counted_and_the_largest_speaks():
    m = put(9, 3, at=(70, 100)) | put(3, 3, at=(5, 5)) | put(3, 1, at=(40, 60))
    s = measure_mask(GRAY, m)
    assert (s.pieces, s.row, s.column, round(s.elongation, 9)) == (
        3,
        2,
        2,
        3,
    )  # 27, 9 and 3 pixels: 3 is more than a tenth of 27
    assert (
        describe('x', s).startswith(
            'Three tiny, elongated marks, the largest in the lower right of the x, together cover '
            'less than 1 percent of the area'
        )
        and s.share < 0.005
    )
    assert measure_mask(GRAY, m | put(2, 1, at=(20, 110))).pieces == 3  # specks do not count
    assert (
        measure_mask(GRAY, put(3, 3, at=(5, 5)) | put(3, 3, at=(8, 8))).pieces == 1
    )  # corners touch
    for n, word in ((2, 'Two'), (6, 'Six'), (7, 'Many'), (40, 'Many')):
        assert describe('x', dataclasses.replace(s, pieces=n)).startswith(word + ' ')


# --- colour


@pytest.mark.parametrize(
    'rgb,lab',
    [
        ((255, 255, 255), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 255, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
        ((128, 128, 128), (53.59, 0, 0)),
        ((5, 5, 5), (1.37, 0, 0)),
        ((255, 255, 0), (97.14, -21.55, 94.48)),
    ],
)
def test_cielab_of_known_colors(rgb, lab):
    assert np.abs(to_lab(np.array(rgb, 'u1')) - lab).max() < 0.03


def test_colors_inside_and_around_are_those_of_a_slow_loop():
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (30, 34, 3), 'u1')
    m = np.zeros((30, 34), bool)
    m[10:16, 12:15] = m[3, 30] = True
    fore = rng.random((30, 34)) < 0.7
    inside, around = [], []
    for i, j in itertools.product(range(30), range(34)):
        far = min(math.hypot(i - a, j - b) for a, b in zip(*np.nonzero(m)))
        if m[i, j]:
            inside.append(to_lab(image[i, j]))
        elif 2 < far <= 6 and fore[i, j]:
            around.append(to_lab(image[i, j]))
    assert np.allclose(
        colors_of(image, m, fore), (np.mean(inside, 0), np.mean(around, 0)), atol=1e-9
    )
    assert colors_of(image, m, m) is None


def linear(rgb, k):
    "The same color in k times the light."
    c = np.array(rgb) / 255
    c = np.where(c > 0.04045, ((c + 0.055) / 1.055) ** 2.4, c / 12.92) * k
    return np.round(
        255 * np.where(c > 0.0031308, 1.055 * c ** (1 / 2.4) - 0.055, 12.92 * c)
    ).astype('u1')


def words(a, b):
    return color_words((to_lab(np.array(a, 'u1')).tolist(), to_lab(np.array(b, 'u1')).tolist()))


@pytest.mark.parametrize(
    'color', [(200, 80, 60), (60, 90, 160), (120, 140, 60), (190, 150, 120), (128, 128, 128)]
)
def test_more_or_less_light_has_no_tint(color):
    for k, word in ((0.3, 'darker'), (0.6, 'darker'), (1.0, ''), (1.6, 'lighter')):
        assert words(linear(color, k), color) == word


@pytest.mark.parametrize(
    'inside,around,word',
    [
        ((160, 110, 110), (128, 128, 128), 'redder'),
        ((80, 140, 80), (120, 125, 120), 'greener'),
        ((128, 128, 60), (128, 128, 128), 'yellower'),
        ((110, 128, 200), (128, 128, 128), 'bluer'),
        ((250, 235, 120), (128, 128, 128), 'lighter and yellower'),
        ((90, 20, 20), (128, 128, 128), 'darker and redder'),
        ((130, 126, 124), (200, 80, 60), 'grayer'),
        ((150, 105, 95), (200, 80, 60), 'grayer'),
        ((90, 90, 130), (120, 60, 40), 'bluer'),
        ((230, 225, 225), (200, 80, 60), 'lighter and grayer'),
        ((30, 30, 30), (60, 90, 160), 'darker and grayer'),
        ((131, 128, 126), (128, 128, 128), ''),
    ],
)
def test_words_for_colors(inside, around, word):
    assert words(inside, around) == word or (
        word in ('bluer', 'greener', 'grayer') and words(inside, around).endswith(word)
    )


def test_whole_sentences():
    image = GRAY.copy()
    m = put(4, 50, at=(70, 10))
    image[m] = 40
    assert (
        describe_mask(image, m, 'carpet')
        == 'A small, long, narrow mark in the lower left of the carpet covers about 2 percent of '
        'the area and is darker than its surroundings.'
    )
    assert describe_mask(GRAY, m, 'carpet').endswith(
        'covers about 2 percent of the area and differs little in color from its surroundings.'
    )
    two = m | put(4, 30, at=(10, 80))
    image[two] = (230, 120, 110)
    assert (
        describe_mask(image, two, 'screws')
        == 'Two medium-sized, long, narrow marks, the largest in the lower left of the screws, '
        'together cover about 3 percent of the area and are lighter and redder than their '
        'surroundings.'
    )
    assert describe_mask(GRAY, two, 'screws').endswith(
        'and differ little in color from their surroundings.'
    )
    assert (
        describe_mask(GRAY, np.ones((90, 120)), 'x')
        == 'A very large, compact mark in the center of the x covers about 100 percent of the area.'
    )  # nothing around it
    before = image.copy(), two.copy()
    assert (
        len(
            {
                describe_mask(image, a, 'screws')
                for a in (two, two.astype('u1') * 255, two.astype(float))
            }
        )
        == 1
    )
    assert (image == before[0]).all() and (two == before[1]).all()


def test_pictures_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match='marks nothing.*normal image'):
        measure_mask(GRAY, put(0, 0))
    for image, m, f in (
        (GRAY[..., 0], put(2, 2), None),
        (GRAY, put(2, 2, size=(80, 120)), None),
        (GRAY, put(2, 2), put(2, 2, size=(90, 90))),
        (GRAY, put(2, 2)[None], None),
    ):
        with pytest.raises(ValueError, match=r'need \[H,W,3\]'):
            measure_mask(image, m, f)
    with pytest.raises(ValueError, match='float64.*8-bit'):
        measure_mask(GRAY / 255, put(2, 2))


# --- questions


@pytest.fixture
def photo(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), 'u1')
    Image.fromarray(image).save(tmp_path / 'a.png')
    return tmp_path / 'a.png', image


def test_questions_are_the_papers(photo):
    assert CATEGORY_QUESTION == 'Q: Describe what an abnormal image of {noun} looks like?'
    assert (
        IMAGE_QUESTION == 'Q: Identify anomalies in the input image of {noun}. '
        "Describe each anomaly's location, color, shape, size, and other characteristics."
    )
    (q,) = category_questions({'metal_nut': 'metal nut'}, 'x')
    system, user = messages(q)
    assert (
        user
        == dict(role='user', content='Q: Describe what an abnormal image of metal nut looks like?')
        and system['role'] == 'system'
        and '[5 strings]' in system['content']
        and '"background"' in system['content']
    )
    (q,) = image_questions([Sample(photo[0], 1, 'metal_nut', 'metal_nut/bent/0')], {}, 'x')
    system, user = messages(q)
    assert (
        (q.n, q.noun, q.name) == (1, 'metal nut', 'metal_nut/bent/0')
        and '[1 strings]' in system['content']
        and 'background' not in system['content']
    )
    picture, text = user['content']  # <IMAGE> + Q
    assert text == dict(type='text', text=IMAGE_QUESTION.format(noun='metal nut'))
    kind, data = picture['image_url']['url'].split(',')
    assert (
        kind == 'data:image/png;base64'
        and (np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) == photo[1]).all()
    )


def test_estimate_by_hand(tmp_path):
    qs = category_questions({'a': 'mug', 'b': 'kettle'}, 'x', 3)
    a, b = sum((len(q.rules) + len(q.text)) // 4 + 8 for q in qs), 2 * (3 * 25 + 60)
    assert estimate(qs, (2.0, 10.0)) == dict(
        calls=2, tokens_in=a, tokens_out=b, cost=(2 * a + 10 * b) / 1e6
    )
    assert estimate([]) == dict(calls=0, tokens_in=0, tokens_out=0, cost=None)
    for size, tiles in (((512, 512), 1), ((513, 512), 2), ((1024, 700), 4)):
        Image.new('RGB', size).save(tmp_path / 'i.png')
        q = Question('x', 'i', 'mug', 2, tmp_path / 'i.png')
        assert (
            estimate([q])['tokens_in'] == 85 + 170 * tiles + (len(q.rules) + len(q.text)) // 4 + 8
            and estimate([q])['tokens_out'] == 2 * 25 + 20
        )


def answer_text(*s, background='Fine.'):
    return json.dumps(dict(anomalies=list(s), background=background))


@pytest.mark.parametrize(
    'text,why',
    [
        ('', ['empty']),
        (None, ['empty']),
        ('  \n', ['empty']),
        ([1], ['empty']),
        ("I'm sorry, but I can't help with that.", ['a refusal']),
        ('I’m sorry.', ['a refusal']),
        ('As an AI, I do not see.', ['a refusal']),
        ('1. a crack 2. a dent', ['not JSON']),
        ('{"anomalies": ["a crack", ', ['not JSON']),
        ('["a crack"]', ['not JSON']),
        ('{"list": []}', ['not in the requested form']),
        ('{"anomalies": "a crack"}', ['not in the requested form']),
        (answer_text('a crack'), ['too few descriptions']),
        (answer_text('a crack', ' A crack. '), ['description said before', 'too few descriptions']),
        (
            answer_text('a crack', '', 3),
            ['empty description', 'empty description', 'too few descriptions'],
        ),
        (
            answer_text('a crack', 'a very ' * 80 + 'long crack'),
            ['description too long', 'too few descriptions'],
        ),
        (answer_text('I cannot tell', 'a dent'), ['refusing description', 'too few descriptions']),
        (answer_text('a crack', 'a dent', background=''), ['no background']),
        (answer_text('a crack', 'a dent', background=['x']), ['no background']),
    ],
)
def test_answers_that_are_kept_out_have_their_reason(text, why):
    assert check_answer(text, 2) == (None, why)


def test_what_is_good_is_kept():
    good = dict(anomalies=['a crack', 'a dent'], background='Fine.')
    for text in (
        answer_text('a crack', 'a dent'),
        answer_text(' a crack ', 'a dent', 'a third'),
        f'Sure:\n```json\n{answer_text("a crack", "a dent")}\n```\nAnything else?',
    ):
        assert check_answer(text, 2) == (good, [])
    assert check_answer(answer_text('a crack', '', 'a crack', 'a dent'), 2) == (
        good,
        ['empty description', 'description said before'],
    )
    assert check_answer('{"anomalies": ["a crack"]}', 1, category=False) == (
        dict(anomalies=['a crack']),
        [],
    )
    assert check_answer(answer_text('a crack', 'a cracked mug that cannot hold water'), 2)[
        0
    ]  # "cannot" of a mug is no refusal


# --- over real HTTP

needs_client = pytest.mark.skipif(
    importlib.util.find_spec('openai') is None,
    reason='needs the OpenAI client: pip install "zsad[llm]"',
)


class Server:
    "A chat endpoint in a thread: `script(noun, count of requests)` gives (status, body, seconds)."

    def __init__(self, script):
        self.asked, self.seen, lock = Counter(), [], threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *a):
                pass

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
                text = request['messages'][1]['content']
                text = text if isinstance(text, str) else text[1]['text']
                noun = re.search(r'image of (.+?)(?: looks|\. )', text)[1]
                with lock:
                    outer.asked[noun] += 1
                    n = outer.asked[noun]
                    outer.seen.append((self.path, self.headers['Authorization'], request))
                status, body, wait = script(noun, n)
                time.sleep(wait)
                data = (body if isinstance(body, str) else json.dumps(body)).encode()
                try:
                    self.send_response(status)
                    self.send_header('Content-Type', 'application/json')
                    self.send_header('retry-after-ms', '1')
                    self.send_header('Content-Length', str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    pass  # the client gave up

        self.http = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def how(self, folder, **more):
        return dict(
            dict(
                model='m',
                address=f'http://127.0.0.1:{self.http.server_port}/v1',
                key='secret',
                cache=folder,
                report=lambda s: None,
            ),
            **more,
        )

    def __enter__(self):
        return self

    def __exit__(self, *a):
        self.http.shutdown()
        self.http.server_close()


def chat(text):
    return dict(
        id='1',
        object='chat.completion',
        created=0,
        model='m',
        choices=[dict(index=0, finish_reason='stop', message=dict(role='assistant', content=text))],
    )


def five(noun):
    return chat(
        answer_text(
            *(f'a {noun} with {w}' for w in ('a crack', 'a dent', 'a stain', 'a hole', 'a cut')),
            background=f'A whole {noun}.',
        )
    )


def ask_about(*nouns):
    return category_questions({n: n for n in nouns}, 'shop')


@needs_client
def test_answers_become_a_base(tmp_path):
    lines = []
    with Server(lambda noun, n: (200, five(noun), 0)) as s:
        base, done = build_base(
            ask_about('mug', 'jug', 'cup'),
            **s.how(tmp_path / 'c', price=(1.0, 2.0), report=lines.append),
        )
    assert (
        done == module.Report(3, 0, 3, {}, ())
        and list(base['sets']['shop']) == ['mug', 'jug', 'cup']
        and base['source'] == 'generated by m'
        and base['images'] == {}
    )
    f = write_base(tmp_path / 'b.json', base)
    assert (
        knowledge('jug', 'shop', user=f)
        == tuple(f'a jug with {w}' for w in ('a crack', 'a dent', 'a stain', 'a hole', 'a cut'))
        and background('jug', user=f) == 'A whole jug.'
    )
    path, key, request = s.seen[0]
    assert (path, key, request['model']) == (
        '/v1/chat/completions',
        'Bearer secret',
        'm',
    ) and s.asked == dict(mug=1, jug=1, cup=1)
    assert (
        len(lines) == 1
        and lines[0].startswith('3 calls (0 answers are stored), about ')
        and 'cost about 0.00' in lines[0]
    )
    assert 'secret' not in ''.join(p.read_text() for p in tmp_path.rglob('*.json'))


@needs_client
def test_busy_and_broken_servers_are_asked_again(tmp_path):
    def script(noun, n):
        return (
            {'mug': (429, {}, 0), 'jug': (500, 'oops', 0), 'cup': (503, {}, 0)}[noun]
            if n < 3
            else (200, five(noun), 0)
        )

    with Server(script) as s:
        base, done = build_base(ask_about('mug', 'jug', 'cup'), **s.how(tmp_path))
    assert done.kept == 3 and done.missing == () and s.asked == dict(mug=3, jug=3, cup=3)


@needs_client
def test_what_stays_broken_is_counted_and_the_rest_goes_on(tmp_path):
    with Server(
        lambda noun, n: (
            (500, {}, 0)
            if noun == 'jug'
            else (400, {}, 0)
            if noun == 'vat'
            else (200, five(noun), 0)
        )
    ) as s:
        base, done = build_base(ask_about('mug', 'jug', 'cup', 'vat'), **s.how(tmp_path, retries=2))
    assert s.asked == dict(mug=1, jug=3, cup=1, vat=1) and list(base['sets']['shop']) == [
        'mug',
        'cup',
    ]
    assert done == module.Report(
        4,
        0,
        2,
        {'server error 500': 1, 'server error 400': 1},
        (('shop/jug', 'server error 500'), ('shop/vat', 'server error 400')),
    )


@needs_client
def test_nonsense_is_kept_out_of_base_and_cache(tmp_path):
    bodies = dict(
        html='<html>',
        none={},
        empty=dict(choices=[]),
        hollow=dict(choices=[{}]),
        word='"hello"',
        null=chat(None),
        sorry=chat("I'm sorry, I cannot assist with that."),
        prose=chat('Mugs break.'),
        few=chat(answer_text('a crack', 'a crack', '')),
        good=None,
    )
    with Server(
        lambda noun, n: (200, bodies[noun] if bodies[noun] is not None else five(noun), 0)
    ) as s:
        base, done = build_base(ask_about(*bodies), **s.how(tmp_path / 'c'))
    assert list(base['sets']['shop']) == ['good'] and len(list((tmp_path / 'c').iterdir())) == 1
    why = dict(done.missing)
    assert all(
        why[f'shop/{k}'].startswith('unreadable answer')
        for k in ('html', 'none', 'empty', 'hollow', 'word')
    )
    assert [why[f'shop/{k}'] for k in ('null', 'sorry', 'prose', 'few')] == [
        'empty',
        'a refusal',
        'not JSON',
        'too few descriptions',
    ]
    assert (
        done.left_out['description said before'] == done.left_out['empty description'] == 1
        and done.kept == 1
        and s.asked == {k: 1 for k in bodies}
    )


@needs_client
def test_slow_servers_and_absent_ones(tmp_path):
    with Server(lambda noun, n: (200, five(noun), 8 if noun == 'jug' else 0)) as s:
        _, done = build_base(ask_about('mug', 'jug'), **s.how(tmp_path, retries=0, timeout=2))
    assert done.missing == (('shop/jug', 'no answer in time'),) and done.kept == 1
    _, done = build_base(
        ask_about('cup'), **s.how(tmp_path, retries=0, timeout=1)
    )  # by now nobody listens
    assert done.missing[0][1].startswith('no connection (')


@needs_client
@pytest.mark.parametrize('status', [401, 403, 404])
def test_a_wrong_key_model_or_address_ends_the_run(tmp_path, status):
    with Server(lambda noun, n: (status, {}, 0.02)) as s:
        with pytest.raises(
            RuntimeError,
            match=rf"127\.0\.0\.1.*model 'm' \(status {status}\).*key and ZSAD_LLM_MODEL",
        ):
            build_base(ask_about(*(f'n{k}' for k in range(200))), **s.how(tmp_path, workers=2))
        assert sum(s.asked.values()) < 150


@needs_client
def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    qs = ask_about(*(f'n{k}' for k in range(6)))
    with Server(
        lambda noun, n: (404, {}, 0) if noun == 'n3' and n == 1 else (200, five(noun), 0)
    ) as s:
        with pytest.raises(RuntimeError):
            build_base(qs, **s.how(tmp_path / 'c', workers=1))
        before = Counter(s.asked)
        assert (
            before['n3'] == 1
            and before['n2'] == 1
            and len(list((tmp_path / 'c').iterdir())) == len(before) - 1
        )  # each answer is kept as it comes
        base, done = build_base(qs, **s.how(tmp_path / 'c', workers=1))
        assert (
            done.stored == len(before) - 1
            and done.sent == 7 - len(before)
            and done.kept == 6
            and s.asked == {q.name: 1 + (q.name == 'n3') for q in qs}
        )
        other, _ = build_base(qs, **s.how(tmp_path / 'c', model='m2'))  # another model: asked anew
        assert other['source'] == 'generated by m2' and s.asked['n0'] == 2
    monkeypatch.setitem(__import__('sys').modules, 'openai', None)
    monkeypatch.delenv('OPENAI_API_KEY', raising=False)
    again, done = build_base(
        qs, model='m', cache=tmp_path / 'c', report=lambda s: None
    )  # all stored: no server, key or client
    assert again == base and done == module.Report(0, 6, 6, {}, ())


@needs_client
def test_images_are_asked_by_their_pixels(tmp_path, photo):
    file, image = photo
    Image.fromarray(image).save(tmp_path / 'copy.bmp')
    Image.fromarray(image[::-1]).save(tmp_path / 'other.png')
    (tmp_path / 'text.png').write_text('no image')
    qs = image_questions(
        [
            Sample(p, 1, 'mug', f'mug/bad/{p.stem}')
            for p in (file, tmp_path / 'other.png', tmp_path / 'text.png')
        ],
        {'mug': 'blue mug'},
        'shop',
    )
    with Server(
        lambda noun, n: (200, chat(f'{{"anomalies": ["a {noun} with crack {n}"]}}'), 0)
    ) as s:
        base, done = build_base(qs, **s.how(tmp_path / 'c', workers=1))
        assert base['sets'] == {} and {k: len(v) for k, v in base['images']['shop'].items()} == {
            'mug/bad/a': 1,
            'mug/bad/other': 1,
        }
        assert done == module.Report(
            2, 0, 2, {'unreadable image': 1}, (('shop/mug/bad/text', 'unreadable image'),)
        )
        copied, done = build_base(
            image_questions(
                [Sample(tmp_path / 'copy.bmp', 1, 'mug', 'x')], {'mug': 'blue mug'}, 'shop'
            ),
            **s.how(tmp_path / 'c'),
        )
        assert (
            done.stored == 1
            and copied['images']['shop']['x'] == base['images']['shop']['mug/bad/a']
            and s.asked == {'blue mug': 2}
        )
    f = write_base(tmp_path / 'b.json', base)
    assert knowledge_of_image('mug/bad/a', 'shop', user=f)[0].startswith('a blue mug with crack')


@needs_client
def test_questions_go_out_side_by_side(tmp_path):
    meet = threading.Barrier(8)  # nobody is answered before all have come
    with Server(lambda noun, n: (meet.wait(60) and 200 or 200, five(noun), 0)) as s:
        _, done = build_base(ask_about(*(f'n{k}' for k in range(8))), **s.how(tmp_path, workers=8))
    assert done.kept == 8 and not meet.broken


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    for k in ('OPENAI_API_KEY', 'ZSAD_LLM_MODEL', 'OPENAI_BASE_URL'):
        monkeypatch.delenv(k, raising=False)
    with pytest.raises(ValueError, match='ZSAD_LLM_MODEL'):
        build_base(ask_about('mug'), cache=tmp_path)
    monkeypatch.setenv('ZSAD_LLM_MODEL', 'm')
    monkeypatch.setitem(__import__('sys').modules, 'openai', None)
    with pytest.raises(ImportError, match=r'pip install "zsad\[llm\]"'):
        build_base(ask_about('mug'), cache=tmp_path, key='k', report=lambda s: None)
    assert build_base([], cache=tmp_path, report=lambda s: None)[1].kept == 0


@needs_client
def test_the_environment_names_server_key_and_model(tmp_path, monkeypatch):
    monkeypatch.delenv('OPENAI_API_KEY', raising=False)
    with pytest.raises(ValueError, match='OPENAI_API_KEY'):
        build_base(ask_about('mug'), model='m', cache=tmp_path, report=lambda s: None)
    with Server(lambda noun, n: (200, five(noun), 0)) as s:
        for k, v in dict(
            OPENAI_BASE_URL=s.how('')['address'],
            OPENAI_API_KEY='word',
            ZSAD_LLM_MODEL='mine',
            ZSAD_CACHE=str(tmp_path),
        ).items():
            monkeypatch.setenv(k, v)
        base, _ = build_base(ask_about('mug'), report=lambda s: None)
    assert (
        s.seen[0][1] == 'Bearer word'
        and s.seen[0][2]['model'] == 'mine'
        and base['source'] == 'generated by mine'
        and len(list((tmp_path / 'knowledge').iterdir())) == 1
    )


@needs_client
def test_the_command_asks_about_a_folder_of_your_own(tmp_path, monkeypatch, capsys):
    from zsad.cli.main import main

    for c in ('mug', 'tea_pot'):
        for kind in ('good', 'crack'):
            f = tmp_path / 'set' / c / 'test' / kind / '000.png'
            f.parent.mkdir(parents=True)
            Image.fromarray(np.full((8, 8, 3), len(kind), 'u1')).save(f)
    ask = [
        'knowledge',
        'build',
        'folder',
        '--data',
        str(tmp_path / 'set'),
        '--out',
        str(tmp_path / 'k.json'),
    ]
    assert (
        main([*ask, '--images', '1', '--dry-run', '--price', '1', '2']) == 0
        and '4 calls' in capsys.readouterr().out
        and not (tmp_path / 'k.json').exists()
    )
    with Server(
        lambda noun, n: (200, five(noun) if noun == 'mug' else chat('I cannot help with that.'), 0)
    ) as s:
        for k, v in dict(
            OPENAI_BASE_URL=s.how('')['address'],
            OPENAI_API_KEY='word',
            ZSAD_LLM_MODEL='mine',
            ZSAD_CACHE=str(tmp_path / 'cache'),
        ).items():
            monkeypatch.setenv(k, v)
        assert main(ask) == 1
    printed = capsys.readouterr()
    assert (
        '1 answers; 2 questions sent, 0 answered from the cache' in printed.out
        and 'no answer for folder/tea_pot' in printed.err
        and 'word' not in printed.out + printed.err.replace('words', '')
    )
    assert knowledge('mug', 'folder', user=tmp_path / 'k.json')[0] == 'a mug with a crack' and set(
        s.asked
    ) == {'mug', 'tea pot'}
