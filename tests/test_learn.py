"""Training of prompts and heads: what moves, interruptions, processes, refusals, knowledge."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_parity import gap

from zsad.datasets.images import load_image
from zsad.datasets.loading import load_dataset
from zsad.datasets.masks import load_mask
from zsad.datasets.survey import scan_dataset
from zsad.encoder.loading import load_encoder
from zsad.learned.artifacts import cached_artifact, load_artifact
from zsad.learned.configs import CONFIGS, VARIANTS, find_train_config, resolve_config
from zsad.learned.descriptions import describe_mask
from zsad.learned.distributed import rank_device, world
from zsad.learned.knowledge import knowledge, look_up
from zsad.learned.missing import check_target, learn_missing, missing
from zsad.learned.tensor_files import save_state
from zsad.learned.train_set import (
    draw_rows,
    embed_known,
    known_sentences,
    load_train_set,
    make_batch,
    steps_of,
)
from zsad.learned.trainable import TrainableModel, distillation_loss
from zsad.learned.trainer import curves, learn, live_curves, parameter_groups
from zsad.methods.prompts import encode_text
from zsad.pipeline.detector import resolve_artifact
from zsad.pipeline.rows import METHODS
from zsad.rendered.procad import render_aux

S, NAMES = 96, list(CONFIGS)


@pytest.fixture(scope='module')
def enc(files):
    return load_encoder(*files, device='cpu', dtype='float32')


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return render_aux(
        good=1, bad=2, train=1, size=S, root=tmp_path_factory.mktemp('aux') / 'set', workers=1
    )


@pytest.fixture(scope='module')
def aux(root):
    return scan_dataset(load_dataset('procad-aux', root), 1)


def short_config(name, **how):
    return replace(
        CONFIGS[name],
        **{
            **dict(
                epochs=2,
                batch=8,
                lr_head=None,
                loss_size=48,
                settings=dict(heads=4) if name == 'kanoclip' else {},
            ),
            **how,
        },
    )


@pytest.fixture(scope='module')
def train_sets(enc, aux):
    return {n: load_train_set(resolve_config(short_config(n), enc), enc, aux) for n in NAMES}


def tensors(path, enc):
    t = load_artifact(path, enc)
    return {**(t.prompts.tensors if t.prompts else {}), **t.head.state_dict()}


@pytest.mark.parametrize('name', NAMES)
def test_only_what_is_learned_moves(name, enc, aux, train_sets, tmp_path):
    c, before = (
        resolve_config(short_config(name), enc),
        {k: v.clone() for k, v in enc.model.state_dict().items()},
    )
    start = {k: v.clone() for k, v in TrainableModel(c, enc).state_dict().items()}
    assert (
        learn(c, enc, aux, tmp_path / 'a', tmp_path / 'run', train_set=train_sets[name], show=False)
        == load_artifact(tmp_path / 'a', enc).hash
    )
    assert all(torch.equal(before[k], v) for k, v in enc.model.state_dict().items()) and not any(
        p.requires_grad or p.grad is not None for p in enc.model.parameters()
    )
    own = TrainableModel(c, enc)
    own.load_state_dict(
        torch.load(tmp_path / 'run' / 'checkpoint.pt', weights_only=True)['student']
    )
    moved = {k: not torch.equal(start[k], v) for k, v in own.state_dict().items()}
    assert [k for k, m in moved.items() if not m] == (
        ['head.seg.3.fc2.0.weight', 'head.det.3.fc2.0.weight'] if name == 'mvfa' else []
    )  # what they send up is read by nobody
    t = np.genfromtxt(tmp_path / 'run' / 'curve.csv', delimiter=',', names=True)
    assert len(t) == steps_of(c, 48) == 12 and t['step'].tolist() == list(range(12))
    whole, fresh = make_batch(train_sets[name], list(range(48)), enc), TrainableModel(c, enc)

    def total(s):
        return sum(getattr(c, k) * v.item() for k, v in s(whole).items())

    assert total(own) < total(fresh)  # on the images it learned from
    about = load_artifact(tmp_path / 'a', enc).about
    assert (
        (about['dataset'], about['data'], about['seed'], about['images'])
        == ('procad-aux', aux.hash, 0, 48)
        and about['config']['lr'] == c.lr
        and 'local' in about['losses']
    )
    assert len(curves(tmp_path / 'run').axes) == len(t.dtype.names) - 1


@pytest.mark.parametrize('name', NAMES)
def test_a_run_that_stopped_ends_where_the_others_end(name, enc, aux, train_sets, tmp_path):
    def go(tag, **how):
        return learn(
            short_config(name),
            enc,
            aux,
            tmp_path / tag,
            tmp_path / f'run-{tag}',
            train_set=train_sets[name],
            show=False,
            **how,
        )

    whole = go('whole')
    assert (
        go('parts', every=4, limit=3) == ''
        and go('parts', every=5, limit=7) == ''
        and not (tmp_path / 'parts.json').exists()
    )
    assert (
        go('parts') == whole
        and (tmp_path / 'run-whole' / 'curve.csv').read_text()
        == (tmp_path / 'run-parts' / 'curve.csv').read_text()
    )
    seeded = learn(
        short_config(name, seed=1),
        enc,
        aux,
        tmp_path / 'other',
        tmp_path / 'run-other',
        train_set=train_sets[name],
        show=False,
    )
    assert seeded != whole and any(
        gap(a, b) > 1e-4
        for a, b in zip(
            tensors(tmp_path / 'whole', enc).values(), tensors(tmp_path / 'other', enc).values()
        )
    )


SCRIPT = '''
import sys, time, torch
torch.set_num_threads(1)
from dataclasses import replace
from zsad.learned import trainer
from zsad.learned.configs import CONFIGS
from zsad.encoder.loading import load_encoder
from zsad.datasets.loading import load_dataset
from zsad.datasets.survey import scan_dataset
name, cfg, weights, root, out, slow = sys.argv[1:]
enc = load_encoder(cfg, weights, device='cpu', dtype='float32')
settings = dict(heads=4) if name == 'kanoclip' else {}
c = replace(CONFIGS[name], epochs=2, batch=8, lr_head=None, loss_size=48, settings=settings)
step = trainer.one_step


def slowly(*args):
    time.sleep(float(slow))
    return step(*args)


trainer.one_step = slowly
aux = scan_dataset(load_dataset('procad-aux', root), 1)
trainer.learn(c, enc, aux, out + '/a', out + '/run', every=1, show=False)
'''


def start(*args, launch=()):
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return subprocess.Popen(
        [sys.executable, *launch, *map(str, args)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_killed_in_the_middle_it_goes_on_to_the_same_parameters(files, enc, root, tmp_path):
    "A real kill, somewhere behind the third step."
    (tmp_path / 's.py').write_text(SCRIPT)

    def args(tag, slow):
        return (tmp_path / 's.py', 'kanoclip', *files, root, tmp_path / tag, slow)

    p = start(*args('killed', 0.3))
    curve = tmp_path / 'killed' / 'run' / 'curve.csv'
    end = time.time() + 90
    while not (curve.exists() and len(curve.read_text().splitlines()) > 3):
        assert time.time() < end and p.poll() is None, p.communicate()[0]
        time.sleep(0.05)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert not (tmp_path / 'killed' / 'a.json').exists()
    for tag in ('killed', 'whole'):
        q = start(*args(tag, 0))
        assert q.wait(120) == 0, q.communicate()[0]
    a, b = (tensors(tmp_path / t / 'a', enc) for t in ('killed', 'whole'))
    assert (
        all(torch.equal(a[k], b[k]) for k in a)
        and load_artifact(tmp_path / 'killed' / 'a', enc).hash
        == load_artifact(tmp_path / 'whole' / 'a', enc).hash
    )


@pytest.mark.slow
@pytest.mark.parametrize('name', ['kanoclip', 'mvfa'])
def test_two_processes_take_the_same_steps_as_one(name, files, enc, root, tmp_path):
    "torchrun, gloo, each process half of every batch."
    (tmp_path / 's.py').write_text(SCRIPT)

    def args(tag):
        return (tmp_path / 's.py', name, *files, root, tmp_path / tag, 0)

    p = start(
        *args('two'),
        launch=('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2'),
    )
    q = start(*args('one'))
    for r in (p, q):
        assert r.wait(170) == 0, r.communicate()[0]
    a, b = (tensors(tmp_path / t / 'a', enc) for t in ('two', 'one'))
    fresh = TrainableModel(resolve_config(short_config(name), enc), enc).head.state_dict()
    assert a.keys() == b.keys()

    def distance(t, keys):
        return sum((a[k].double() - t[k].double()).square().sum().item() for k in keys) ** 0.5

    apart, moved = distance(b, a), distance(fresh, fresh)
    assert (
        moved > 0.01 and apart < moved / 100
    )  # sums in another order, and Adam divides by them; another batch gives tenths


def test_every_image_is_seen_once_per_epoch():
    c = short_config('april-gan', epochs=3)
    for epoch in range(3):
        assert sorted(sum((draw_rows(c, 6 * epoch + k, 48) for k in range(6)), [])) == list(
            range(48)
        )
    assert draw_rows(c, 0, 48) != draw_rows(c, 6, 48) != draw_rows(
        replace(c, seed=1), 6, 48
    ) and draw_rows(c, 7, 48) == draw_rows(c, 7, 48)
    assert steps_of(c, 50) == 18 and not {i for k in range(6) for i in draw_rows(c, k, 50)} - set(
        range(50)
    )
    with pytest.raises(ValueError, match='batch=8.*7 images'):
        steps_of(c, 7)


def test_knowledge_of_an_image_is_the_mean_of_its_sentences(enc, aux):
    c, ds = resolve_config(short_config('kanoclip'), enc), aux.dataset
    rows = known_sentences(c, ds)
    got = embed_known(c, enc, rows)
    for i in (0, 1, 20, 47):
        k = ds.samples[i]
        want = list(knowledge(k.category, 'procad-aux', 5))
        if k.label:
            want.append(
                describe_mask(
                    load_image(k.path), load_mask(k.mask, S), look_up(k.category, 'procad-aux').noun
                )
            )
        assert list(rows[i]) == want and len(want) == 5 + k.label
        assert gap(got[i], F.normalize(enc.embed_text(want).float().mean(0), dim=-1)) < 1e-5
    assert {len(r) for r in known_sentences(replace(c, known=(3, 0)), ds)} == {3}
    alone = replace(c, known=(0, 1))
    own = embed_known(alone, enc, known_sentences(alone, ds))
    assert [bool(k.isfinite().all()) for k in own] == [
        bool(k.label) for k in ds.samples
    ]  # of normal images nothing is said
    with pytest.raises(ValueError, match=r'known=\(0, 0\).*nothing is said'):
        nothing = replace(c, known=(0, 0))
        embed_known(nothing, enc, known_sentences(nothing, ds))


def test_a_knowledge_file_of_your_own_goes_over_the_shipped_one(enc, aux, tmp_path):
    k, other = [s for s in aux.dataset.samples if s.label][:2]
    (tmp_path / 'k.json').write_text(
        json.dumps(
            dict(
                format='zsad-knowledge-1',
                source='me',
                sets={
                    'procad-aux': {
                        k.category: dict(
                            noun='thing',
                            background='A thing.',
                            anomalies=['a thing with a hole', 'a thing with a dent'],
                        )
                    }
                },
                images={'procad-aux': {k.id: ['a thing bitten by a dog']}},
            )
        )
    )
    c = resolve_config(short_config('kanoclip', known=(2, 1), base=str(tmp_path / 'k.json')), enc)
    told = dict(zip([s.id for s in aux.dataset.samples], known_sentences(c, aux.dataset)))
    assert told[k.id] == ('a thing with a hole', 'a thing with a dent', 'a thing bitten by a dog')
    assert (
        told[other.id][:2] == tuple(knowledge(other.category, 'procad-aux', 2))
        or other.category == k.category
    )
    assert len(told[other.id]) == 3 and 'dog' not in told[other.id][2]


def test_what_teaches_the_prompts(enc, train_sets):
    "Images without a description do not count; fixed prompts and a margin change the loss."
    b = make_batch(train_sets['kanoclip'], list(range(12)), enc)
    s = TrainableModel(resolve_config(short_config('kanoclip', margin=0.5), enc), enc)
    pair = s.pairs(b.categories)
    far = (F.normalize(pair, dim=-1) - F.normalize(b.knowledge, dim=-1)[:, None]).norm(dim=-1)
    hinge = (far[:, 1] - far[:, 0] + 0.5).clamp(min=0)
    assert abs((distillation_loss(s, pair, b) - hinge.mean()).item()) < 1e-6 and hinge.min() > 0
    known = b.knowledge.clone()
    known[::3] = float('nan')
    half = distillation_loss(s, pair, replace(b, knowledge=known))
    assert (
        abs((half - hinge[[i for i in range(12) if i % 3]].sum() / 12).item()) < 1e-6
        and distillation_loss(s, pair, replace(b, knowledge=known * float('nan'))).item() == 0
    )
    c = TrainableModel(resolve_config(short_config('kanoclip', teacher='clip'), enc), enc)
    want = torch.stack(
        [
            1 - (p * encode_text(enc, 'clip', n).class_embeddings).sum(-1).mean()
            for p, n in zip(pair, b.categories)
        ]
    ).mean()
    assert abs((distillation_loss(c, pair, b) - want).item()) < 1e-6
    g = parameter_groups(
        TrainableModel(
            resolve_config(replace(short_config('kanoclip'), lr=0.1, lr_head=0.01), enc), enc
        )
    )
    assert [x['lr'] for x in g] == [0.1, 0.01] and sum(
        p.numel() for x in g for p in x['params']
    ) == sum(p.numel() for p in s.parameters())


def test_every_variant_differs_from_its_base_in_what_its_name_says(enc):
    def changed(a, b):
        return {k for k, v in vars(a).items() if v != getattr(b, k)} - {'name'}

    k, vv = CONFIGS['kanoclip'], VARIANTS['kanoclip-vv']
    assert (
        changed(vv, k) == {'settings'}
        and changed(VARIANTS['kanoclip-qkv'], k) == {'encode'}
        and changed(VARIANTS['kanoclip-knpl'], vv) == {'encode'}
    )
    for n in VARIANTS:
        if n.startswith('knpl-'):
            assert len(changed(VARIANTS[n], vv)) == 1, n
        resolve_config(n, enc)
    with pytest.raises(ValueError, match="'nope'.*'knpl-none'"):
        find_train_config('nope')


def test_a_table_trains_what_it_lacks_and_never_on_its_own_set(enc, root, tmp_path, monkeypatch):
    monkeypatch.setenv('ZSAD_CACHE', str(tmp_path / 'cache'))
    import zsad.learned.missing as L

    monkeypatch.setattr(L, 'load_dataset', lambda on, folder: load_dataset(on, root))
    short = short_config('april-gan', epochs=1)
    monkeypatch.setattr(L, 'find_train_config', lambda name: replace(short, name=name))
    a = METHODS['april-gan']
    rows = [replace(a, seed=k) for k in (0, 1)] + [
        replace(a, name='own', artifact='april-gan-{backbone}-procad-b-s{seed}'),
        METHODS['anoclip'],
    ]
    lacking = missing(rows, enc, ['procad', 'procad-b'])
    stem = f'april-gan-{Path(enc.backbone).stem}'
    assert [(n, s, c.seed) for n, c, s in lacking] == [
        (f'{stem}-procad-aux-s0', 'procad-aux', 0),
        (f'{stem}-procad-aux-s1', 'procad-aux', 1),
        (f'{stem}-procad-b-s0', 'procad-b', 0),
    ]
    assert missing(rows[2:3], enc, ['procad-b']) == []  # it would be evaluated on its training set
    learn_missing(lacking[:2], enc, show=False)
    assert [n for n, *_ in missing(rows, enc, ['procad'])] == [f'{stem}-procad-b-s0']
    fits = [resolve_artifact(m, enc, 'procad') for m in rows[:2]]
    assert (
        fits[0][1].hash != fits[1][1].hash
        and [t.about['seed'] for _, t in fits] == [0, 1]
        and fits[0][1].about['dataset'] == 'procad-aux'
    )
    assert (
        fits[0][0].encode == resolve_config(short, enc).encode and fits[0][0].prompts == 'april-gan'
    )


def test_what_cannot_be_learned_is_refused(enc, aux, train_sets, tmp_path):
    with pytest.raises(ValueError, match="'april-gan'"):
        resolve_config('aprilgan', enc)
    with pytest.raises(ValueError, match="head='x'.*'mvfa'"):
        replace(CONFIGS['mvfa'], head='x')
    with pytest.raises(ValueError, match='prompts=.*text='):
        replace(CONFIGS['mvfa'], text=None)
    with pytest.raises(ValueError, match='kd=1.*none are learned'):
        replace(CONFIGS['april-gan'], kd=1.0)
    with pytest.raises(ValueError, match='epochs=0'):
        replace(CONFIGS['april-gan'], epochs=0)
    with pytest.raises(ValueError, match='procad.*learns from.*another'):
        check_target('kanoclip', 'procad', ['procad', 'visa'])
    check_target('kanoclip', 'procad-aux', ['procad', 'visa'])
    with pytest.raises(ValueError, match='step 0: the loss is nan.*lr='):
        learn(
            short_config('april-gan'),
            enc,
            aux,
            tmp_path / 'a',
            tmp_path / 'run',
            train_set=replace(
                train_sets['april-gan'], patches=train_sets['april-gan'].patches * float('nan')
            ),
            show=False,
        )
    learn(
        short_config('april-gan'),
        enc,
        aux,
        tmp_path / 'b',
        tmp_path / 'run2',
        train_set=train_sets['april-gan'],
        limit=1,
        show=False,
    )
    with pytest.raises(ValueError, match='another configuration'):
        learn(
            short_config('april-gan', lr=1.0),
            enc,
            aux,
            tmp_path / 'b',
            tmp_path / 'run2',
            train_set=train_sets['april-gan'],
            show=False,
        )


@pytest.mark.parametrize('name', NAMES)
def test_the_loss_of_a_batch_is_the_mean_of_its_parts(name, enc, train_sets):
    "Equal parts of a batch, averaged, give its loss: all losses are means over images."
    c = resolve_config(short_config(name), enc)
    s = TrainableModel(c, enc)
    rows = draw_rows(c, 0, 48)
    whole, a, b = (s(make_batch(train_sets[name], r, enc)) for r in (rows, rows[::2], rows[1::2]))
    for k in whole:
        assert abs((whole[k] - (a[k] + b[k]) / 2).item()) < 1e-4 * max(1, abs(whole[k].item()))


def test_losses_are_drawn_in_one_place_as_pictures(enc, aux, train_sets, tmp_path, monkeypatch):
    from IPython.display import DisplayHandle

    shown = []
    for how in ('display', 'update'):
        monkeypatch.setattr(
            DisplayHandle,
            how,
            lambda self, obj, how=how, **_: shown.append((how, self.display_id, obj)),
        )
    c = CONFIGS['anomalyclip']
    learn(
        c,
        enc,
        aux,
        tmp_path / 'a',
        tmp_path / 'run',
        every=2,
        limit=6,
        train_set=train_sets[c.name],
        show=False,
        live=live_curves(),
    )
    assert [how for how, *_ in shown] == ['display', 'update', 'update'] and len(
        {place for _, place, _ in shown}
    ) == 1
    assert (
        all(p._repr_mimebundle_()[0]['image/png'] for *_, p in shown)
        and shown[0][2].data != shown[2][2].data
    )  # no backend of matplotlib is needed to see them


def test_a_run_is_named_by_the_content_of_its_knowledge(enc, aux, tmp_path, monkeypatch):
    "An edited file is another run; the same file in another place is the same run."
    monkeypatch.setenv('ZSAD_CACHE', str(tmp_path / 'cache'))
    category = aux.dataset.categories[0]

    def write(file, *anomalies):
        told = dict(noun='thing', background='A thing.', anomalies=list(anomalies))
        file.write_text(
            json.dumps(
                dict(
                    format='zsad-knowledge-1',
                    source='me',
                    sets={'procad-aux': {category: told}},
                    images={},
                )
            )
        )
        return short_config('kanoclip', epochs=1, known=(2, 0), base=str(file))

    def go(c, tag, **how):
        return learn(c, enc, aux, tmp_path / tag, show=False, **how)

    first = go(write(tmp_path / 'k.json', 'a thing with a hole', 'a thing with a dent'), 'a')
    (folder,) = (tmp_path / 'cache' / 'learn').iterdir()
    moved = write(tmp_path / 'elsewhere.json', 'a thing with a hole', 'a thing with a dent')
    assert go(moved, 'b') == first and list((tmp_path / 'cache' / 'learn').iterdir()) == [folder]
    edited = write(tmp_path / 'k.json', 'a dog', 'a green hat')
    second = go(edited, 'c')
    assert second != first and len(list((tmp_path / 'cache' / 'learn').iterdir())) == 2
    a, c = (load_artifact(tmp_path / n, enc) for n in 'ac')
    assert (
        not torch.equal(a.prompts.tensors['normal'], c.prompts.tensors['normal'])
        and a.about['knowledge'] != c.about['knowledge']
    )
    assert a.about['config']['base'] == 'k.json'  # not where it lies
    with pytest.raises(ValueError, match='another configuration, encoder, data set, knowledge'):
        go(edited, 'd', folder=folder)


def test_hand_written_sentences_and_weights_are_part_of_a_runs_name(
    enc, aux, train_sets, monkeypatch
):
    import zsad.learned.trainer as L
    from zsad.methods.prompt_sets import prompt_set

    c = resolve_config(short_config('april-gan'), enc)

    def key(c=c, **how):
        return L.identity_key(
            L.training_identity(
                c, how.get('enc', enc), how.get('train_set', train_sets['april-gan'])
            )
        )

    first = key()
    assert (
        key(replace(c, name='other')) == first != key(replace(c, lr=0.1))
        and key(train_set=replace(train_sets['april-gan'], data='x')) != first
    )
    assert key(enc=load_encoder('mini', device='cpu')) != first
    monkeypatch.setattr(
        L, 'prompt_set', lambda name: replace(prompt_set(name), normal=('fine {}',))
    )
    assert key() != first


def test_only_torchrun_makes_several_processes(enc, aux, train_sets, tmp_path, monkeypatch):
    "RANK and WORLD_SIZE, set by other launchers too, are not enough; each rank has its own GPU."
    import torch.distributed as dist

    import zsad.learned.distributed as L

    full = dict(RANK='1', WORLD_SIZE='2', LOCAL_RANK='1', MASTER_ADDR='localhost', MASTER_PORT='1')
    for k in full:
        monkeypatch.delenv(k, raising=False)
    assert world() == (0, 1) and rank_device('cpu') == 'cpu' and rank_device('cuda') == 'cuda'
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert world() == (0, 1) and rank_device('cuda') == 'cuda'
    assert (
        learn(
            short_config('april-gan'),
            enc,
            aux,
            tmp_path / 'a',
            tmp_path / 'run',
            train_set=train_sets['april-gan'],
            limit=1,
            show=False,
        )
        == ''
    )
    assert (tmp_path / 'run' / 'checkpoint.pt').exists() and not dist.is_initialized()
    for k, v in full.items():
        monkeypatch.setenv(k, v)
    monkeypatch.setattr(L, 'choose_device', lambda device: 'cuda' if device == 'auto' else device)
    assert world() == (1, 2) and [rank_device(d) for d in ('auto', 'cuda', 'cuda:0', 'cpu')] == [
        'cuda:1',
        'cuda:1',
        'cuda:0',
        'cpu',
    ]
    assert L.own_encoder(enc) is enc


def test_checkpoints_of_two_writers_do_not_meet(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    def write(k):
        for _ in range(15):
            save_state(tmp_path / 'checkpoint.pt', step=k, rows=torch.full((2000,), float(k)))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    saved = torch.load(tmp_path / 'checkpoint.pt', weights_only=True)
    assert (saved['rows'] == saved['step']).all() and [p.name for p in tmp_path.iterdir()] == [
        'checkpoint.pt'
    ]


def test_an_artifact_of_another_configuration_is_trained_again(
    enc, aux, train_sets, tmp_path, monkeypatch
):
    "An artifact in the cache that was trained with another configuration does not count."
    monkeypatch.setenv('ZSAD_CACHE', str(tmp_path))
    import zsad.learned.missing as L

    short = short_config('april-gan', epochs=1)
    monkeypatch.setattr(L, 'find_train_config', lambda name: replace(short, name=name))
    row = METHODS['april-gan']
    ((name, *_),) = missing([row], enc, ['procad'])
    learn(
        short, enc, aux, cached_artifact(name, enc), train_set=train_sets['april-gan'], show=False
    )
    assert missing([row], enc, ['procad']) == []
    monkeypatch.setattr(L, 'find_train_config', lambda name: replace(short, name=name, lr=0.5))
    assert [n for n, *_ in missing([row], enc, ['procad'])] == [name]
