"""What other programs need to use the GGUF file: an Ollama Modelfile, and the command lines of the others.

Ollama does not run the file's chat template, so the Modelfile holds it in Ollama's language.
"""

from pathlib import Path

from medkit.prompts.templates import SYSTEM, end_ids, file_template
from medkit.stage import DISCLAIMER, write_text

CONTEXT_TOKENS = 4096
USE = """# {name} in other programs

{disclaimer} Ask as in training: the file's chat template adds the system prompt. These programs do not recognise an
emergency, do not abstain, and let the model answer what it was not taught. `python -m medkit serve` does better.

| program | in this folder |
|---|---|
| llama.cpp | `llama-server --model {name} --jinja --temp 0 --ctx-size {context}`, then open http://127.0.0.1:8080 |
| Ollama | `ollama create medkit --file Modelfile`, then `ollama run medkit` |
| LM Studio | `lms import --copy {name}`, then load it in the program |
"""


def write_reader_files(path: Path, tokenizer) -> None:
    """Write `Modelfile` and `USE.md` beside a GGUF file; no Modelfile if Ollama's language cannot say the template."""
    use = USE.format(name=path.name, disclaimer=DISCLAIMER, context=CONTEXT_TOKENS)
    for name, text in {"Modelfile": make_modelfile(path.name, tokenizer), "USE.md": use}.items():
        if text:
            write_text(path.with_name(name), text)


def make_modelfile(name: str, tokenizer) -> str | None:
    """An Ollama Modelfile: the system prompt and the turns of training, greedy.

    What stands before each turn is read from a chat that the file's template renders. None for a template that leaves
    out a turn.
    """
    roles = ("system", "user", "assistant", "user")
    marks = [f"((turn {number}))" for number in range(4)]
    turns = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    options = {"chat_template": file_template(tokenizer), "tokenize": False, "add_generation_prompt": True}
    rest, before = tokenizer.apply_chat_template(turns, **options), []
    reads_system = marks[0] in rest  # a base model does not
    for mark in marks if reads_system else marks[1:]:
        text, mark_read, rest = rest.partition(mark)
        before.append(text)
        if not mark_read:
            return None
    *system, first, answer, following = before
    user = first if first == following else f"{{{{ if le $i 1 }}}}{first}{{{{ else }}}}{following}{{{{ end }}}}"
    parts = {"system": f"{system[0]}{{{{ .Content }}}}" if reads_system else ""}
    parts |= {"user": f"{user}{{{{ .Content }}}}", "assistant": f"{answer}{{{{ .Content }}}}"}
    turn = " else ".join(f'if eq .Role "{role}" }}}}{text}{{{{' for role, text in parts.items())
    stops = "".join(f'PARAMETER stop "{tokenizer.convert_ids_to_tokens(end)}"\n' for end in end_ids(tokenizer))
    return (
        f'# {DISCLAIMER}\nFROM ./{name}\nSYSTEM """{SYSTEM}"""\n'
        f'TEMPLATE """{{{{ range $i, $turn := .Messages }}}}{{{{ {turn} end }}}}{{{{ end }}}}{rest}"""\n'
        f"PARAMETER temperature 0\nPARAMETER num_ctx {CONTEXT_TOKENS}\n{stops}"
    )
