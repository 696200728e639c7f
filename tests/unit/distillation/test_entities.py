"""What the rules find and what they must leave, and where it stands in the tokens."""

import torch

from medkit.distillation import entities
from medkit.modeling import batches
from medkit.modeling.batches import Example

# [[…]] marks what must be found, all of one kind or of the kinds in their order, and nothing else may be
TABLE = """
dose             | It was [[0.5 mg/kg/day]] in two doses, [[10 mg per kg per day]] of it
dose             | at most [[4 g per day]], not more; a [[100-mg]] capsule
dose             | [[5-10 mg]] is usual, and [[5 to 10 mg daily]] too
dose             | [[325 mg every 4 to 6 hours]], and then [[250 mg, three times a day]] for a week
dose             | [[5,000 IU every 12 hours]] or [[20 mcg/kg/min]] by pump
dose             | [[two tablets]] at noon, [[2 puffs q6h]] and rest, then [[1/2 tablet]]
dose             | [[500 mg b.i.d]]. Then stop.
-                | a 5 year old boy who weighs 20 kg, 5 cm below the rib, 10 mm wide
-                | a glucose of 140 mg/dL, sodium 135-145 mmol/L, a calcium of 10 mg per dL, hemoglobin 9 g/dl
-                | a clearance of 60 mL/min, 10 mg/mL in the vial, an 18 G needle
-                | two days, three weeks, 24 hours; low birth weight, 750-999 grams; the tablet, some drops
contraindication | It is [[not contraindicated]] here. There are [[no known contraindications]].
contraindication | You [[shouldn't use]] it; it [[must never be given]] to infants, [[never combined]] with that
contraindication | It is[[n't safe]] in pregnancy. This [[should be avoided]], too, or [[should be withheld]]
-                | You should take it with food. It is recommended, indicated and safe.
-                | Do not worry, it does not hurt; an avoidant personality, unavoidable
drug             | [[aspirin]] or [[Metformin]], [[LISINOPRIL]] and [[lorazepam]], [[magnesium sulfate]] in labour
drug             | [[ceftriaxone]], [[cephalexin]], [[Lipitor]]
-                | In April the patrol was in control; a cephalic vein, acetone, hormones
-                | cholesterol, histidine, alcohol and sterol
diagnosis        | [[acute pancreatitis]] and [[anemia]], a [[fracture]] of the neck, a [[neuroblastoma]]
diagnosis        | [[Type 2 diabetes]] with [[nephropathy]], [[hypokalemia]], [[hematuria]], [[hemiplegia]]
diagnosis        | code [[E11.9]] and [[ICD-10-CM code A00]], other [[disorders]] of bone: [[osteomyelitis]]
-                | Mitosis, meiosis and osmosis in academia; vitamin B12, room C10, T12 vertebra
-                | the aroma of a diploma
contraindication drug | [[Avoid]] [[ibuprofen]]
dose drug contraindication diagnosis | [[81 mg]] of [[aspirin]] is [[contraindicated]] in active [[ulcers]]
"""


def test_rules_find_what_is_marked_and_nothing_else():
    for line in TABLE.strip().splitlines():
        kinds, marked = (part.strip() for part in line.split("|"))
        text = shown = marked.replace("[[", "").replace("]]", "")
        found = entities.find_entities(text)
        for entity in reversed(found):
            shown = f"{shown[: entity.start]}[[{text[entity.start : entity.end]}]]{shown[entity.end :]}"
        assert shown == marked
        kinds = [] if kinds == "-" else kinds.split()
        assert [entity.kind for entity in found] == (kinds * len(found) if len(kinds) == 1 else kinds), line


def predict(tokenizer, text, prompt="Question: "):
    given = tokenizer(prompt).input_ids
    return Example([*given, *tokenizer(text).input_ids, tokenizer.eos_token_id], len(given))


def test_spans_are_right_where_the_text_gives_other_tokens(tokenizer):
    """A teacher may write a word in letters; its text is then tokenised otherwise."""
    letters = [token for letter in "aspirin" for token in tokenizer(letter).input_ids]
    assert letters != tokenizer("aspirin").input_ids
    example = Example([5, *tokenizer("µ take ").input_ids, *letters, *tokenizer(" 5 µg").input_ids, 2], 1)
    (spans,) = entities.mark_entities(tokenizer, [example]).spans
    found = [tokenizer.decode(example.input_ids[1 + first : 1 + last]).strip() for first, last, _ in spans]
    assert found == ["aspirin", "5 µg"]


def test_no_token_belongs_to_two():
    spans = entities._token_spans("5 mg aspirin", [(0, 2), (2, 6), (6, 12)])  # "5 " "mg a" "spirin"
    assert spans == [(0, 2, 2.0), (2, 3, 1.0)]


def test_a_batch_numbers_its_entities_in_the_order_of_its_positions(tokenizer):
    texts = ["Give 5 mg of aspirin", "Take it", "aspirin", "Ampicillin 250 mg/kg/day is contraindicated in colitis"]
    examples = [predict(tokenizer, text) for text in texts]
    marked = entities.mark_entities(tokenizer, examples)
    rows = [3, 1, 0]
    batch = marked.batch(rows)
    targets = batches.pack([examples[n] for n in rows])["labels"]
    assert batch["entity"].shape == targets.shape and batch["entity"].dtype == torch.int64
    found = [tokenizer.decode(targets[batch["entity"] == n]).strip() for n in range(len(batch["entity_weights"]))]
    assert found == ["Ampicillin", "250 mg/kg/day", "contraindicated", "colitis", "5 mg", "aspirin"]
    kinds = ("drug", "dose", "contraindication", "diagnosis", "dose", "drug")
    assert batch["entity_weights"].tolist() == [entities.WEIGHTS[kind] for kind in kinds]
    assert (batch["entity"] == -1).sum() == len(targets) - sum(b - a for n in rows for a, b, _ in marked.spans[n])
    batch = marked.batch([1])
    assert (batch["entity"] == -1).all() and batch["entity_weights"].shape == (0,)


def test_density_is_the_share_of_predicted_tokens():
    marked = entities.Entities([[(0, 2, 1.0), (3, 4, 2.0)], []], [6, 5])
    assert marked.densities() == [0.5, 0.0]
