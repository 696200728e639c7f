"""How well a model predicts the responses of instructions: perplexity per token, and its change against a baseline."""

import numpy as np
import pandas as pd

from medkit.evaluation.records import ratio_of_sums
from medkit.variants import VARIANTS

INTERVAL = ["value", "ci_low", "ci_high"]
COLUMNS = ["variant", "source", *INTERVAL, "n", "tokens", "bits_per_byte"]
COLUMNS += ["baseline", "ratio", "ratio_low", "ratio_high"]


def measure_perplexity(predictions: pd.DataFrame, questions: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """A row (COLUMNS) per variant and source of the predictions by `perplexity`; n counts responses.

    The value is exp(−log p of all response tokens / their number), end tokens included, and its interval a bootstrap
    over groups. `ratio`: the perplexity over that of the variant's baseline on the same responses, where both have the
    same tokens; for two tokenizers compare `bits_per_byte`, the bits that a byte of a response costs.
    """
    table = predictions[predictions.scoring == "perplexity"]
    table = table.merge(questions[["id", "source", "group", "options"]], on="id", validate="many_to_one")
    table = table.assign(nats=[-logprobs[0] for logprobs in table.logprobs], tokens=[t[0] for t in table.answer_tokens])
    table["bytes"] = [len(options[0].encode()) for options in table.options]
    tables = []
    for source, part in table.groupby("source", sort=False):
        nats, tokens, size = (part.pivot(index="id", columns="variant", values=v) for v in ("nats", "tokens", "bytes"))
        groups = part.groupby("id").group.first()
        rates = ratio_of_sums(nats, tokens, groups, confidence).set_index("variant")
        rates = rates.assign(source=source, tokens=tokens.sum(), bits_per_byte=nats.sum() / np.log(2) / size.sum())
        rates[INTERVAL] = np.exp(rates[INTERVAL])
        pairs = {name: VARIANTS[name].baseline for name in nats if VARIANTS[name].baseline in nats}
        if pairs:
            changes = pd.DataFrame({v: (nats[v] - nats[b]).where(tokens[v] == tokens[b]) for v, b in pairs.items()})
            tokens = tokens[list(pairs)].where(changes.notna())
            ratios = ratio_of_sums(changes, tokens, groups, confidence).set_index("variant")
            rates[["ratio", "ratio_low", "ratio_high"]] = np.exp(ratios[INTERVAL])
            rates["baseline"] = pd.Series(pairs).where(ratios.value.notna())
        tables.append(rates.reset_index().reindex(columns=COLUMNS))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=COLUMNS)
