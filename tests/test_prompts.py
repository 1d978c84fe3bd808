"""The sentences of every prompt set, as digests taken from the public sources they stand for.

anoclip@code: AnoVL 3a70bfd; april-gan: VAND-APRIL-GAN f13b8a6; winclip@code:
Accurate-WinCLIP-pytorch eef4f8c and anomalib 2.7.0; winclip: caoyunkang/WinClip 0818c9d with the
paper's full stop; cs: AnoVL's states x its 22 templates. The rest is built from these lists.
"""

import hashlib
from dataclasses import replace

import pytest
import torch

from zsad.methods.prompt_sets import PROMPTS, RULES, PromptSet, category_prompts
from zsad.methods.prompts import Text, average, encode_prompts, encode_text

# set, category, prompts per state, sha256 of the joined normal and anomalous prompts
DIGESTS = [
    (
        'clip',
        'bottle',
        1,
        1,
        'c516122242a8926627cfbe65ae7d97208eb51227498f7cb09ddf910a9292d8ae',
        '9f24a6b938bc345ba24acae019d30b69e8c7b6b68371ec64d506e4cdec6a2449',
    ),
    (
        'clip',
        'carpet',
        1,
        1,
        '9375c6579831a4b692b9b828874a2a14636d6498cda47308a6d180d983b5f027',
        '4c1f06ea28cd85350c93a50d08cc1053e2b395e05b14235528e561f1cf0a98c6',
    ),
    (
        'clip',
        'metal_nut',
        1,
        1,
        '5c27dc9b78694704413069f6eb587c9e2a275ca91214ca528b2d5ad7bb3d9da6',
        '8d8fa240495bbedad336a645c352b2e26b4800eebcc86e56d18fd51f672eb331',
    ),
    (
        'clip-ac',
        'bottle',
        22,
        22,
        'df86dc69327d174e6fd49c08594bfe442a43ddd32796ba76bb2b021d792a7a18',
        '734108f91d04fe309f99871d596a9fe502d81dace2beaf077cacf8921809506f',
    ),
    (
        'clip-ac',
        'carpet',
        22,
        22,
        '2ff96c8bd4566863482b992c2ef56b72bb4fd305f16fc516f0e1a7dcf9e5ec42',
        '7db66fe724b1d7b69654d18ead91d769ca228ff0b58423168e609a776d1ba1a0',
    ),
    (
        'clip-ac',
        'metal_nut',
        22,
        22,
        '59928daaacd982d7a10c503a3915b33454ac9637586648214e229f50555e41c7',
        '69fb3f0e3a5afb8c41cb1cf8cc1410f501832d899a88c9365d941075db48a377',
    ),
    (
        'base',
        'bottle',
        22,
        22,
        'ef5ddd142ad27ed95e747943b2212e93baf4965718d2170ae7f4d5bd0ced2279',
        '4cebe37c845ee3267729af51c5d6120cb89e4ccb1ef108495dcfad3ab108b62d',
    ),
    (
        'base',
        'carpet',
        22,
        22,
        'f2f918ca1631d05001bcf8c0ca10e64da7454542cdc2a362ccb00aa449df2eb1',
        '7e19d6c216b39df8f720623c2f4072a861f2aa6872a8887d554c10e72daaeaee',
    ),
    (
        'base',
        'metal_nut',
        22,
        22,
        '381ff09268d3fdd095f401416638e02a115de32405b2f39feda52afb65bcaa84',
        'e3462ef0ccccdafc63eb788424cca8a1ca7a0c45b78499dc79720e6e46d6d2f8',
    ),
    (
        'cs',
        'bottle',
        154,
        154,
        '9831939350d63fdc5b56974f3881a2e77936552c0245a61372c3fbfeb577e67f',
        '5b71957ec79a5f9d76220cfa23d269805139d40bbc29c5eae95a6993f24d6c80',
    ),
    (
        'cs',
        'carpet',
        154,
        154,
        '612ae858aa2f9e3fe075cda9743e3df69fe54b27194b8965ec6c59e195970c80',
        '641f51302eb9ffc3cd2f25f8c71d3201ee2b2341b7f162b0fed2b1913e37ee4e',
    ),
    (
        'cs',
        'metal_nut',
        154,
        154,
        'e45945592eb9e7a207f1c8343b94ed4d26ce440393295d2cbd6b318f4e9382cd',
        'cc4a23ae3be0066af636472c4441009a67506f3bee9cb39628641f2269052483',
    ),
    (
        'anoclip',
        'bottle',
        616,
        616,
        '63d60320fb2c9bd03e96d4c642df77d48b894bc494135af06b0201578311320c',
        '5781615dd22a184698e97d59b8ba007f92ebfd28b7f5853170f797ef11b79a42',
    ),
    (
        'anoclip',
        'carpet',
        616,
        616,
        '2af5a422682ef941d1385310560b089557fd386a8879f6a0daeacb6e359a19a2',
        'daba986a8f0709d414b3d1c29ef61a490ddbe2cfebdc0daa820e4463ff7a3233',
    ),
    (
        'anoclip',
        'metal_nut',
        616,
        616,
        'f1cf916a0d9072bc2b21c050d0f76960ed96169acb5c097a95a9f0392c787e09',
        '2122fbfa3582a2b2827416570c096f40a81077c5576320d6d19fa0b58551d85a',
    ),
    (
        'anoclip@code',
        'bottle',
        462,
        462,
        'd93f88b425c0727065977caedaa6362b0e1015d94f53df8bf8df45dd91f1f85b',
        '2ee228c7b30cb1cba8df6101d8410933aed96d010ffeb5cc9bfcf37fba09838e',
    ),
    (
        'anoclip@code',
        'carpet',
        462,
        462,
        'd18f18c500e278789bbe96541e5c0a03d419db9c8feed40746b7a1d170fc1b73',
        '8a4832140214d7257c436124e3e97e00ea8891fc99519b218fa4bb92251faa10',
    ),
    (
        'anoclip@code',
        'metal_nut',
        462,
        462,
        'c02b7b9208b8635e392e4d59b1991389d338d69a4a82f0d29a8c882408a83a5a',
        '09af7674813fac15e1d65a3e952eee9eec0f11353878d47d0f99f28299e146e1',
    ),
    (
        'winclip',
        'bottle',
        154,
        88,
        '504b3812cfec340a299bdcafa04a065190434e9131efbb89f75575e90f0478eb',
        'd696a027a226c7e5e3b87e5c7822811420f163372bfe792bab23b513452a4421',
    ),
    (
        'winclip/task',
        'bottle',
        154,
        88,
        '504b3812cfec340a299bdcafa04a065190434e9131efbb89f75575e90f0478eb',
        'd696a027a226c7e5e3b87e5c7822811420f163372bfe792bab23b513452a4421',
    ),
    (
        'winclip',
        'carpet',
        154,
        88,
        '99e0f620b399380fd83993911e30dac8276eb8990a8bf7f4076c3e6cf8750a63',
        'f384d0971114bad93cc1db170a3dee1641d8899cb9bfb1ac724fc6b1338b401c',
    ),
    (
        'winclip',
        'metal_nut',
        154,
        88,
        '0b4b4fa56d397b93b1f0ebf223378ce2983b5c7c0dd38c1a8f1734180f630f79',
        '4d0c874c70f680e2474a9ae063d0d46a6f63117b550d7ce816f42d5db7f02976',
    ),
    (
        'winclip@code',
        'bottle',
        147,
        84,
        '738f363c2d950e24b8f2e122c623b927e92bd8b75fef182e04d753e7e403167a',
        '7d990781f8b36a81abbf6c3c2be902bf5151d7f54ef97d0334319e2407356444',
    ),
    (
        'winclip@code',
        'carpet',
        147,
        84,
        '32b5165efb9daf29cc7215254ac9d00fa750afd0ac85f3e64481f6df3896a69b',
        '83597f818125484c8f52283a7486fbb84eadcc64723fc544fdb7f650135ee458',
    ),
    (
        'winclip@code',
        'metal_nut',
        147,
        84,
        '968a120232467cde2b0f4a7135171a698e1b0831ae6e5021b1236a6afa3bfaaa',
        'df33ed29e85077da9d4aa009ab52d3b83b41dd1f3bd8c893c8d97168a0692e3c',
    ),
    (
        'april-gan',
        'bottle',
        245,
        175,
        'fdeb8bd981f3bfff6f14ce1698d8a50f4b495f7fec73efdb4feb759eca6aac40',
        '89e74f26ce5d0477bc73e26bad5de10b80dadb9d03134b8168e0072a4e67cc52',
    ),
    (
        'april-gan',
        'carpet',
        245,
        175,
        '0180e51c8d1f95b7b78177b8064f49eea3da1c20e12d6b6cf78e6d6740ac13e2',
        '2f50ca151ca747fa92fb3927b8d776d5a1e1d1729d3e223094a5b159443e9098',
    ),
    (
        'april-gan',
        'metal_nut',
        245,
        175,
        'c6f43eb8527ef1320129d67986aecbdf9497a61db185bca60c96b9b70175d241',
        '0a32437cd22bd08de411f626e3c7be569bb7272cb186cb23bc929dd30c09e8d3',
    ),
]


class Bytes:
    "A stand-in for a text encoder: counts of bytes"

    def embed_text(self, texts):
        return torch.stack(
            [torch.bincount(torch.tensor(list(t.encode())), minlength=128).float() for t in texts]
        )


def digest(lines):
    return hashlib.sha256('\n'.join(lines).encode()).hexdigest()


@pytest.mark.parametrize('name,category,n_normal,n_abnormal,normal,abnormal', DIGESTS)
def test_sentences_are_those_of_the_source(name, category, n_normal, n_abnormal, normal, abnormal):
    a, b = category_prompts(name, category)
    assert (len(a), len(b)) == (n_normal, n_abnormal)
    assert (digest(a), digest(b)) == (normal, abnormal)


def test_every_set_is_checked_and_named_after_itself():
    assert {row[0] for row in DIGESTS} == set(PROMPTS)
    assert all(p.name == name and p.source for name, p in PROMPTS.items())
    assert all(hash(p) == hash(replace(p)) for p in PROMPTS.values())


def test_task_specific_states_are_added_for_their_categories_alone():
    "22 templates times one state more, after the others of its template; normal is unchanged."
    plain, task = category_prompts('winclip', 'pcb2'), category_prompts('winclip/task', 'pcb2')
    more = [s for s in task[1] if 'bad soldering' in s]
    assert (
        task[0] == plain[0]
        and [s for s in task[1] if s not in more] == plain[1]
        and len(more) == 22
        and 'a blurry photo of the pcb2 with bad soldering.' in more
    )
    custom = replace(PROMPTS['base'], name='own', task=[('nut', ['bent {}', 'stripped {}'])])
    assert [len(s) for s in category_prompts(custom, 'nut')] == [22, 66] and category_prompts(
        custom, 'bolt'
    ) == category_prompts('base', 'bolt')


def test_kind_decides_only_where_a_set_has_texture_domains():
    for name in PROMPTS:
        same = category_prompts(name, 'bottle', 'texture') == category_prompts(
            name, 'bottle', 'object'
        )
        assert same == (not PROMPTS[name].texture_domains)
    assert (
        category_prompts('anoclip@code', 'carpet')
        == category_prompts('anoclip@code', 'carpet', 'texture')
        != category_prompts('anoclip@code', 'carpet', 'object')
    )


def test_names_keep_braces_and_follow_the_spelling_of_the_set():
    assert category_prompts('clip', 'a{}b')[0] == ['a photo of a normal a{}b']
    assert (
        'pipe fryum' in category_prompts('anoclip', 'pipe_fryum')[0][0]
        and 'pipe_fryum' in category_prompts('anoclip@code', 'pipe_fryum')[0][0]
    )
    assert category_prompts('anoclip@code', 'macaroni1') == category_prompts(
        'anoclip@code', 'macaroni'
    )


@pytest.mark.parametrize(
    'call,message',
    [
        (lambda: category_prompts('winclip22', 'bottle'), 'winclip@code'),
        (lambda: category_prompts(None, 'bottle'), 'valid names'),
        (lambda: category_prompts({'normal': []}, 'bottle'), 'pair'),
        (lambda: category_prompts((['a'], ['b'], ['c']), 'bottle'), 'pair'),
        (lambda: category_prompts((['a'], []), 'bottle'), 'at least one'),
        (lambda: category_prompts((['a', 3], ['b']), 'bottle'), 'at least one'),
        (lambda: category_prompts('clip', ''), 'bottle'),
        (lambda: category_prompts('clip', None), 'bottle'),
        (lambda: category_prompts('clip', 'bottle', 'fabric'), 'object, texture'),
        (lambda: average(torch.ones(2, 3), 'mean'), 'raw, unit'),
        (lambda: encode_prompts(Bytes(), 'clip', 'bottle', 'fabric'), 'object, texture'),
        (lambda: PromptSet('p', ('normal',), ('{} bad',), ('a {}',)), 'exactly one'),
        (lambda: PromptSet('p', (), ('{} bad',), ('a {}',)), 'nothing'),
        (lambda: PromptSet('p', 'normal {}', ('{} bad',), ('a {}',)), 'one string'),
        (lambda: PromptSet('p', ('{}',), ('{} bad',), ('a {}',), average='mean'), 'raw, unit'),
        (
            lambda: PromptSet('p', ('{}',), ('{} bad',), ('a {}',), order='random'),
            'templates, states',
        ),
        (
            lambda: PromptSet('p', ('{}',), ('{} bad',), ('a {}',), domains=()),
            'at least one phrase',
        ),
    ],
)
def test_errors_name_the_way_out(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize('name', list(PROMPTS))
def test_text_has_unit_rows(name):
    text = encode_text(Bytes(), name, 'carpet')
    assert (
        isinstance(text, Text)
        and text.class_embeddings.shape == (2, 128)
        and text.class_embeddings.dtype == torch.float32
    )
    assert [len(e) for e in text.prompt_embeddings] == [
        len(s) for s in category_prompts(name, 'carpet')
    ]
    for rows in (text.class_embeddings, *text.prompt_embeddings):
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(len(rows)))
    assert torch.equal(encode_prompts(Bytes(), name, 'carpet'), text.class_embeddings)
    other = encode_text(
        Bytes(), name, 'carpet', rule=next(r for r in RULES if r != PROMPTS[name].average)
    )
    assert torch.allclose(other.class_embeddings, text.class_embeddings, atol=1e-6) == (
        name == 'clip'
    )  # one sentence per state: no rule to speak of


def test_swapping_the_states_swaps_the_rows():
    normal, abnormal = category_prompts('winclip', 'bottle')
    assert torch.equal(
        encode_prompts(Bytes(), (abnormal, normal), 'bottle'),
        encode_prompts(Bytes(), 'winclip', 'bottle').flip(0),
    )
