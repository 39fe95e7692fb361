"""`python -m demo [outputs=outputs/demo]`: prepares model and corpus, from which the public commands go on."""

import sys
from pathlib import Path

from extract.interrupts import one_line_interrupts

with one_line_interrupts():
    from demo.base_model import prepare_base_model
    from demo.corpus import write_corpus
    from extract.command import EXIT_BAD_INPUT
    from extract.errors import BadInput


def main(arguments: list[str]) -> None:
    """Prepares `outputs`/base_model and `outputs`/corpus/*.jsonl; what is complete already is kept."""
    outputs = outputs_folder(arguments)
    print(f"{prepare_base_model(outputs)}: the base model, SmolLM2-135M-Instruct", flush=True)
    for line in write_corpus(outputs / "corpus"):
        print(line, flush=True)
    print(f"Model and corpus lie in {outputs}. Next: python -m extract.tokens experiment=demo outputs={outputs}")


def outputs_folder(arguments: list[str]) -> Path:
    """The value of `outputs=`, the only setting there is; BadInput for any other."""
    settings = dict([argument.partition("=")[::2] for argument in arguments])
    unknown = [argument for argument in arguments if not argument.startswith("outputs=")]
    if unknown or settings.get("outputs") == "":
        raise BadInput(f"{' '.join(unknown or arguments)}: the only setting is outputs=FOLDER (default outputs/demo).")
    return Path(settings.get("outputs", "outputs/demo"))


if __name__ == "__main__":
    try:
        with one_line_interrupts():
            main(sys.argv[1:])
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
