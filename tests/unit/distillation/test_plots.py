"""The tables behind notebook 02's figures."""

import numpy as np
import pandas as pd
import pytest

from medkit.distillation import plots


def test_means_and_shares_are_by_task_and_the_order_of_the_questions_does_not_matter():
    draw, rates = np.random.default_rng(0), {"teacher": 0.9, "base": 0.2, "student_ce": 0.5, "student_kd": 0.8}
    questions = pd.DataFrame({"source": ["icd"] * 200 + ["records"] * 200, "id": range(400)})
    questions["group"] = questions.id // 2
    right = {name: draw.random(400) < rate for name, rate in rates.items()}
    scores = {name: questions.assign(variant=name, score=values.astype(float)) for name, values in right.items()}
    _, means, shares = plots.plot_closing(scores, 0.95)
    assert means.variant.tolist() == [*scores] * 2 and shares.source.tolist() == ["icd", "records"]
    by_variant = means[means.source == "icd"].set_index("variant").score
    gap = by_variant.teacher - by_variant.student_ce
    assert shares.share[0] == pytest.approx((by_variant.student_kd - by_variant.student_ce) / gap)
    shuffled = {name: table.sample(frac=1, random_state=1) for name, table in scores.items()}
    _, _, again = plots.plot_closing(shuffled, 0.95)
    pd.testing.assert_frame_equal(again.sort_values("source", ignore_index=True), shares)
    scores["teacher"] = scores["student_ce"].assign(variant="teacher")
    fig, *_ = plots.plot_closing(scores, 0.95)
    assert {ax.get_title(loc="left") for ax in fig.axes} == {"no gap shown"}
