"""Whether a message may be about an emergency: by word patterns that a person can read and correct.

`emergency_rules.yaml` holds the patterns, docs/safety.md says how well they work. They are tuned to miss little.
"""

import re
from pathlib import Path

import yaml

RULES: dict[str, list[re.Pattern]] = {
    name: [re.compile(rf"(?<!\w)(?:{pattern})(?!\w)", re.I) for pattern in patterns]
    for name, patterns in yaml.safe_load(Path(__file__).with_name("emergency_rules.yaml").read_text()).items()
}
LONGEST = 2000
SENTENCE = (
    "This may be an emergency: call your emergency number now (112 in Europe, 911 in North America, 999 in the UK)."
)


def is_emergency(message: str) -> bool:
    """One strong line of the rules or two weak ones, and no calm one, unless there is an urgent one too.

    Of a long message its beginning and its end are read, LONGEST characters each.
    """
    text = (message if len(message) <= 2 * LONGEST else f"{message[:LONGEST]}\n{message[-LONGEST:]}").replace("’", "'")
    counts = {name: sum(1 for p in patterns if p.search(text)) for name, patterns in RULES.items()}
    return (counts["strong"] > 0 or counts["weak"] > 1) and (not counts["calm"] or counts["urgent"] > 0)
