"""What the rules find and what they must leave, and where it stands in the tokens."""

import torch

from medkit.distillation import entities
from medkit.modeling import batches
from medkit.modeling.batches import Example

# [[…]] marks what must be found, and nothing else may be
TABLE = """
dose             | Give [[5 mg]] now.
dose             | It was [[0.5 mg/kg/day]] in two doses
dose             | [[10 mg per kg per day]] of it
dose             | at most [[4 g per day]], not more
dose             | a [[100-mg]] capsule
dose             | [[5-10 mg]] is usual
dose             | [[5 to 10 mg daily]] is usual
dose             | [[325 mg every 4 to 6 hours]], and then
dose             | [[40 mg twice daily]]
dose             | [[250 mg, three times a day]] for a week
dose             | [[1,000 units]] under the skin
dose             | [[5,000 IU every 12 hours]]
dose             | [[20 mcg/kg/min]] by pump
dose             | [[75 mg/m2]]
dose             | [[40 mEq]] of it
dose             | [[two tablets]] at noon
dose             | [[2 puffs q6h]] and rest
dose             | [[1/2 tablet]]
dose             | [[500 mg b.i.d]]. Then stop.
-                | for 5 years
-                | a 5 year old boy who weighs 20 kg
-                | 5 cm below the rib, 10 mm wide
-                | blood pressure 120/80 mmHg
-                | a glucose of 140 mg/dL
-                | sodium 135-145 mmol/L
-                | a calcium of 10 mg per dL, hemoglobin 9 g/dl
-                | a clearance of 60 mL/min
-                | 10 mg/mL in the vial
-                | an 18 G needle
-                | two days, three weeks, 24 hours
-                | low birth weight, 750-999 grams
-                | the tablet, some drops
contraindication | It is [[not contraindicated]] here.
contraindication | [[Absolutely contraindicated]] in asthmatics
contraindication | There are [[no known contraindications]].
contraindication | She [[should not be used]] to it
contraindication | You [[shouldn't use]] it
contraindication | It [[must never be given]] to infants
contraindication | [[never combined]] with that
contraindication | It is[[n't safe]] in pregnancy
contraindication | This [[should be avoided]], too
contraindication | It [[should be withheld]] before surgery
-                | You should take it with food
-                | It is recommended, indicated and safe
-                | Do not worry, it does not hurt
-                | an avoidant personality, unavoidable
-                | Take it when it is used up
drug             | [[aspirin]] or [[Metformin]]
drug             | [[LISINOPRIL]] and [[lorazepam]]
drug             | [[ceftriaxone]], [[cephalexin]], [[Lipitor]]
drug             | [[magnesium sulfate]] in labour
drug             | [[adalimumab]], [[imatinib]], [[oseltamivir]]
-                | In April the patrol was in control
-                | cholesterol, histidine, alcohol and sterol
-                | a cephalic vein, acetone, hormones
diagnosis        | [[acute pancreatitis]] and [[anemia]]
diagnosis        | [[Type 2 diabetes]] with [[nephropathy]]
diagnosis        | code [[E11.9]] and [[ICD-10-CM code A00]]
diagnosis        | Other [[disorders]] of bone: [[osteomyelitis]]
diagnosis        | a [[fracture]] of the neck, a [[neuroblastoma]]
diagnosis        | [[hypokalemia]], [[hematuria]], [[hemiplegia]]
-                | The diagnosis and the prognosis
-                | Mitosis, meiosis and osmosis in academia
-                | vitamin B12, room C10, T12 vertebra
-                | the aroma of a diploma
drug dose        | [[warfarin]] [[5 mg daily]]
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


def told(tokenizer, example, span):
    return tokenizer.decode(example.input_ids[example.loss_start + span[0] : example.loss_start + span[1]])


def test_spans_hold_the_tokens_of_an_entity(tokenizer):
    texts = ["Give 5 mg of aspirin", "Take it", "Ampicillin 250 mg/kg/day is contraindicated in colitis"]
    examples = [predict(tokenizer, text) for text in texts]
    marked = entities.mark_entities(tokenizer, examples)
    assert marked.num_predicted == [e.num_predicted for e in examples]
    found = [
        [told(tokenizer, e, span).strip() for span in spans] for e, spans in zip(examples, marked.spans, strict=True)
    ]
    assert found == [["5 mg", "aspirin"], [], ["Ampicillin", "250 mg/kg/day", "contraindicated", "colitis"]]
    assert [weight for *_, weight in marked.spans[2]] == [
        entities.WEIGHTS[k] for k in ("drug", "dose", "contraindication", "diagnosis")
    ]


def test_spans_are_right_where_the_text_gives_other_tokens(tokenizer):
    """A teacher may write a word in letters; its text is then tokenised otherwise."""
    letters = [token for letter in "aspirin" for token in tokenizer(letter).input_ids]
    assert letters != tokenizer("aspirin").input_ids
    example = Example([5, *tokenizer("µ take ").input_ids, *letters, *tokenizer(" 5 µg").input_ids, 2], 1)
    marked = entities.mark_entities(tokenizer, [example])
    assert [told(tokenizer, example, span).strip() for span in marked.spans[0]] == ["aspirin", "5 µg"]


def test_no_token_belongs_to_two():
    spans = entities._token_spans("5 mg aspirin", [(0, 2), (2, 6), (6, 12)])  # "5 " "mg a" "spirin"
    assert spans == [(0, 2, 2.0), (2, 3, 1.0)]


def test_a_batch_numbers_its_entities_in_the_order_of_its_positions(tokenizer):
    texts = ["Give 5 mg of aspirin", "Take it", "aspirin", "colitis, and asthma"]
    examples = [predict(tokenizer, text) for text in texts]
    marked = entities.mark_entities(tokenizer, examples)
    rows = [3, 1, 0]
    batch = marked.batch(rows)
    targets = batches.pack([examples[n] for n in rows])["labels"]
    assert batch["entity"].shape == targets.shape and batch["entity"].dtype == torch.int64
    found = [tokenizer.decode(targets[batch["entity"] == n]).strip() for n in range(len(batch["entity_weights"]))]
    assert found == ["colitis", "asthma", "5 mg", "aspirin"]
    assert batch["entity_weights"].tolist() == [1.0, 1.0, 2.0, 1.0]
    assert (batch["entity"] == -1).sum() == len(targets) - sum(b - a for n in rows for a, b, _ in marked.spans[n])
    batch = marked.batch([1])
    assert (batch["entity"] == -1).all() and batch["entity_weights"].shape == (0,)


def test_density_is_the_share_of_predicted_tokens():
    marked = entities.Entities([[(0, 2, 1.0), (3, 4, 2.0)], []], [6, 5])
    assert marked.densities() == [0.5, 0.0]
