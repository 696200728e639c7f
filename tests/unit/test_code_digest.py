"""What counts as code of a result: every definition that it reaches, and nothing else. On a toy package."""

import pytest

from medkit import code_digest
from medkit.code_digest import digest_code

FILES = {
    "__init__.py": '"""The package."""\n',
    "stats.py": '''
from functools import cache

LEVEL = 0.95

def mean(values):
    """Mean of some values."""
    return sum(values) / len(values)

def interval(values):
    return mean(values), LEVEL

@cache
def decorated():
    return 0

class Test:
    size: float = 0.05
    def run(self):
        return interval([self.size])
''',
    "tables.py": """
from pathlib import Path
LABELS = Path(__file__).with_name("labels.csv")
LEVELS = Path(__file__).with_suffix(".yaml")
FORMAT = "plain"

def read_labels():
    return LABELS.read_text()

def write(table):
    return table, FORMAT, LEVELS.read_text()
""",
    "tables.yaml": "level: 1",
    "labels.csv": "a,b\n",
    "lora/__init__.py": '''
"""The room of LoRA."""
from medkit.lora.adapters import attach
from medkit.lora.adapters import merge as merge_weights
from medkit.lora.train import train
''',
    "lora/adapters.py": """
import sys
sys.setrecursionlimit(5000)
RANK = 16
def attach(model):
    return model, RANK
def merge(model):
    from medkit import stats
    return stats.mean([1, 2])
""",
    "lora/train.py": "RATE = 1\ndef train(model):\n    return model, RATE\n",
}


@pytest.fixture
def edit(tmp_path, monkeypatch):
    """edit(file, old, new) changes a file of the toy package, which stands in for medkit."""
    root = tmp_path / "medkit"
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(code_digest, "PACKAGE", root)
    caches = [f for f in vars(code_digest).values() if hasattr(f, "cache_clear")]

    def change(name=None, old="", new=""):
        if name:
            text = (root / name).read_text()
            assert old in text
            (root / name).write_text(text.replace(old, new, 1))
        for cached in caches:
            cached.cache_clear()

    change()
    yield change
    monkeypatch.undo()
    change()


def changes(edit, source: str, *change: str) -> bool:
    """Whether a change of the toy package changes the digest of a piece of source."""
    before = digest_code(source)
    edit(*change)
    return digest_code(source) != before


MEAN = "from medkit.stats import mean\nmean([1])"
INTERVAL = "from medkit import stats\nstats.interval([1])"
TEST = "from medkit.stats import Test\nTest().run()"
DECORATED = "from medkit.stats import decorated\ndecorated()"
LABELS = "from medkit import tables\ntables.read_labels()"
WRITE = "from medkit import tables\ntables.write(1)"
ATTACH = "from medkit import lora\nlora.attach(1)"
MERGE = "from medkit import lora\nlora.merge_weights(1)"
TRAIN = "from medkit import lora\nlora.train(1)"


@pytest.mark.parametrize(
    ("source", "change", "counts"),
    [
        # prose and layout
        (MEAN, ("stats.py", "Mean of some values.", "The mean."), False),
        (MEAN, ("stats.py", "sum(values) / len", "sum(values) // len"), True),
        # functions that are reached, directly or through others, and functions that are not
        (INTERVAL, ("stats.py", "sum(values) / len", "sum(values) // len"), True),
        (MEAN, ("stats.py", "return mean(values), LEVEL", "return mean(values)"), False),
        (MERGE, ("stats.py", "sum(values) / len", "sum(values) // len"), True),
        # classes, their attributes and methods; constants; decorators
        (TEST, ("stats.py", "0.05", "0.01"), True),
        (INTERVAL, ("stats.py", "LEVEL = 0.95", "LEVEL = 0.9"), True),
        (MEAN, ("stats.py", "LEVEL = 0.95", "LEVEL = 0.9"), False),
        (DECORATED, ("stats.py", "@cache\n", ""), True),
        # files beside a module count for the definition that names them
        (LABELS, ("labels.csv", "a,b", "a,c"), True),
        (WRITE, ("labels.csv", "a,b", "a,c"), False),
        (WRITE, ("tables.yaml", "1", "2"), True),
        # an index passes names on; a function hides the file of its name
        (ATTACH, ("lora/adapters.py", "RANK = 16", "RANK = 8"), True),
        (MERGE, ("lora/adapters.py", "RANK = 16", "RANK = 8"), False),
        (TRAIN, ("lora/train.py", "RATE = 1", "RATE = 2"), True),
        (ATTACH, ("lora/train.py", "RATE = 1", "RATE = 2"), False),
        # statements of a module run whenever it is imported
        (ATTACH, ("lora/adapters.py", "limit(5000)", "limit(6000)"), True),
        (TRAIN, ("lora/adapters.py", "limit(5000)", "limit(6000)"), False),
    ],
)
def test_an_edit_counts_where_it_is_reached(edit, source, change, counts):
    assert changes(edit, source, *change) == counts


def test_the_source_itself_counts_but_its_comments_do_not(edit):
    assert digest_code("x = 1  # one") == digest_code("x = 1") != digest_code("x = 2")
