"""Predictions → results: accuracy, paired comparisons, calibration, robustness, safety and cost."""

from medkit.evaluation.accuracy import chance, compare_steps, find_flips, judge, measure_accuracy
from medkit.evaluation.baselines import predict_baselines
from medkit.evaluation.calibration import add_confidence, measure_calibration, reliability, risk_coverage
from medkit.evaluation.energy import cost_table, meter
from medkit.evaluation.robustness import (
    ablation_table,
    answer_lengths,
    ensemble_line,
    letter_bias,
    prompt_range,
    shuffle_consistency,
    swap_drop,
    variance_components,
)
from medkit.evaluation.safety import load_probes, probe_questions, safe_shares, safety_steps, sample_probes
