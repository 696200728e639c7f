"""Rendering and reading back are one pair; what is not plainly said stays unread: a wrong guess is worse than none."""

import json
import re
import time

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from medkit.prompts.answer_parser import normalise, parse, parse_record
from medkit.prompts.templates import ABSTRACT, LETTER, LETTERS, TEMPLATES, TEXT, Record, answers

DRUGS = ["aspirin", "insulin", "metformin", "warfarin"]
GERMS = ["S. aureus", "C. difficile", "B. fragilis", "D. pneumoniae", "E. coli"]
VERDICTS = ["yes", "no", "maybe"]
A, B, C, D, E = range(5)


def question(*options: str, context: str = "") -> dict:
    return {"question": "Which one?", "context": context, "options": list(options)}


DECLARED = [
    # the letter alone, or with its option's text; what LEADS holds is not repeated here
    ("C)", C), ("[C]", C), ("C:", C), (" c \n", C), ("C: metformin", C),
    # a letter that is declared
    ("The answer is option C.", C), ("The answer is C because it is first-line.", C), ("Answer C", C), ("Option C", C),
    ("A patient like this should receive option C", C), ("Answer choice: C", C), ("The answer is the letter C.", C),
    ("So the answer is $C$.", C), ("The answer to this question is C.", C), ("The answer is clearly C.", C),
    ("The answer must be C.", C), ("I'd go with C.", C), ("The most appropriate next step in management is D.", D),
    ("We select C, since the kidneys are well.", C), ("answer: a", A), ("the answer is a.", A),
    # Markdown, tags, signs, width
    ("**C.** metformin", C), ("### Answer\nC", C), ("**Answer**\n\nC) metformin", C), ("<answer>C</answer>", C),
    # a verdict
    ("(C) is correct because it lowers glucose.", C), ("Option C is right.", C), ("Thus C is the best choice.", C),
    ("Option C (metformin) is correct.", C), ("A is wrong, C is right", C),
    ("Neither A nor B is correct; C is correct.", C),
    # the letter, its option's text and more
    ("The correct option is (C) metformin", C), ("The correct answer is:\n\nC. Metformin", C),
    ("The answer is C (metformin).", C), ("Answer: C – metformin", C),
    ("C. Metformin is the first drug to try in type 2 diabetes.", C),
    ("Answer: C\n\nA. Aspirin treats pain.\nB. Insulin comes later.", C),
    # the option's text in a sentence
    ("Metformin, because the kidneys are well.", C), ("I would choose metformin.", C),
    ("The answer is “metformin”.", C), ("The answer is metformin, which lowers glucose.", C),
    # other languages, where a colon or an "is" declares the letter
    ("正确答案：C。因为它有效。", C), ("La respuesta correcta es C.", C), ("Réponse : C", C), ("Antwort: C", C),
    # reasons that name other letters
    ("The answer is C. A is too weak and B acts too fast.", C),
    ("A is not correct. B is incorrect. The answer is C.", C),
    ("C is not a symptom of diabetes, so the answer is C.", C),  # a question may ask for the exception
    ("If he bled, the answer would be D. The answer is C.", C),
    # one thing and not another
    ("C, not A", C), ("The answer is C, rather than A.", C),
    # a final answer or a box counts alone
    ("At first the answer is A. Final answer: C", C), ("The answer is A. No, wait.\n\n**Final answer:** (C)", C),
    # boxes in LaTeX, ends of turns, what a server adds
    (r"\boxed{C. \text{metformin}}", C), ("The answer is C.<|eot_id|>", C), ("metformin</s>", C),
    ("C<|im_end|>\n<|im_start|>user\nIs it A?", C), ("So A? No.\n\nThe answer is \\boxed{C}", C),
    ("The answer is A. <answer>C</answer> The answer is B.", C),
    ("analysisWe need one. The answer is A.assistantfinalThe answer is C.", C),  # gpt-oss without its special tokens
]  # fmt: skip

UNDECLARED = [
    "", " \n", ".", "maybe", "yes", "I do not know.", "none of these",
    # letters that are words, or parts of them
    "A patient with a rash should see a doctor.", "I think it is an infection.", "I", "The answer is a beta blocker.",
    "Answer: a low dose of aspirin", "The answer is I think unclear", "The best step is D-dimer testing.",
    "The answer is vitamin C deficiency", "Give vitamin C.", "Vitamin C", "Vitamin C is the best choice.", "D-dimer",
    "E. coli", "The answer is insulin glargine.", "Metformin lowers glucose.", "The answer is A1c measurement.",
    "The answer is C. difficile infection.", "The answer isn't clear",
    # several, or one that is not there
    "A, B", "A and C", "A/B", "A B C D", "Both A and C are correct.", "Either option A or option C is correct.",
    "The answer is C as well as D.", "Answer: C. Metformin or warfarin", "The answer is (A) or (B).", "Answer: A & B",
    "The answer is A. On reflection the answer is B.", r"\boxed{A} or \boxed{B}", r"\boxed{A, B}", r"\boxed{}", "E",
    "Answer: E", r"\boxed{F}", "AB",
    # the letter says one thing and the words another
    "C. aspirin", "C. Gliclazide", "The answer is C. Insulin glargine.", "The answer is C. Sodium bicarbonate.",
    "A metformin", "Answer: C. aspirin", "The answer is (A) metformin.",
    # denied
    "Not B.", "The answer is not option B.", "Anything except C.", "Do not choose option B.", "Never select option A.",
    "You shouldn't pick option D.", "The incorrect answer is B.", "I don't think the answer is C.",
    "It is not true that C is correct.", "C is not correct.", "C is wrong.", "The answer is C. C is wrong.",
    "Neither option A nor option C is correct.", "The answer is C. On reflection: never C.", "Not A. But B",
    # asked, supposed, half said
    "Is the answer C?", "The answer is C?", "If the patient were pregnant, the answer would be C.",
    "Unless he bleeds, D is correct.", "You might think that C is correct.", "C is correct only in children.",
    "C is correct, but D is better.", "The answer is a", "The answer is metformin or",  # cut off
    # final, and not one choice
    "The answer is A. Final answer: A or C.", "Final answer: A. Final answer: C.",
    # a list
    "A. aspirin\nB. insulin\nC. metformin\nD. warfarin",
    "A. Aspirin is too weak.\nB. Insulin comes later.\nC. Metformin is the first to try.",
    "Answer:\nA. aspirin\nB. insulin", "Answer: A\nB", "Answer: A\nC", "aspirin\ninsulin",
    "C\n\nQuestion: What else?\nAnswer: B",  # a base model that goes on
    # refused
    "I'm sorry, but I can't help with that. A doctor can.", "not sure", "👍", "\U0001f170",  # a sign, a blood group
    # talked about, not given
    "Option A treats pain; option B treats type 1.", "C is a drug for diabetes", "metformin or insulin",
    "Metformin is one of several drugs.", "The answer depends on A.", "Which answer? A, I guess, or C",
    "analysisWe need one. The answer is A.",  # a thought that has no end
    # digits and other scripts
    "3", "(3)", "The answer is 3.", "٣", "३", "３", "④", "\u0421",  # a Cyrillic С
    "\u0391", "답: 다",  # a Greek Α
]  # fmt: skip


VITAMINS = ["Folic acid 5 mg daily", "Vitamin C", "Folic anhydride", "pure", "not pure"]
SPECIES = ["Escherichia coli", "Klebsiella", "Proteus", "Candida", "None of these"]
NUMBERS = ["4", "-4"]
READ_ALIKE = ["insulin", "A. insulin"]
GROUPS = ["O", "A", "B", "AB"]
AMONG_OTHERS = [
    # names that begin like a letter are names
    ("E", GERMS, LETTER, E), ("C. difficile", GERMS, LETTER, B), ("C. Difficile", GERMS, LETTER, B),
    ("B. C. difficile", GERMS, LETTER, B), ("C. C. difficile", GERMS, LETTER, None),
    ("The answer is C. difficile, not S. aureus.", GERMS, LETTER, B),
    ("C. Difficile is the most common cause here.", GERMS, LETTER, None),
    ("The answer is E. Coli infection", GERMS, LETTER, None), ("S. aureus is the correct answer.", GERMS, LETTER, A),
    ("I would give nothing against E. coli", GERMS, LETTER, None),
    ("E. Coli is the most common cause here.", SPECIES, LETTER, None),
    ("E. Fungi are not the most common cause here.", SPECIES, LETTER, E),
    # letter and text agree, or nothing is read
    ("Vitamin C", VITAMINS, LETTER, B), ("Vitamin C is correct.", VITAMINS, LETTER, B),
    ("B. Vitamin C", VITAMINS, LETTER, B), ("C. Vitamin C", VITAMINS, LETTER, None),
    ("The answer is B. -4", VITAMINS, LETTER, None),
    ("The answer is not pure.", VITAMINS, LETTER, E),  # an option, no denial of D
    ("The water is not pure.", VITAMINS, LETTER, None), ("A. Folic acid", VITAMINS, LETTER, A),
    ("A. Folic", VITAMINS, LETTER, None),  # the beginning of one text, of two
    ("The answer is A. insulin.", READ_ALIKE, LETTER, None), ("B. -4", NUMBERS, LETTER, B),
    ("A. -4", NUMBERS, LETTER, None),
    # options that are letters themselves, as blood groups: the prompt asked for the letter before the option
    *((text.format("ABCD"[i]), GROUPS, LETTER, i) for i in range(4) for text in ("{}", "Answer: {}")),
    *((group, GROUPS, TEXT, i) for i, group in enumerate(GROUPS)), ("AB", GROUPS, LETTER, D),
    ("A. O", GROUPS, LETTER, A),
    # options that read alike, and nothing said
    *(("aspirin", ["Aspirin", "aspirin.", "insulin"], template, None) for template in (TEXT, LETTER)),
    *(("insulin", ["Aspirin", "aspirin.", "insulin"], template, 2) for template in (TEXT, LETTER)),
    *((text, ["*", "x"], template, None)
      for text in ("", " ", "*", "...", '""', "<think></think>") for template in (TEXT, LETTER)),
    # a letter means nothing where none was listed
    *((text, DRUGS, TEXT, None) for text in ("A", "C.", "(C)", "The answer is C.", r"\boxed{C}", "option C")),
    # yes, no, maybe: the first word counts, where no other verdict begins a sentence
    ("Yes, it does.", VERDICTS, ABSTRACT, 0), ("Yes because the trial was large.", VERDICTS, ABSTRACT, 0),
    ("No: the difference was small.", VERDICTS, ABSTRACT, 1), ("**Yes**, it does.", VERDICTS, ABSTRACT, 0),
    ("Maybe, but the trial was small.", VERDICTS, ABSTRACT, 2),
    *(
        (text, VERDICTS, ABSTRACT, None)
        for text in ("yes and no", "Yes, no", "Yes, but no.", "Yes. It works. No, it does not.", "not no", "maybe yes",
                     "It may be yes", "No difference was found.", "The answer is no longer clear.", "nothing")
    ),
]  # fmt: skip


def test_an_answer_is_read_if_and_only_if_it_is_declared():
    cases = [(text, DRUGS, LETTER, choice) for text, choice in [*DECLARED, *((text, None) for text in UNDECLARED)]]
    cases += AMONG_OTHERS
    choices = [parse(text, options, template) for text, options, template, _ in cases]
    wrong = [(case, choice) for case, choice in zip(cases, choices, strict=True) if case[-1] != choice]
    assert wrong == []


MARKS = [
    *((f"<{name}>", f"</{name}>") for name in ("think", "thinking", "thought", "reasoning")),
    ("[THINK]", "[/THINK]"),
    ("## Thinking\n", "\n## Final Response\n"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("<unused94>thought\n", "<unused95>"),
    ("<|begin_of_thought|>", "<|end_of_thought|><|begin_of_solution|>"),
]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.sampled_from(MARKS),
    st.lists(st.sampled_from(["The answer is A. ", r"\boxed{B}", "Final answer: B\n", *sum(MARKS, ())]), max_size=6),
)
def test_a_thought_is_never_read(marks, pieces):
    """Whatever marks of other families a thought holds; a chat template may have opened it in the prompt."""
    begin, end = marks
    thought = "\nHm. ".join(piece for piece in pieces if piece not in marks)
    for answer in ("C", "The answer is (C).", "metformin<|eot_id|>"):
        assert parse(f"{begin}{thought}{end}{answer}", DRUGS, LETTER) == C
    assert parse(f"{begin}{thought}", DRUGS, LETTER) is None  # what is unclosed is unread
    assert parse(f"{begin}{thought}{end}I am not sure.", DRUGS, LETTER) is None
    assert parse(f"The answer is A? Hm.{end}C", DRUGS, LETTER) == C


def test_normalise_keeps_what_tells_options_apart():
    assert normalise("  **Aspirin\n 81 mg**. ") == "aspirin 81 mg" and normalise("ﬁbrin") == normalise("FIBRIN")
    for one, other in (("1.5 mg", "15 mg"), ("T3", "T4"), ("CD4+", "CD4-"), (">5", "<5"), ("50%", "50"), ("(a)", "a")):
        assert normalise(one) != normalise(other)


WORDS = st.text("abcdeABCDE 0123456789µé-+%().,;:/'<>*“", min_size=1, max_size=12).map(lambda t: " ".join(t.split()))
OPTIONS = st.lists(WORDS.filter(bool), min_size=2, max_size=10, unique=True)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(OPTIONS, st.sampled_from(list(TEMPLATES.values())))
def test_every_rendered_answer_reads_back(options, template):
    asked = question(*options)
    said = answers(asked, template)
    assert len(said) == len(options)
    plain = [normalise(option) for option in options]
    for choice, text in enumerate(said):
        is_plain = template.lists_options or (plain.count(plain[choice]) == 1 and plain[choice])
        assert parse(text, options, template) == (choice if is_plain else None)  # never another one


LEADS = [
    "{}", "Answer: {}", "The answer is {}", "The correct answer is: {}", "Final answer: {}", "Correct answer: {}",
    "I choose {}", "I would go with {}", "The best choice is {}", "So the most likely diagnosis is {}", "Answer - {}",
    "A is wrong, so the answer is {}", "Rash and fever.\n\nAnswer:\n{}", "{} is correct", "{} is the best answer",
    r"\boxed{{{}}}",
]  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from(list(TEMPLATES.values())), st.sampled_from(LEADS))
def test_every_answer_reads_back_after_every_lead(data, template, lead):
    names = ["aspirin", "E. coli", "HLA-B*27", "vitamin C", "CD4+ cells", "5 mg/kg (i.v.)", "no", "a CT scan", "-4"]
    options = data.draw(st.lists(st.sampled_from(names), min_size=2, max_size=9, unique=True))
    choice = data.draw(st.integers(0, len(options) - 1))
    said = answers(question(*options), template)[choice]
    assume(lead != "A is wrong, so the answer is {}" or choice)
    said = data.draw(st.sampled_from([said, said.upper(), f"**{said}**", f"({said})", f'"{said}"']))
    case = data.draw(st.sampled_from([str, str.upper, str.lower])) if "boxed" not in lead else str
    end = data.draw(st.sampled_from(["", ".", "!", "\n", ".\n\nMore."]))
    text = "{}".join(case(part) for part in lead.split("{}")).format(said) + end
    assert parse(text, options, template) == choice


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text("ABCDEabcdeino .,()*\n:-'", max_size=30), st.sampled_from(list(TEMPLATES.values())))
def test_any_text_is_read_as_an_option_or_not_at_all(text, template):
    found = parse(text, DRUGS, template)
    if found is not None:
        letter = rf"{LETTERS[found]}|" if template.lists_options else ""
        assert found in range(4) and re.search(letter + DRUGS[found], text, re.IGNORECASE)


UNITS = [
    "answer is ", "(", "best ", "best-", "not A but ", "A. ", "The answer is A. ", "Final answer: A\n", "\"'", " ", "x",
    "if answer is C ", "a b\n", "A)\n", "C. Metformin is correct, ", "metformin, ", r"\boxed{", r"\text{", "*", "# ",
    "<think>", "</think>", "<think></thinking>", "## Thinking\n", "so option ", "not sure ", '{"a":', "{", "[",
]  # fmt: skip


def test_long_texts_take_no_longer_than_their_length():
    """Repetitions in the grammar are bounded; without that one such text takes minutes."""
    for unit in UNITS:
        text, start = (unit * 25_000)[:25_000], time.process_time()
        parse(text, DRUGS, LETTER)
        assert parse_record(text, Record) is None
        assert time.process_time() - start < 2, unit


PATIENT = {"age": 43, "sex": "male", "complaint": "rash", "duration": "2 weeks", "drug": "aspirin", "dose": "100 mg"}
PATIENT |= {"allergy": None, "denies": "fever"}
WHOLE = json.dumps(PATIENT)
FORMS = [
    "{}", " \n{}\n", "```json\n{}\n```", "Here is the record:\n```json\n{}\n```\nAnything else?",
    "The record is {} as asked.", '<think>Perhaps {{}}? Or {{"age": 1}}?</think>\n{}', "Two sources [1] say: {}",
]  # fmt: skip
NO_RECORDS = [
    "", "null", "{}", "[]", "{{}}", '"age": 43', f"[{WHOLE}]", f'{{"patient": {WHOLE}}}', '{"age":' * 5000,
    WHOLE[:-1], WHOLE + "}", "{" + WHOLE, WHOLE * 2, f"```json\n{WHOLE}\n```\nor {{}}", f"<think>{WHOLE}</think>",
    f"<think>{WHOLE}", WHOLE.replace("43", "043"), WHOLE.replace("43", "NaN"), WHOLE.replace("43", '"43"'),
    WHOLE.replace("43", "43.5"), WHOLE.replace("43", "true"), WHOLE.replace('"', "'"), WHOLE.replace("}", ",}"),
    WHOLE.replace("}", ' // "no"\n}'), WHOLE.replace("{", '{"age": 43, '), WHOLE.replace("{", '{"name": "X", '),
    WHOLE.replace("male", "M"), WHOLE.replace('"rash"', '["rash"]'), WHOLE.replace('"rash"', "1"),
    WHOLE.replace('"allergy": null, ', ""),
]  # fmt: skip


def test_one_proper_object_is_the_record_and_nothing_else_is():
    for text in [form.format(json.dumps(PATIENT, indent=indent)) for form in FORMS for indent in (None, 2)]:
        assert parse_record(text, Record) == Record(**PATIENT), text
    assert [text for text in NO_RECORDS if parse_record(text, Record) is not None] == []


VALUES = {"age": st.none() | st.integers(0, 120), "sex": st.sampled_from(["female", "male", None])}
VALUES |= {key: st.none() | st.text('ab {}[]\\"é\n', max_size=8) for key in list(PATIENT)[2:]}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.fixed_dictionaries(VALUES), st.booleans())
def test_every_written_record_reads_back(values, ascii_only):
    record = Record(**values)
    text = json.dumps(record.model_dump(), ensure_ascii=ascii_only)
    assert parse_record(f"Record:\n```json\n{text}\n```", Record) == record
