"""What a run shows in the end: `results.json`, tables, the paper's numbers beside ours, model card, report page."""

from medkit.reporting.compare_runs import compare, write_comparison
from medkit.reporting.model_card import write_card
from medkit.reporting.paper_claims import change_per_token, paper_table, tokens_per_problem
from medkit.reporting.report_page import write_report
from medkit.reporting.results import (
    from_bench,
    from_drift,
    from_ledger,
    from_manifests,
    from_records,
    from_steps,
    from_table,
    load_results,
    ratios,
    write_results,
)
from medkit.reporting.story import plot_story, tell_story
from medkit.reporting.tables import certificates_table, cost_table, run_tables, steps_table
from medkit.reporting.task_scores import write_tasks
from medkit.stage import STAGES
