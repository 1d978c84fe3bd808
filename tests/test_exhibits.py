"""Exhibits and the tables made from them.

Rows as the papers print them, several data sets in one table, a word in every empty cell,
differences only where they mean something. Results are made up: two categories, every row's values
differ from those of every other row, metric and data set.
"""

import csv
import re
import subprocess
import sys
import zlib
from dataclasses import replace
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from zsad.bench.reading import Results, read_results
from zsad.papers.exhibit import COLUMNS, ROLES, STAND_INS, Exhibit, Row, datasets_of, seeds_of
from zsad.papers.exhibits import EXHIBITS, printed, reported
from zsad.papers.pictures import PICTURES
from zsad.pipeline.checks import check_method
from zsad.pipeline.rows import METHODS
from zsad.reporting.captions import caption, provenance
from zsad.reporting.cells import comparable, runs_of
from zsad.reporting.contrasts import contrast_sentence, contrast_sentences, contrasts
from zsad.reporting.figures import figure
from zsad.reporting.pages import latex, markdown, page, write_report
from zsad.reporting.tables import readable, table

TABLES = ['anoclip-t1', 'anoclip-t2', 'anoclip-t3', 'anoclip-t4']
METRICS = (
    'image_auroc image_f1max image_ap pixel_auroc pixel_f1max pixel_ap pro pixel_auroc_within'
).split()
CONTRASTS = 'exhibit dataset better worse metric over difference low high'.split()
PAPER = dict(encoder='ViT-B-16-plus-240', source='laion400m_e32', complete='yes')


def value(*key):
    return 10 + zlib.crc32('/'.join(key).encode()) % 8000 / 100  # in percent, never 0


SPANS = ('mean', 'mean objects', 'mean textures', 'pill', 'wood')
NOT_DEFINED = [('mean textures', 'pixel_auroc_within'), ('wood', 'pixel_auroc_within')]


def names_of(row) -> tuple:
    "Name the method and the control of a row's run."
    return row.method.name if row.method else 'foreground', row.control


def source_of(row, source: str) -> str:
    "Name where the weights of a row's run come from."
    if row.control == 'random weights':
        return 'random:0'
    return source if row.method else '-'


def made_up_run(dataset, row, encoder, source, more) -> dict:
    name, control = names_of(row)
    run = dict(dataset=dataset, row=row.label, seed=0, run=f'{dataset} {name} {control}')
    run |= dict(method=name, control=control, data=f'hash-of-{dataset}', encoder=encoder)
    run |= dict(weights='w', source=source_of(row, source), size=240, dtype='float32')
    return run | dict(zsad='0', torch='2', device='cpu') | more


def made_up_metrics(dataset, row) -> list:
    metrics = [m for m in METRICS if row.method or not m.startswith('image')]
    lines = []
    for m in metrics:  # a foreground mask has no image score
        for span in SPANS:
            if (span, m) in NOT_DEFINED:
                continue
            v = value(dataset, *names_of(row), m, span)
            cell = dict(dataset=dataset, row=row.label, category=span, metric=m)
            lines.append(cell | dict(value=v, low=v - 1, high=v + 1, seeds=1, n=9))
    return lines


def write_csv(file, columns, lines):
    with file.open('w', newline='') as f:
        writer = csv.DictWriter(f, columns, extrasaction='ignore')
        writer.writeheader()
        writer.writerows(lines)


def made_up(
    folder,
    datasets=('procad',),
    rows=None,
    contrasts=(),  # (exhibit, ...)
    encoder='mini',
    source='shipped',
    exhibits=None,
    **more,  # further columns of runs
):
    "Write results of exhibits as a run on `datasets` would, and read them."
    for e in exhibits or EXHIBITS.values():
        if e.name == 'vv-depth':
            continue
        run = [r for r in e.rows if not r.state and (rows is None or r in rows)]
        tables = dict.fromkeys(COLUMNS, ())
        tables['runs'] = [made_up_run(d, r, encoder, source, more) for d in datasets for r in run]
        tables['metrics'] = [line for d in datasets for r in run for line in made_up_metrics(d, r)]
        tables['contrasts'] = [dict(zip(CONTRASTS, c)) for c in contrasts if c[0] == e.name]
        (folder / e.name).mkdir(parents=True, exist_ok=True)
        for name, lines in tables.items():
            columns = dict.fromkeys([*COLUMNS[name], *(more if name == 'runs' else ())])
            write_csv(folder / e.name / f'{name}.csv', list(columns), lines)
    return read_results(folder)


@pytest.fixture(autouse=True)
def one_stand_in(monkeypatch):
    "Here VisA has no stand-in, as most of the papers' data sets at mini scale."
    monkeypatch.delitem(STAND_INS, 'visa')


@pytest.fixture(scope='module')
def mini(tmp_path_factory):
    return made_up(tmp_path_factory.mktemp('mini'))


@pytest.fixture(scope='module')
def both(tmp_path_factory):
    return made_up(tmp_path_factory.mktemp('both'), ('mvtec', 'visa'), **PAPER)


@pytest.mark.parametrize('name', TABLES)
def test_rows_are_those_the_paper_prints_in_its_order(name):
    rows = list(dict.fromkeys(r['row'] for r in reported() if r['exhibit'] == name))
    assert len(rows) > 2 and [r.label for r in EXHIBITS[name].rows if not r.control] == rows
    assert [r.label for r in EXHIBITS[name].rows if r.control] == [
        'random weights',
        'foreground mask',
    ][: 1 if name == 'anoclip-t2' else 2]  # an outline has no image score


@pytest.mark.parametrize('name', TABLES)
def test_every_cell_has_its_printed_value_and_every_printed_value_a_cell(name):
    e = EXHIBITS[name]
    cells = {
        (r.label, role, m): printed(e, r.label, role, m)
        for r in e.rows
        if not r.control
        for role in e.roles
        for m in e.metrics
    }
    assert all(cells.values()), [k for k, v in cells.items() if not v]
    assert cells == {
        (r['row'], r['dataset'], r['metric']): r['value']
        for r in reported()
        if r['exhibit'] == name and r['category'] == 'mean'
    }


def test_two_rows_called_clip():
    row = {(e.name, r.label): r.method for e in EXHIBITS.values() for r in e.rows}
    assert (
        row['anoclip-t1', 'CLIP'] is row['anoclip-t3', 'with QKV attention']
        and row['anoclip-t2', 'CLIP'] is METHODS['clip-ac']
    )
    assert (
        row['anoclip-t1', 'MaskCLIP'] is METHODS['maskclip']
        and row['anoclip-t1', 'AnoCLIP'] is row['anoclip-t2', 'AnoCLIP'] is METHODS['anoclip']
    )


WRONG = [
    dict(),
    dict(state='soon'),
    dict(state='missing'),
    dict(control='random weights'),
    dict(control='control', method=METHODS['clip']),
    dict(method=METHODS['clip'], state='reported only'),
    dict(control='foreground mask', state='not here yet'),
    dict(method=METHODS['clip'], control='foreground mask'),
]


@pytest.mark.parametrize('wrong', WRONG, ids=str)
def test_rows_that_say_nothing_or_too_much_are_refused(wrong):
    with pytest.raises(ValueError, match="row 'x'"):
        Row('x', **wrong)


def test_rows_of_exhibits_and_pictures_are_valid():
    for e in (*EXHIBITS.values(), *PICTURES.values()):
        for row in e.rows:
            assert row.method is None or check_method(row.method) is row.method


def test_a_row_is_checked_when_it_is_built_not_when_it_is_written_down():
    row = Row('x', replace(METHODS['anoclip'], terms=(('txt', {}),)))
    with pytest.raises(ValueError, match="term='txt': choose from"):
        check_method(row.method)


def test_exhibits_load_no_torch():
    pytest.importorskip('zsad.encoder.spec')
    pytest.importorskip('zsad.methods.prompt_sets')
    code = (
        'import sys, zsad.papers.exhibits, zsad.papers.pictures; sys.exit("torch" in sys.modules)'
    )
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_rows_have_the_seeds_of_their_exhibit():
    drawn, plain = Row('x', METHODS['dual']), Row('y', METHODS['anoclip'])
    assert (
        seeds_of(EXHIBITS['spread'], drawn) == (0, 1, 2, 3, 4)
        and seeds_of(EXHIBITS['dual-t1'], drawn) == (0,)
        and seeds_of(EXHIBITS['dual-t1'], drawn, 3) == (0, 1, 2)
    )
    assert (
        seeds_of(EXHIBITS['spread'], plain, 7)
        == (0,)
        == seeds_of(EXHIBITS['spread'], Row('f', None, 'foreground mask'))
    )
    assert seeds_of(EXHIBITS['dual-t1'], replace(drawn, seeds=2)) == (0, 1) and seeds_of(
        EXHIBITS['dual-t1'], replace(drawn, method=replace(METHODS['dual'], seed=4)), 2
    ) == (4, 5)


@pytest.mark.parametrize(
    'wrong,says',
    [
        (dict(print_state='seen'), 'seen'),
        (dict(paper=''), 'own'),
        (dict(print_state='own'), 'own'),
        (dict(roles=('mvtec', 'visa2')), 'visa2'),
        (dict(contrasts=(('AnoCLIP', 'Nobody', 'pro'),)), 'Nobody'),
        (dict(contrasts=(('AnoCLIP', 'CLIP', 'image_ap'),)), 'image_ap'),
    ],
)
def test_exhibits_are_checked_when_built(wrong, says):
    with pytest.raises(ValueError, match=says):
        replace(EXHIBITS['anoclip-t1'], **wrong)


def test_print_states():
    assert (
        {e.name for e in EXHIBITS.values() if e.print_state == 'own'}
        == {e.name for e in EXHIBITS.values() if not e.paper}
        != set()
    )
    assert replace(EXHIBITS['anoclip-t1'], print_state='lost').print_state == 'lost'


def test_roles_and_stand_ins():
    assert (
        datasets_of('mvtec') == ('mvtec', STAND_INS['mvtec'])
        and datasets_of('visa')[0] == 'visa'
        and set(STAND_INS) <= set(ROLES)
    )
    with pytest.raises(ValueError, match='procad'):
        datasets_of('procad')


def test_one_role_keeps_its_columns(mini):
    t = table('anoclip-t3', mini)
    assert t.columns.tolist() == [
        (m, k)
        for m in ('pixel AUROC', 'pixel F1max', 'PRO')
        for k in ('ours', 'low', 'high', 'paper')
    ] + [('pixel AUROC', k) for k in ('objects', 'textures', 'within object')]

    def ours(metric, span='mean'):
        return pytest.approx(value('procad', 'anoclip', '', metric, span))

    row = t.loc['with V-V attention (multi-layer)']
    assert (
        row['PRO', 'ours'] == ours('pro')
        and row['pixel AUROC', 'textures'] == ours('pixel_auroc', 'mean textures')
        and row['pixel AUROC', 'within object'] == ours('pixel_auroc_within')
        and row['PRO', 'paper'] == 70.4
    )


def test_several_roles_stand_side_by_side(both):
    t = table('anoclip-t1', both)
    assert list(dict.fromkeys(t.columns.get_level_values(0))) == [
        f'{d}: {m}' for d in ('MVTec-AD', 'VisA') for m in ('pixel AUROC', 'pixel F1max', 'PRO')
    ]
    for d, role in (('MVTec-AD', 'mvtec'), ('VisA', 'visa')):
        assert t.loc['AnoCLIP', (f'{d}: PRO', 'ours')] == pytest.approx(
            value(role, 'anoclip', '', 'pro', 'mean')
        )
        assert t.loc['CLIP', (f'{d}: pixel AUROC', 'objects')] == pytest.approx(
            value(role, 'anoclip/qkv', '', 'pixel_auroc', 'mean objects')
        )
    assert t['MVTec-AD: PRO', 'paper'].dropna().tolist() == [
        21.9,
        40.5,
        64.6,
        1.6,
        70.4,
        77.8,
    ] and t['VisA: PRO', 'paper'].dropna().tolist() == [10.2, 27.3, 59.8, 0.8, 65.1, 75.0]


LATER = ('TransMM', 'WinCLIP', 'AnoCLIP+')


def waiting():
    return replace(
        EXHIBITS['anoclip-t1'],
        rows=tuple(
            Row(r.label, state='not here yet') if r.label in LATER else r
            for r in EXHIBITS['anoclip-t1'].rows
        ),
    )


def test_states_stand_in_the_cells_of_ours_beside_the_papers_values(both):
    d = readable(table(waiting(), both))
    for row in LATER:
        ours = [v for c, v in d.loc[row].items() if not c.startswith('paper')]
        assert len(ours) > 6 and set(ours) == {'not here yet'}
        assert all(
            re.fullmatch(r'\d+\.\d', v) for c, v in d.loc[row].items() if c.startswith('paper')
        )
    assert not (d.loc[['MaskCLIP', 'CLIP', 'AnoCLIP', 'random weights']] == 'not here yet').any(
        axis=None
    )
    full = replace(
        EXHIBITS['anoclip-t2'],
        rows=(*EXHIBITS['anoclip-t2'].rows, Row('full-shot', state='reported only')),
    )
    assert set(readable(table(full, both)).loc['full-shot']) == {
        'reported only',
        '',
    } and 'Reported only: full-shot.' in caption(full, both)


def test_a_role_without_stand_in_says_so(mini):
    d = readable(table(waiting(), mini))
    run = ['MaskCLIP', 'CLIP', 'AnoCLIP', 'random weights', 'foreground mask']
    visa = [c for c in d if 'VisA' in c and not c.startswith('paper')]
    assert visa == [
        'VisA: pixel AUROC',
        'VisA: pixel F1max',
        'VisA: PRO',
    ]  # no objects, textures of nothing
    assert (d.loc[run, visa] == 'no stand-in').all(axis=None) and (
        d.loc['AnoCLIP+', visa] == 'not here yet'
    ).all()
    assert not d.drop(columns=visa).isin(['no stand-in', 'missing', 'no data']).any(axis=None)
    assert (
        d.loc['CLIP', 'paper: VisA: PRO'] == '0.8'
        and table('anoclip-t1', mini).loc['CLIP', ('VisA: PRO', 'ours')] != 0
    )


def test_a_data_set_that_is_not_there_says_so(tmp_path):
    d = readable(table('anoclip-t1', made_up(tmp_path, ('visa',), **PAPER)))
    assert set(d.loc['AnoCLIP', [c for c in d if c.startswith('MVTec')]]) == {
        'no data'
    } and re.match(r'\d', d.loc['AnoCLIP', 'VisA: PRO'])


def test_what_could_have_been_run_is_missing(tmp_path):
    d = readable(
        table(
            'anoclip-t1',
            made_up(
                tmp_path,
                rows=[
                    r for r in EXHIBITS['anoclip-t1'].rows if r.method is not METHODS['maskclip']
                ],
            ),
        )
    )
    mvtec = [c for c in d if 'MVTec' in c and not c.startswith('paper')]
    assert set(d.loc['MaskCLIP', mvtec]) == {'missing'} and not (
        d.drop(index='MaskCLIP') == 'missing'
    ).any(axis=None)


def test_the_set_that_was_learned_from_is_not_asked_and_not_missing(tmp_path):
    rows = [
        r for r in EXHIBITS['transfer'].rows if 'from' not in r.label or 'from procad-b' == r.label
    ]
    d = readable(table('transfer', made_up(tmp_path, rows=rows)))
    mvtec = [c for c in d if 'MVTec' in c]
    assert set(d.loc['from procad', mvtec]) == {'learned from'} and set(
        d.loc['from procad-novel', mvtec]
    ) == {'missing'}
    assert re.match(r'\d', d.loc['from procad-b', 'MVTec-AD: pixel AUROC'])


def test_contrasts_become_sentences_on_a_page(tmp_path):
    over = (
        'anoclip-t3',
        'procad',
        EXHIBITS['anoclip-t3'].contrasts[0][0],
        EXHIBITS['anoclip-t3'].contrasts[0][1],
        'pixel_auroc',
        'all',
        3.14,
        2.0,
        4.0,
    )
    r = made_up(tmp_path, contrasts=[over])
    assert list(contrast_sentences('anoclip-t3', r).data.finding) == [
        f'{over[2]} over {over[3]} in pixel AUROC: +3.1 points [2.0, 4.0], holds'
    ]
    assert list(contrast_sentences('anoclip-t4', r).data.finding) == ['missing']


def test_what_is_not_defined_is_a_dash_not_missing(mini):
    d = readable(table('anoclip-t4', mini))
    assert set(d.loc['foreground mask', ['image AUROC', 'image AP']]) == {'–'} and d.loc[
        'foreground mask', 'pixel AUROC'
    ] not in ('–', 'missing')
    assert readable(table('anoclip-t1', mini)).loc['foreground mask', 'VisA: PRO'] == 'no stand-in'


def deltas(t):
    return [c[0] for c in t if c[1] == 'delta']


def test_a_difference_only_on_the_papers_data_and_encoder(both, mini, tmp_path):
    t = table('anoclip-t1', both)
    assert len(deltas(t)) == 6
    for d, role, paper in (('MVTec-AD', 'mvtec', 70.4), ('VisA', 'visa', 65.1)):
        assert t.loc['AnoCLIP', (f'{d}: PRO', 'delta')] == pytest.approx(
            value(role, 'anoclip', '', 'pro', 'mean') - paper
        )
    assert t['VisA: PRO', 'delta'].notna().sum() == 6  # not for states, not for controls
    assert (
        readable(t).loc['AnoCLIP', 'ours - paper: VisA: PRO']
        == f"{value('visa', 'anoclip', '', 'pro', 'mean') - 65.1:+.1f}"
    )
    for n, (datasets, kind) in enumerate(
        (
            (('mvtec', 'visa'), dict()),
            (('mvtec', 'visa'), {**PAPER, 'source': 'random:0'}),
            (('mvtec', 'visa'), {**PAPER, 'complete': 'no'}),
            (('procad',), PAPER),
        )
    ):
        (tmp_path / f'{n}').mkdir()
        assert deltas(table('anoclip-t1', made_up(tmp_path / f'{n}', datasets, **kind))) == []
    assert deltas(table('anoclip-t1', mini)) == [] and len(deltas(table('anoclip-t3', both))) == 3


def test_a_difference_only_for_the_role_that_was_run(tmp_path):
    one = table('anoclip-t1', made_up(tmp_path, ('visa',), **PAPER))
    assert deltas(one) == ['VisA: pixel AUROC', 'VisA: pixel F1max', 'VisA: PRO']


@pytest.mark.parametrize(
    'other',
    [
        dict(size=336),
        dict(source='laion2b_s34b'),
        dict(source='my-weights.pt'),
        dict(encoder='ViT-B-16'),
        dict(complete='no'),
        dict(complete=''),
    ],
    ids=str,
)
def test_no_difference_beside_another_input_size_or_other_weights(tmp_path, other):
    class More(dict):
        pass

    runs = dict(PAPER) | {k: v for k, v in other.items() if k != 'size'}
    res = made_up(tmp_path, ('mvtec', 'visa'), **runs)
    if 'size' in other:
        res = Results(
            {
                n: replace(r, runs=r.runs.assign(size=str(other['size'])))
                for n, r in res.exhibits.items()
            }
        )
    e = EXHIBITS['anoclip-t1']
    assert deltas(table(e, res)) == [] and not any(
        comparable(res, e, r, role) for r in e.rows for role in e.roles
    )


def test_kanoclip_is_compared_at_its_own_size(tmp_path):
    "ViT-L-14-336 with OpenAI's weights at 518 pixels; one seed at another size: no difference."
    e = EXHIBITS['kanoclip-t1']
    res = made_up(
        tmp_path, ('mvtec',), encoder='ViT-L-14-336', source='openai', complete='yes', exhibits=[e]
    )
    row = e.rows[-4]

    def at(sizes):
        return Results({e.name: replace(res.of(e), runs=res.of(e).runs.assign(size=sizes))})

    assert (
        comparable(at('518'), e, row, 'mvtec')
        and not comparable(at('336'), e, row, 'mvtec')
        and not comparable(at('518'), e, row, 'visa')
    )
    two = Results(
        {e.name: replace(res.of(e), runs=pd.concat([at('518').of(e).runs, at('336').of(e).runs]))}
    )
    assert not comparable(two, e, row, 'mvtec')


def test_a_role_is_played_by_one_data_set(tmp_path):
    "The real one, where both were run; never a mixture."
    e = EXHIBITS['anoclip-t3']
    res = made_up(tmp_path, ('mvtec', 'procad'), rows=[r for r in e.rows if r.method is not None])
    anoclip, outline = e.rows[3], e.rows[5]

    def runs(res, row, role='mvtec'):
        return list(runs_of(res, e, row, role).run)

    assert runs(res, anoclip) == ['mvtec anoclip '] and runs(res, anoclip, 'visa') == [] == runs(
        res, outline
    )
    stored = res.of(e)
    fewer = stored.runs[stored.runs.run != 'mvtec anoclip ']
    res = Results({e.name: replace(stored, runs=fewer)})
    assert runs(res, anoclip) == []


FOUND = [
    ('anoclip-t1', 'mvtec', 'AnoCLIP', 'CLIP', 'pro', 'all', 30.0, 20.0, 40.0),
    ('anoclip-t1', 'visa', 'AnoCLIP', 'CLIP', 'pro', 'all', -5.0, -9.0, -1.0),
    ('anoclip-t1', 'visa', 'AnoCLIP', 'foreground mask', 'pixel_auroc', 'objects', 1.0, -1.0, 3.0),
    (
        'anoclip-t3',
        'mvtec',
        'with V-V attention (multi-layer)',
        'with QKV attention',
        'pro',
        'all',
        30.0,
        20.0,
        40.0,
    ),
]


def test_contrasts_name_their_data_set_where_there_are_several(tmp_path):
    res = made_up(tmp_path, ('mvtec', 'visa'), contrasts=FOUND)
    assert [contrast_sentence(r) for r in res.all('contrasts').itertuples()] == [
        'AnoCLIP over CLIP in PRO on MVTec-AD: +30.0 points [20.0, 40.0], holds',
        'AnoCLIP over CLIP in PRO on VisA: -5.0 points [-9.0, -1.0], is reversed',
        'AnoCLIP over foreground mask in pixel AUROC on objects of VisA: '
        '+1.0 points [-1.0, 3.0], is not shown',
        'with V-V attention (multi-layer) over with QKV attention in PRO: '
        '+30.0 points [20.0, 40.0], holds',
    ]
    assert (
        'in PRO on MVTec-AD: +30.0' in caption('anoclip-t1', res)
        and 'in PRO on VisA: -5.0' in caption('anoclip-t1', res)
        and 'in PRO: +30.0' in caption('anoclip-t3', res)
    )


def test_contrasts_on_data_sets_that_play_no_role_stay_out(tmp_path):
    res = made_up(
        tmp_path,
        ('procad',),
        contrasts=FOUND
        + [('anoclip-t1', 'procad', 'AnoCLIP', 'CLIP', 'pro', 'all', 7.0, 6.0, 8.0)],
    )
    assert re.findall(r'AnoCLIP over \w+ in PRO on \S+ \S+', caption('anoclip-t1', res)) == [
        'AnoCLIP over CLIP in PRO on procad: +7.0'
    ]


def test_files_of_another_version_are_refused(tmp_path):
    made_up(tmp_path, exhibits=[EXHIBITS['anoclip-t3']])
    file = tmp_path / 'anoclip-t3' / 'contrasts.csv'
    file.write_text('dataset,better,worse,metric,over,difference,lo,hi\n')
    with pytest.raises(ValueError, match="contrasts.csv has no columns .*low"):
        read_results(tmp_path)
    with pytest.raises(FileNotFoundError, match='zsad reproduce'):
        read_results(tmp_path / 'nowhere')


def test_captions_name_each_data_set_once_and_what_is_not_there(both, mini):
    text = caption(waiting(), both)
    assert (
        text.count('hash-of-mvtec') == text.count('hash-of-visa') == 1
        and 'replaces' not in text
        and 'Not here yet: TransMM, WinCLIP, AnoCLIP+.' in text
    )
    assert 'visa' not in caption('anoclip-t3', both) and provenance(
        both, [EXHIBITS['anoclip-t1']]
    ) in page([EXHIBITS['anoclip-t1']], both)
    text = caption('anoclip-t1', mini)
    assert (
        text.count('hash-of-procad') == 1
        and 'procad replaces MVTec-AD. VisA: no stand-in.' in text
        and 'left out' not in text
    )
    assert (
        f"{value('procad', 'anoclip', '', 'pixel_auroc', 'mean objects'):.1f}, the bare outline"
        in text
        and 'bare outline' not in caption('anoclip-t2', mini)
    )
    assert 'lost' in caption(
        replace(EXHIBITS['anoclip-t1'], print_state='lost'), mini
    ) and 'drawing' in caption(replace(EXHIBITS['anoclip-t1'], print_state='drawing'), mini)


@pytest.mark.parametrize(
    'left_out,says', [('', None), (0, None), (1, '1 file left out'), (12, '12 files left out')]
)
def test_captions_count_files_left_out(tmp_path, left_out, says):
    text = caption('anoclip-t1', made_up(tmp_path, left_out=left_out))
    assert f', {says})' in text if says else 'left out' not in text


@pytest.mark.parametrize('name', TABLES)
def test_markdown_and_latex_have_the_columns_of_the_table(name, both):
    d = readable(table(name, both))
    lines = markdown(d).splitlines()
    assert len(lines) == len(d) + 2 and {l.replace('\\\\|', '').count('|') for l in lines} == {
        len(d.columns) + 2
    }
    tex = latex(d)
    body = [l for l in tex.splitlines() if l.endswith(r'\\')]
    assert (
        len(body) == len(d) + 1
        and {l.count('&') for l in body} == {len(d.columns)}
        and f"{{l{'r' * len(d.columns)}}}" in tex
    )


def test_figures_have_a_row_of_panels_for_each_data_set_that_was_run(both, mini, tmp_path):
    def texts(fig):
        return {t.get_text() for ax in fig.axes for t in ax.texts} | {
            t.get_text() for t in fig.texts
        }

    a, b, c = figure(waiting(), both), figure('anoclip-t1', mini), figure('anoclip-t4', mini)
    assert [len(f.axes) for f in (a, b, c)] == [4, 2, 3]
    assert (
        [ax.get_ylabel() for ax in a.axes] == ['MVTec-AD', '', 'VisA', '']
        and b.axes[0].get_ylabel() == 'MVTec-AD\n(procad)'
        and c.axes[0].get_ylabel() == ''
    )
    assert 'VisA: no stand-in' in texts(b) and not any(
        'no stand-in' in t for t in texts(a) | texts(c)
    )
    assert {'not here yet', 'paper 70.4', 'paper 65.1'} <= texts(a) and 'not defined' in texts(c)
    none = figure(
        'anoclip-t1', made_up(tmp_path, ('elsewhere',))
    )  # still a figure: the paper's values of the first role
    assert len(none.axes) == 2 and {'no data', 'VisA: no data', 'paper 70.4'} <= texts(none)
    for f in (a, b, c, none):
        plt.close(f)


def test_the_folder_a_user_gets(mini, tmp_path):
    write_report([EXHIBITS[n] for n in TABLES[:2]], mini, tmp_path)
    for n in TABLES[:2]:
        for f in (
            f'tables/{n}.csv',
            f'tables/{n}.md',
            f'tables/{n}.tex',
            f'figures/{n}.png',
            f'figures/{n}.svg',
        ):
            assert (tmp_path / f).stat().st_size > 0, f
    html = (tmp_path / 'index.html').read_text()
    d = readable(table('anoclip-t1', mini))
    grey = [c for c in d if c.startswith('paper')]
    assert (
        len(grey) == 6
        and all(f'<th class="paper">{c}</th>' in html for c in grey)
        and '<th class="paper">VisA' not in html
        and html.count('<td class="">no stand-in</td>') > 20
    )
    assert '<td class="paper">65.1</td>' in html


@pytest.mark.parametrize(
    'low,high,says',
    [
        (0.01, 0.04, 'less than a table shows'),
        (-0.04, 0.02, 'less than a table shows'),
        (0.02, 0.3, 'holds'),
        (-0.3, -0.02, 'is reversed'),
        (-0.1, 0.2, 'is not shown'),
    ],
)
def test_a_difference_that_no_digit_shows_is_not_said_to_hold(low, high, says):
    row = SimpleNamespace(
        exhibit='anoclip-t3',
        better='a',
        worse='b',
        metric='pro',
        over='all',
        dataset='procad',
        difference=(low + high) / 2,
        low=low,
        high=high,
    )
    assert contrast_sentence(row).endswith(says)


SCRIPT = '<script>alert(1)</script> & _a_ | 50 % #1'


def test_text_is_escaped_in_html_markdown_and_latex(tmp_path):
    "A label, a title, a caption of a picture: what a user writes is text everywhere."
    e = Exhibit(
        'own',
        SCRIPT,
        '',
        (Row(SCRIPT, METHODS['anoclip'], note=SCRIPT), Row('b', METHODS['clip'])),
        ('mvtec',),
        ('pro',),
        contrasts=((SCRIPT, 'b', 'pro'),),
        print_state='own',
    )
    res = made_up(
        tmp_path,
        exhibits=[e],
        contrasts=[('own', 'procad', SCRIPT, 'b', 'pro', 'all', 1.0, 0.5, 2.0)],
    )
    d = readable(table(e, res))
    html = page([e], res, [('p.png', SCRIPT, SCRIPT)])
    assert (
        '<script>' not in html
        and html.count('&lt;script&gt;alert(1)&lt;/script&gt; &amp; _a_ | 50 % #1') >= 5
        and '<td class="">' in html
    )
    text = contrast_sentences(e, res).to_html()
    assert '<script>' not in text and '&lt;script&gt;' in text
    lines = markdown(d).splitlines()
    assert (
        all('<script>' not in l for l in lines)
        and len({len(re.findall(r'(?<!\\)\|', l)) for l in lines}) == 1
        and r'\_a\_ \| 50 % #1' in lines[2]
    )
    body = [l for l in latex(d).splitlines() if l.endswith(r'\\')]
    assert (
        len(body) == len(d) + 1
        and len({len(re.findall(r'(?<!\\)&', l)) for l in body}) == 1
        and r'\& \_a\_ | 50 \% \#1' in body[1]
    )


def test_an_exhibit_reads_its_own_files_alone(tmp_path):
    "Files of other exhibits may be damaged or missing."
    made_up(tmp_path, exhibits=[EXHIBITS['anoclip-t3'], EXHIBITS['anoclip-t4']])
    want = table('anoclip-t3', tmp_path), caption('anoclip-t3', tmp_path)
    (tmp_path / 'anoclip-t4' / 'metrics.csv').write_text('x')
    assert (
        table('anoclip-t3', tmp_path).equals(want[0])
        and caption('anoclip-t3', tmp_path) == want[1]
        and len(contrasts('anoclip-t3', tmp_path)) == 0
    )
    figure_of = figure('anoclip-t3', tmp_path)
    plt.close(figure_of)


def test_what_is_not_accepted_yet_says_so(tmp_path):
    (tmp_path / 'NOT_ACCEPTED').write_text('anoclip-t1\n')
    for e in EXHIBITS.values():
        d = readable(table(e, tmp_path))
        run = [r.label for r in e.rows if not r.state]
        assert 'not accepted yet' in d.loc[
            [label for label in run if label in d.index]
        ].to_numpy().ravel() and 'Not accepted yet' in caption(e, tmp_path)
        assert list(contrast_sentences(e, tmp_path).data.finding) == ['not accepted yet']
    for e in {e.form: e for e in EXHIBITS.values()}.values():  # a figure of each form
        plt.close(figure(e, tmp_path))
