"""Accepting some exhibits: what is replaced, what stays, what is refused."""
import pandas as pd, pytest
from zsad import accept as A
from zsad.accept import FILES, accept, check_join, join, joined_streams, read_files, shows
from zsad.exhibits import EXHIBITS


def results(rows, contrasts=()):
    "rows: (run, method, data set, seed, {metric: value}); contrasts: (exhibit, better)."
    runs = pd.DataFrame([dict(run=r, method=m, control='', dataset=d, seed=s) for r, m, d, s, _ in rows])
    metrics = pd.DataFrame([dict(run=r, category=c, metric=k, value=v, lo='1', hi='2') for r, *_, values in rows for k, v in values.items() for c in ('pill', 'mean')])
    defects = pd.DataFrame([dict(run=r, defect='cut', value='3') for r, *_ in rows])
    return dict(runs=runs, metrics=metrics, defects=defects, contrasts=pd.DataFrame(contrasts, columns=['exhibit', 'better']))


def test_rows_that_were_run_again_replace_themselves_and_the_rest_stays():
    old = results([('1', 'anoclip', 'procad', '0', dict(pro='5')), ('2', 'winclip', 'procad', '0', dict(pro='6')), ('3', 'anoclip', 'procad-b', '0', dict(pro='7'))], [('anoclip-t1', 'old'), ('winclip-t2', 'old')])
    new = results([('9', 'anoclip', 'procad', '0', dict(pro='5')), ('8', 'clip', 'procad', '0', dict(pro='1'))], [('anoclip-t1', 'new'), ('anoclip-t3', 'new')])
    j = join(old, new, ['anoclip-t1', 'anoclip-t3'])
    assert list(j['runs'].run) == ['2', '3', '8', '9'] == list(dict.fromkeys(j['metrics'].run)) == list(j['defects'].run)
    assert j['contrasts'].to_numpy().tolist() == [['anoclip-t1', 'new'], ['anoclip-t3', 'new'], ['winclip-t2', 'old']]      # in the order of the exhibits
    assert list(j['metrics'][j['metrics'].run == '9'].category) == ['pill', 'mean']

def test_of_two_measurements_the_one_with_more_metrics_stays():
    full, part = results([('1', 'anoclip', 'procad', '0', dict(pro='5', pixel_ap='4'))]), results([('9', 'anoclip', 'procad', '0', dict(pro='5'))])
    assert list(join(full, part, [])['runs'].run) == ['1'] and list(join(part, full, [])['runs'].run) == ['1']

def test_other_seeds_and_their_mean_stay():
    old = results([(str(k), 'dual', 'procad', s, dict(pro=str(k))) for k, s in enumerate(('0', '1', 'mean'))])
    assert sorted(zip(*(join(old, results([('9', 'dual', 'procad', '0', dict(pro='0'))]), [])['runs'][k] for k in ('run', 'seed')))) == [('1', '1'), ('2', 'mean'), ('9', '0')]

def test_exhibits_that_show_other_numbers_now_have_to_be_run_as_well():
    old = results([('1', 'anoclip', 'procad', '0', dict(pro='5'))], [('anoclip-t3', 'x'), ('anoclip-t1', 'x'), ('winclip-t2', 'x')]); new = results([('9', 'anoclip', 'procad', '0', dict(pro='5.1'))])
    with pytest.raises(ValueError, match='^anoclip no longer give the numbers that anoclip-t1, anoclip-t3 show'): join(old, new, ['baselines'])
    with pytest.raises(ValueError, match='that anoclip-t3 show'): check_join(old, new, ['anoclip-t1'])
    assert list(join(old, new, ['anoclip-t1', 'anoclip-t3'])['runs'].run) == ['9']
    assert shows(EXHIBITS['anoclip-t1'], ('anoclip', '', 'procad', '0')) and not shows(EXHIBITS['anoclip-t1'], ('anoclip', '', 'procad-novel', '0')) and not shows(EXHIBITS['winclip-t2'], ('anoclip', '', 'procad', '0'))

def test_some_exhibits_join_the_files_and_a_whole_run_replaces_them(tmp_path, monkeypatch):
    root, out = tmp_path/'c', tmp_path/'out'; (root/'nbs'/'results').mkdir(parents=True); (root/'settings.ini').write_text(''); out.mkdir(); monkeypatch.setattr(A, 'execute', lambda p: p)
    def write(folder, files):
        for n in FILES: files[n].to_csv(folder/f'{n}.csv', index=False, lineterminator='\n')
    old, new = results([('1', 'anoclip', 'procad', '0', dict(pro='5'))], [('anoclip-t3', 'x')]), results([('9', 'clip', 'procad', '0', dict(pro='4'))], [('anoclip-t1', 'y')])
    write(root/'nbs'/'results', old); write(out, new); files = [out/f'{n}.csv' for n in FILES]
    accept(files, root, ran=['anoclip-t1']); got = read_files(root/'nbs'/'results')
    assert list(got['runs'].run) == ['1', '9'] and list(got['contrasts'].better) == ['y', 'x']
    accept(files, root); assert all((root/'nbs'/'results'/f.name).read_bytes() == f.read_bytes() for f in files)

def test_printed_text_is_stored_in_one_piece():
    import nbformat.v4 as v4
    parts = [v4.new_output('stream', text='a\n'), v4.new_output('stream', text='b\n'), v4.new_output('display_data'), v4.new_output('stream', text='c')]
    assert [x.get('text') for x in joined_streams(parts)] == ['a\nb\n', None, 'c']
