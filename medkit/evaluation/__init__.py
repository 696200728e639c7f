"""Predictions → results: accuracy, paired comparisons, calibration, robustness, safety and cost."""

from medkit.evaluation.accuracy import (
    COMPRESSED,
    chance,
    compare_steps,
    find_flips,
    judge,
    measure_accuracy,
    measure_gaps,
)
from medkit.evaluation.baselines import predict_baselines, predict_by_rule, regex_baseline
from medkit.evaluation.calibration import add_confidence, least_confidence, measure_calibration, reliability
from medkit.evaluation.energy import cost_table, meter
from medkit.evaluation.perplexity import measure_perplexity
from medkit.evaluation.plots import plot_accuracies, plot_calibration, plot_safety, plot_steps
from medkit.evaluation.records import compare_records, measure_records, score_dialogues, score_questions, score_records
from medkit.evaluation.robustness import letter_bias, shuffle_consistency
from medkit.evaluation.safety import load_probes, probe_questions, safe_shares
