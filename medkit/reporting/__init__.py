"""reporting"""

from medkit.reporting.model_card import write_card
from medkit.reporting.paper_claims import paper_table
from medkit.reporting.paper_numbers import change_per_token, tokens_per_problem
from medkit.reporting.results import (
    from_accuracy,
    from_bench,
    from_ledger,
    from_manifests,
    from_steps,
    from_table,
    ratios,
)
from medkit.reporting.tables import STAGES, cost_table, load_results, steps_table, write_results
