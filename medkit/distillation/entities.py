"""Medical entities in answers: doses, drugs, diagnoses and contraindications, found by regular expressions.

There is no model and no list of all drugs. A drug is a name from `drug_names.csv` or a name with a stem of the WHO's
international nonproprietary names ("The use of stems in the selection of INN", 2018). A diagnosis has an ICD-10-CM
code, a head noun or a medical suffix. The rules miss some entities and find few wrong ones; they only set weights of
the loss.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pandas as pd
import torch

from medkit.modeling.batches import Example

Kind = Literal["dose", "contraindication", "drug", "diagnosis"]
WEIGHTS: dict[Kind, float] = {"dose": 2.0, "contraindication": 2.0, "drug": 1.0, "diagnosis": 1.0}
"""The paper gives doses and contraindications more weight but prints no numbers; these are our choice."""


def _any(words: str) -> str:
    """One of the words, each a regular expression with _ for a space."""
    return f"(?:{'|'.join(words.split()).replace('_', ' ')})"


_NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?"
_COUNT = rf"(?:{_NUMBER}|{_any('one two three four half_an?')})"
_UNIT = _any("mgs? milligrams? mcg µg μg ug micrograms? (?-i:g) grams? ml millilit(?:er|re)s? iu units? meq mmol")
_FORM = _any("tablets? capsules? puffs? drops? pills? teaspoons? tablespoons? sprays? ampoules? vials? patch(?:es)?")
_CONCENTRATION = r"(?! ?/ ?(?:dl|l|ml|min)\b| per (?:dl|l|ml|lit(?:er|re)|minute)\b)"
_BIRTH_WEIGHT = r"\d{3,4}(?:-\d{3,4})? grams?\b"
_RATE = rf"(?:(?: ?/ ?| per | an? ){_any('kg m2 m² day d dose h hr hour min minute week')}\b)"
_EVERY = _any("hours? days? weeks? morning evening night")
_OFTEN = _any(rf"""
    (?:once|twice|(?:one|two|three|four|\d)_times)_(?:an?_|per_)?(?:day|daily|week|weekly) daily weekly at_bedtime
    every_(?:\d+_|\d+_?(?:-|–|to)_?\d+_)?{_EVERY} q\d+h b\.?i\.?d t\.?i\.?d q\.?i\.?d""")
_DOSE = (
    rf"(?<![\w.,/-])(?!{_BIRTH_WEIGHT})"
    rf"(?:(?:{_NUMBER}(?: ?{_UNIT})?(?: ?[-–] ?| to ))?{_NUMBER}[ -]?{_UNIT}"
    rf"|(?:{_COUNT}(?:[-–]| to | or ))?{_COUNT} {_FORM})\b{_CONCENTRATION}{_RATE}{{0,2}}(?:,? {_OFTEN}\b)?"
)

_NOT = r"(?:not|never|no longer)"
_DONE = _any("taken? used? using given? prescribed? administer(?:ed)? combined? mixed? receive start(?:ed)?")
_ADVISED = _any("recommended advised advisable indicated safe suitable appropriate")
_CONTRAINDICATION = "|".join(
    [
        rf"\b(?:{_NOT} |no (?:known |absolute )?)?(?:absolutely |relatively |strictly )?contra-?indicat\w*",
        rf"\b{_any('do does should must may can could')}(?: {_NOT}|n['’]t|not) (?:\w+ly )?(?:be )?(?:\w+ly )?{_DONE}\b",
        rf"\bnever (?:be )?{_DONE}\b",
        rf"(?:\b{_NOT}|n['’]t) (?:be )?(?:generally |usually )?{_ADVISED}\b",
        r"\b(?:(?:should|must) be )?avoid(?:ed|ing|s)?\b",
        r"\bshould be (?:stopped|discontinued|withheld)\b",
        r"\bunsafe\b",
    ]
)

_NO_STEM = """
    aspirin paracetamol heparin epinephrine adrenaline atropine theophylline nitroprusside hydralazine fentanyl ketamine
    oxycodone naloxone isoniazid rifampin rifampicin pyrazinamide ethambutol dapsone quinine quinidine mannitol
    valproate magnesium_sulfate activated_charcoal nitrofurantoin cyclophosphamide vincristine clozapine linezolid
    amphotericin chloramphenicol penicillamine deferoxamine"""
# generic names, brand names, and the drugs that they are mistaken for
_KNOWN = pd.read_csv(Path(__file__).with_name("drug_names.csv"))
_NAMES = " ".join(name for names in _KNOWN.to_numpy().tolist() for name in names if name != "caffeine")
_STEMS = _any("""
    pril prilat sartan olol vastatin cillin mycin micin floxacin conazole nidazole prazole tidine dipine gliptin
    gliflozin glutide glitazone tinib ciclib parib zumab ximab umab vir oxaban parin gatran triptan setron azepam zolam
    barbital caine thiazide semide lukast dronate profen oxicam coxib asone olone isone (?<!s)terol tropium phylline
    oxetine triptyline pramine peridol peridone racetam cycline platin taxel rubicin fibrate bendazole""")
_DRUG = rf"\b(?!histidine\b)(?:{_any(_NO_STEM)}|{_any(_NAMES)}|[a-z]{{3,}}{_STEMS}|cef[a-z]{{4,}})\b"

_CODE = r"(?-i:[A-TV-Z]\d[0-9AB])"
_HEADS = _any("""
    diseases? disorders? syndromes? fractures? neoplasms? cancers? infections? injur(?:y|ies) burns? ulcers? strokes?
    abscess(?:es)? aneurysms? hernias? poisoning hypertension diabetes pneumonia asthma tuberculosis sepsis embolism
    infarction deficiency stenosis epilepsy migraine measles malaria gout cataract glaucoma dementia hemophilia""")
_NO_DIAGNOSIS = _any("""
    diagnosis prognosis mitosis meiosis apoptosis phagocytosis endocytosis exocytosis osmosis symbiosis hypnosis
    academia nostalgia homeopathy osteopathy""")
_SUFFIXES = _any("itis osis a?emia opathy omegaly algia plegia paresis penia pnea [^aeo]uria")
_TUMOURS = _any("carcinoma sarcoma lymphoma myeloma melanoma blastoma glioma adenoma lipoma hepatoma seminoma thymoma")
_DIAGNOSIS = "|".join(
    [
        rf"\b{_CODE}\.[0-9a-z]{{1,4}}\b",
        rf"\bicd-10(?:-cm)? (?:codes? )?{_CODE}\b",
        rf"\b(?:{_any('acute chronic type_1 type_2')} )?(?!{_NO_DIAGNOSIS}\b)"
        rf"(?:[a-z]{{2,}}{_SUFFIXES}|[a-z]*{_TUMOURS}|{_HEADS})\b",
    ]
)
_RULES: dict[Kind, re.Pattern] = {
    "dose": re.compile(_DOSE, re.IGNORECASE),
    "contraindication": re.compile(_CONTRAINDICATION, re.IGNORECASE),
    "drug": re.compile(_DRUG, re.IGNORECASE),
    "diagnosis": re.compile(_DIAGNOSIS, re.IGNORECASE),
}


@dataclass(frozen=True)
class Entity:
    """The characters from `start` to before `end` of a text."""

    kind: Kind
    start: int
    end: int


def find_entities(text: str) -> list[Entity]:
    """The entities of a text from left to right; of two that overlap the one that begins first, then the longer."""
    matches = [Entity(kind, *match.span()) for kind, rule in _RULES.items() for match in rule.finditer(text)]
    entities: list[Entity] = []
    for entity in sorted(matches, key=lambda e: (e.start, -e.end)):
        if not entities or entity.start >= entities[-1].end:
            entities.append(entity)
    return entities


@dataclass(frozen=True)
class Entities:
    """The entities in the predicted tokens of some examples."""

    spans: list[list[tuple[int, int, float]]]
    """Per example: first and last + 1 of an entity's tokens, counted from `loss_start`, and its weight. No overlaps."""
    num_predicted: list[int]

    def batch(self, numbers: list[int]) -> dict[str, torch.Tensor]:
        """`entity` (N,): number in this batch of the entity at a labelled position, or −1; `entity_weights` (E,)."""
        entity, weights, start = torch.full((sum(self.num_predicted[n] for n in numbers),), -1), [], 0
        for number in numbers:
            for first, last, weight in self.spans[number]:
                entity[start + first : start + last] = len(weights)
                weights.append(weight)
            start += self.num_predicted[number]
        return {"entity": entity, "entity_weights": torch.tensor(weights, dtype=torch.float32)}

    def densities(self) -> list[float]:
        """The share of each example's predicted tokens that belong to an entity."""
        inside = [sum(last - first for first, last, _ in spans) for spans in self.spans]
        return [tokens / count for tokens, count in zip(inside, self.num_predicted, strict=True)]


def mark_entities(tokenizer, examples: Sequence[Example]) -> Entities:
    """The entities in the text that each example predicts. A token belongs to the first entity that it overlaps.

    Needs a fast tokenizer, for its offsets.
    """
    answers = [example.input_ids[example.loss_start :] for example in examples]
    texts = [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in answers]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    spans = []
    for ids, text, new_ids, offsets in zip(answers, texts, encoded.input_ids, encoded.offset_mapping, strict=True):
        if new_ids != ids:  # the text is tokenized in another way: take the offsets from the length of each prefix
            ends = [len(tokenizer.decode(ids[:n], clean_up_tokenization_spaces=False)) for n in range(len(ids) + 1)]
            offsets = list(pairwise(ends))
        spans.append(_token_spans(text, offsets))
    return Entities(spans, [len(ids) for ids in answers])


def _token_spans(text: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int, float]]:
    spans, free = [], 0
    for entity in find_entities(text):
        tokens = [
            n for n, (start, end) in enumerate(offsets) if n >= free and start < entity.end and end > entity.start
        ]
        if tokens:
            free = tokens[-1] + 1
            spans.append((tokens[0], free, WEIGHTS[entity.kind]))
    return spans
