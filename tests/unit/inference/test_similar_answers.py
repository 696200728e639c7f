"""Exact answers come back for exact requests alone; every rule edits what it should; the rates are counted by hand."""

import threading

import numpy as np
import pandas as pd
import pytest

from medkit import sources
from medkit.data import readers
from medkit.inference import similar_answers as rc
from medkit.modeling import embeddings
from medkit.params import load_params
from medkit.stage import ROOT
from medkit.statistics import wilson

# --- exact -----------------------------------------------------------------------------------------------------------

SETTINGS = {"max_new_tokens": 16, "end_ids": [2]}


def test_a_key_is_of_the_prompt_the_model_and_the_settings():
    key = rc.cache_key([1, 2, 3], "model", SETTINGS)
    assert key == rc.cache_key(np.array([1, 2, 3]), "model", {"end_ids": [2], "max_new_tokens": 16})
    others = [
        rc.cache_key([1, 2], "model", SETTINGS),
        rc.cache_key([3, 2, 1], "model", SETTINGS),
        rc.cache_key([12, 3], "model", SETTINGS),
        rc.cache_key([1, 2, 3], "another", SETTINGS),
        rc.cache_key([1, 2, 3], "model", SETTINGS | {"max_new_tokens": 17}),
        rc.cache_key([1, 2, 3], "model", SETTINGS | {"end_ids": []}),
    ]
    assert len({key, *others}) == 7


def test_only_the_same_key_hits_and_hits_are_counted():
    cache = rc.ResponseCache()
    assert cache.get("a") is None
    cache.put("a", (5, 6))
    assert cache.get("a") == [5, 6] and cache.get("b") is None
    assert (cache.hits, cache.misses, len(cache)) == (1, 2, 1)
    cache.put("a", [7])
    assert cache.get("a") == [7] and len(cache) == 1
    cache.put("empty", [])
    assert cache.get("empty") == []


def test_a_returned_answer_is_a_copy():
    cache, answer = rc.ResponseCache(), [1, 2]
    cache.put("a", answer)
    answer.append(3)
    cache.get("a").append(4)
    assert cache.get("a") == [1, 2]


def test_the_least_recently_used_goes_first():
    cache = rc.ResponseCache(max_answers=2)
    cache.put("a", [1])
    cache.put("b", [2])
    cache.get("a")
    cache.put("c", [3])
    assert cache.get("b") is None and cache.get("a") == [1] and cache.get("c") == [3] and len(cache) == 2


def test_a_cache_holds_at_least_one():
    with pytest.raises(ValueError, match="max_answers is 0"):
        rc.ResponseCache(0)


def test_many_threads_get_only_whole_answers_of_their_own_key():
    cache, wrong = rc.ResponseCache(max_answers=8), []

    def work(seed):
        draw = np.random.default_rng(seed)
        for number in draw.integers(16, size=500).tolist():
            found = cache.get(str(number))
            if found is None:
                cache.put(str(number), [number] * 50)
            elif found != [number] * 50:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(cache) == 8
    assert cache.hits + cache.misses == 8 * 500 and cache.hits > 0


# --- the score -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "shared"),
    [("Is it safe?", "is it SAFE", 1), ("is it safe", "is it not safe", 3 / 4), ("a b", "c", 0), ("?", "!", 1)],
)
def test_jaccard_of_words(a, b, shared):
    assert rc.jaccard(a, b) == rc.jaccard(b, a) == pytest.approx(shared)


def test_alpha_weighs_the_words():
    assert rc.similarity(0.2, 0.8, 1) == 0.2 and rc.similarity(0.2, 0.8, 0) == 0.8
    assert rc.similarity(0.2, 0.8, 0.25) == pytest.approx(0.65)
    assert rc.similarity(1, 1, 0.3) == pytest.approx(1)
    with pytest.raises(ValueError, match=r"alpha is 1\.5"):
        rc.similarity(1, 1, 1.5)


# --- rules -----------------------------------------------------------------------------------------------------------


def edited(text, kind):
    """What the rules of one kind make of a text."""
    rules = [*rc.open_rules(), *rc.EXAM_RULES]
    return {new for rule in rules if rule.kind == kind and (new := rc.edit(text, rule))}


@pytest.mark.parametrize(
    ("kind", "text", "new"),
    [
        ("same: wording", "What is shingles?", "What's shingles?"),
        ("same: wording", "Is vasculitis serious?", "How serious is vasculitis?"),
        ("same: spelling", "How do you cure Oedema?", "How do you cure Edema?"),
        ("same: synonym", "signs of a heart attack", "signs of a myocardial infarction"),
        ("same: brand name", "what is Coumadin", "what is Warfarin"),
        ("same: brand name", "why take simvastatin", "why take zocor"),
        ("another drug", "how to come off citalopram", "how to come off tramadol"),
        ("another drug", "how to come off celexa", "how to come off tramadol"),
        ("another person", "Is rubella serious in adults?", "Is rubella serious in children?"),
        ("another person", "what is the dose of ibuprofen", "what is the dose of ibuprofen for a child?"),
        ("another person", "can you take ultram with tea ?", "can you take ultram with tea during pregnancy?"),
        ("another person", "A 45-year-old man", "A 4-year-old man"),
        ("negation", "Is it safe to stop?", "Is it dangerous to stop?"),
        ("negation", "What happens if it is left untreated?", "What happens if it is treated?"),
        ("negation", "what pills are not compatible", "what pills are compatible"),
        ("direction", "how to stop taking xanax", "how to start taking xanax"),
        ("direction", "Signs of hypoglycemia", "Signs of hyperglycemia"),
        ("dose", "is 600mg strong", "is 6000mg strong"),
        ("dose", "is 600mg strong", "is 60mg strong"),
        ("another form", "Is acute pancreatitis serious?", "Is chronic pancreatitis serious?"),
        ("something else asked", "What causes acne?", "What cures acne?"),
        (
            "exam: most, least",
            "He coughs. What is the most likely cause?",
            "He coughs. What is the least likely cause?",
        ),
    ],
)
def test_a_rule_edits(kind, text, new):
    assert new in edited(text, kind)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("same: wording", "Is glaucoma very serious?"),
        ("same: spelling", "What is oedema vs edema?"),
        ("same: synonym", "What causes intracranial hypertension?"),
        ("same: synonym", "influenzae type b"),
        ("another drug", "are there metformins"),
        ("another person", "Can a childhood illness return?"),
        ("another person", "what is the dose of ibuprofen in pregnancy"),
        ("another person", "A 105-year-old patient"),
        ("negation", "Is the unsafe one abnormally large?"),
        ("negation", "What is the difference between normal and abnormal?"),
        ("direction", "How to follow a highly allowed diet"),
        ("direction", "What is the difference between hyperthyroidism and overactive thyroid?"),
        ("direction", "Is pulmonary hypertension serious?"),
        ("dose", "jalyn 0.5-0.4 mg"),
        ("dose", "How old is 40?"),
        ("dose", "50,000 IUs"),
        ("another form", "What's difference between Type 1 and 2 diabetes?"),
        ("exam: most, least", "He has most likely flu. What is to be done?"),
    ],
)
def test_a_rule_leaves_alone(kind, text):
    assert edited(text, kind) == set()


def test_a_brand_is_not_two_drugs():
    generic, brand, _ = map(list, zip(*rc.DRUGS, strict=True))
    assert len({*generic, *brand}) == len(generic) + len(brand)
    assert all(b != c != a for a, b, c in rc.DRUGS)


def questions(*texts):
    return pd.DataFrame({"id": [f"q{i}" for i in range(len(texts))], "question": texts})


def test_edits_are_drawn_alike_in_any_order_and_up_to_a_number():
    table = questions(*(f"Is disease number {i} acute and high, not low?" for i in range(30)))
    rules = [rule for rule in rc.open_rules() if rule.kind in ("another form", "negation")]
    drawn = rc.draw_edits(rc.make_edits(table, rules), per_rule=4, per_kind=3)
    assert drawn.kind.value_counts().to_dict() == {"another form": 3}
    again = rc.draw_edits(rc.make_edits(table.sample(frac=1, random_state=1), rules), per_rule=4, per_kind=3)
    pd.testing.assert_frame_equal(drawn, again)
    assert len(rc.draw_edits(rc.make_edits(table, rules), per_rule=2, per_kind=3)) == 2


def test_a_brand_pair_is_kept_only_if_every_change_is_known():
    swaps = [
        ("He takes warfarin.", "He takes coumadin."),
        ("He takes warfarin and lisinopril.", "He takes coumadin and zestoretic."),  # holds a second drug
        ("He takes warfarin.", "He takes warfarin."),
        ("He breathes oxygen.", "He breathes vancocin."),
    ]
    table = pd.DataFrame(swaps, columns=["question", "question_swapped"]).assign(id=list("abcd"))
    kept = rc.brand_pairs(table)
    assert kept.id.tolist() == ["a"] and kept.other.tolist() == ["warfarin → coumadin"]


# --- verdicts --------------------------------------------------------------------------------------------------------


def test_the_verdicts_are_whole():
    read = pd.read_csv(rc.VERDICT_FILE, keep_default_na=False)
    assert read.pair.is_unique and set(read.verdict) == {"same", "different", "unclear"}
    assert set(read.drawn) == {"rule", "random", "near"}
    assert set(read.kind[read.drawn == "rule"]) == {r.kind for r in [*rc.open_rules(), *rc.EXAM_RULES]} | {
        rc.EXAM_BRANDS
    }
    assert (read.drawn == "random").sum() + (read.drawn == "near").sum() == (read.other != "").sum()


def test_a_pair_that_nobody_read_is_missing():
    nobody = pd.DataFrame(columns=["id", "question", "question_swapped"], dtype=str)
    unread = rc.study_pairs(questions("Is acute gout serious?"), nobody)
    assert unread.empty and set(rc.PAIR_COLUMNS) <= set(unread.columns)


# --- rates, by hand --------------------------------------------------------------------------------------------------


def by_hand():
    """At α = ½ the edits are .9 and .7 alike where the answer is the same, .9, .8 and .5 where it is not."""
    rows = [
        ("same: a", "rule", "same", 1.0, 0.8, 0),
        ("same: a", "rule", "same", 0.6, 0.8, 0),
        ("b", "rule", "different", 0.9, 0.9, 0),
        ("b", "rule", "different", 0.7, 0.9, 0),
        ("c", "rule", "different", 0.4, 0.6, 0),
        (rc.REAL_SAME, "near", "same", 0.8, 0.8, 2),
        (rc.REAL_OTHER, "near", "different", 0.8, 0.8, 1),
        (rc.REAL_OTHER, "random", "different", 0.72, 0.8, 1),
        (rc.REAL_SAME, "random", "same", 0.9, 0.9, 1),
    ]
    table = pd.DataFrame(rows, columns=["kind", "drawn", "verdict", "jaccard", "cosine", "lookups"])
    return table.assign(same_answer=table.verdict == "same")


def rate(table, measure, kind, threshold):
    row = table[(table.measure == measure) & (table.kind == kind) & np.isclose(table.threshold, threshold)]
    return (row.rate.item(), row.n.item()) if len(row) else None


def test_rates_of_a_table_worked_by_hand():
    table = rc.rates(by_hand(), [0.6, 0.75, 0.95], [0.5], 0.95)
    assert rate(table, "hit_rate", "same: a", 0.6) == (1, 2) and rate(table, "hit_rate", "same: a", 0.75) == (0.5, 2)
    assert rate(table, "wrong_rate", "b", 0.75) == (1, 2) and rate(table, "wrong_rate", "c", 0.6) == (0, 1)
    assert rate(table, "wrong_rate", rc.ALL_EDITS, 0.6) == (pytest.approx(2 / 3), 3)
    assert rate(table, "wrong_share", rc.ALL_EDITS, 0.6) == (0.5, 4)
    assert rate(table, "wrong_share", rc.ALL_EDITS, 0.75) == (pytest.approx(2 / 3), 3)
    assert rate(table, "wrong_share", rc.ALL_EDITS, 0.95) is None  # nothing is served
    assert rate(table, "wrong_rate", rc.REAL_OTHER, 0.75) == (1, 1)  # the near ones are no sample
    row = table[(table.measure == "wrong_share") & (table.threshold == 0.75)].iloc[0]
    assert (row.ci_low, row.ci_high) == pytest.approx(wilson(2, 3, 0.95))


def test_lookups_count_questions_and_pairs():
    table = rc.lookups(by_hand(), [0.75, 0.8], questions=20, confidence=0.95).set_index("threshold")
    assert table.n.tolist() == [4, 3]
    assert table.hit_rate.tolist() == pytest.approx([5 / 20, 4 / 20])
    assert table.wrong_share.tolist() == pytest.approx([2 / 4, 1 / 3])
    with pytest.raises(ValueError, match="only a sample"):
        rc.lookups(by_hand(), [0.5], 20, 0.95)


def test_the_best_threshold_says_what_it_costs():
    pairs = by_hand()
    table = rc.rates(pairs, [0.6, 0.75, 0.85, 0.95], [0.5], 0.95)
    (strict,) = rc.best_thresholds(table, pairs, 0.1).itertuples()
    assert (strict.threshold, strict.hit_rate, strict.worst_rate) == (0.95, 0, 0)
    (lax,) = rc.best_thresholds(table, pairs, 0.4).itertuples()
    assert (lax.threshold, lax.hit_rate, lax.worst_kind, lax.worst_rate) == (0.85, 0.5, "b", 0.5)
    assert lax.auc_edits == pytest.approx((0.5 + 1 + 1 + 0 + 0 + 1) / 6)  # of 2 × 3 comparisons; a tie counts half
    (none,) = rc.best_thresholds(table[table.threshold < 0.8], pairs, 0.1).itertuples()
    assert np.isnan(none.threshold) and np.isnan(none.hit_rate)


def test_pairs_are_measured_and_the_unclear_left_out():
    texts = ["is it safe", "is it dangerous", "is it not"]
    vectors = np.array([[1, 0], [0.6, 0.8], [0, 1]], np.float32)
    rows = [(0, 1, "x", "different"), (1, 2, "x", "unclear"), (0, 2, "x", "same"), (0, 0, "same: y", "same")]
    pairs = pd.DataFrame(
        [(texts[a], texts[b], kind, verdict, "rule") for a, b, kind, verdict in rows],
        columns=["text_a", "text_b", "kind", "verdict", "drawn"],
    )
    found = rc.measured_pairs(pairs, texts, vectors)
    assert found.kind.tolist() == ["x", "same: y"] and found.same_answer.tolist() == [False, True]
    assert found.cosine.tolist() == pytest.approx([0.6, 1]) and found.jaccard.tolist() == pytest.approx([0.5, 1])


# --- the real pairs --------------------------------------------------------------------------------------------------


@pytest.mark.weights
def test_one_word_makes_another_question_and_the_real_encoder_hardly_sees_it():
    params = load_params(ROOT / "params" / "smoke.yaml")
    asked, _ = readers.read_open_questions(sources.fetch(params.data.open_questions))
    drugs, _ = readers.read_drug_pairs(sources.fetch(params.data.drug_pairs))
    pairs = rc.study_pairs(asked, drugs)
    assert set(pairs.pair) == set(pd.read_csv(rc.VERDICT_FILE).pair)  # every verdict still has its pair
    some = pairs[pairs.kind.isin(["negation", "same: synonym"])]
    texts = sorted({*some.text_a, *some.text_b})
    vectors = embeddings.embed_texts(embeddings.load_embedder(sources.fetch(params.models.embedder), "cpu"), texts)
    mean = rc.measured_pairs(some, texts, vectors).groupby("kind").cosine.mean()
    assert mean["negation"] > 0.9 > mean["same: synonym"]
