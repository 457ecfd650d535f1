"""Opens adapter folders in Hugging Face PEFT and compares their logits with those that `shanty logits` wrote.

One folder by --model, --adapter, --logits; or many by --cases: a JSON list of objects with these keys. Exits with 1, saying why, when PEFT or transformers warn while the adapter is opened, when nothing moved against the base alone, or when
max |theirs - ours| / max |theirs| is above the tolerance. The base is run in f32.
"""

import argparse
import json
import logging
import sys
import warnings

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


class Heard(logging.Handler):
    """Keeps what is logged at warning level or above."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.name}: {record.getMessage()}")


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--cases")
    arguments.add_argument("--model")
    arguments.add_argument("--adapter")
    arguments.add_argument("--logits")
    arguments.add_argument("--ids", required=True)
    arguments.add_argument("--tolerance", type=float, default=1e-4)
    given = arguments.parse_args()
    cases = [{"model": given.model, "adapter": given.adapter, "logits": given.logits}]
    if given.cases:
        with open(given.cases) as file:
            cases = json.load(file)
    wrong = [problem for case in cases if (problem := check(case, given))]
    if wrong:
        sys.exit("\n".join(wrong))


def check(case: dict[str, str], given: argparse.Namespace) -> str | None:
    """What is wrong with a case, if anything."""
    folder = case["adapter"]
    ids = torch.tensor(json.loads(given.ids))
    base = AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32).eval()
    with torch.no_grad():
        untouched = base(ids).logits

    heard = Heard()
    for name in ("", "peft", "transformers"):
        logging.getLogger(name).addHandler(heard)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, folder).eval()
    # Deprecations speak of PEFT's own use of transformers, whatever adapter is opened.
    about_code = (FutureWarning, DeprecationWarning, PendingDeprecationWarning)
    complaints = [str(warning.message) for warning in caught if not issubclass(warning.category, about_code)]
    complaints += heard.lines
    if complaints:
        return f"{folder}: opening the adapter warned:\n" + "\n".join(complaints)

    with torch.no_grad():
        theirs = model(ids).logits
    ours = load_file(case["logits"])["logits"]
    # Prompts are rows of their own in PEFT.
    theirs = theirs[:, theirs.shape[1] - ours.shape[1] :]
    if ours.shape != theirs.shape:
        return f"{folder}: shapes differ: theirs {tuple(theirs.shape)}, ours {tuple(ours.shape)}"
    largest = theirs.abs().max()
    difference = ((theirs - ours).abs().max() / largest).item()
    moved = ((theirs - untouched).abs().max() / largest).item()
    figures = {"adapter": folder, "difference": difference, "moved_by_the_adapter": moved}
    print(json.dumps({**figures, "tolerance": given.tolerance}))
    if moved <= given.tolerance:
        return f"{folder}: the adapter moved nothing: the comparison would prove nothing"
    if difference > given.tolerance:
        return f"{folder}: logits differ by {difference:.2e}, more than {given.tolerance:.0e}"
    return None


if __name__ == "__main__":
    main()
