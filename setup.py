from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

cfg = ConfigParser(delimiters=['='], interpolation=None)
cfg.read(Path(__file__).parent / 'settings.ini', encoding='utf-8')
s = cfg['DEFAULT']
setup(
    name=s['lib_name'],
    version=s['version'],
    description=s['description'],
    keywords=s['keywords'].split(),
    author=s['author'],
    license='Apache-2.0',
    url=s['git_url'],
    python_requires='>=' + s['min_python'],
    packages=find_packages(include=['zsad', 'zsad.*']),
    package_data={'zsad': ['assets/*', 'assets/trained/*']},
    include_package_data=True,
    install_requires=s['requirements'].split(),
    extras_require={
        'cluster': s['cluster_requirements'].split(),
        'llm': s['llm_requirements'].split(),
        'dev': s['dev_requirements'].split(),
    },
    entry_points={
        'console_scripts': s['console_scripts'].split(),
        'nbdev': [
            f"{s['lib_name']} = {s['lib_path']}._modidx:d"
        ],  # where other nbdev sites find our pages
    },
    zip_safe=False,
    long_description=Path('README.md').read_text(encoding='utf-8')
    if Path('README.md').exists()
    else '',
    long_description_content_type='text/markdown',
)
