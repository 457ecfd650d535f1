"""Opens an adapter folder in Hugging Face PEFT and compares its logits with those that `shanty logits` wrote.

Exits with 1, saying why, when PEFT or transformers warn while the adapter is opened, when nothing moved against the base alone, or when
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
    arguments.add_argument("--model", required=True)
    arguments.add_argument("--adapter", required=True)
    arguments.add_argument("--ids", required=True)
    arguments.add_argument("--logits", required=True)
    arguments.add_argument("--tolerance", type=float, default=1e-4)
    given = arguments.parse_args()

    ids = torch.tensor(json.loads(given.ids))
    base = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    with torch.no_grad():
        untouched = base(ids).logits

    heard = Heard()
    for name in ("", "peft", "transformers"):
        logging.getLogger(name).addHandler(heard)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, given.adapter).eval()
    # Deprecations speak of PEFT's own use of transformers, whatever adapter is opened.
    about_code = (FutureWarning, DeprecationWarning, PendingDeprecationWarning)
    complaints = [str(warning.message) for warning in caught if not issubclass(warning.category, about_code)]
    complaints += heard.lines
    if complaints:
        sys.exit("opening the adapter warned:\n" + "\n".join(complaints))

    with torch.no_grad():
        theirs = model(ids).logits
    ours = load_file(given.logits)["logits"]
    # Behind virtual rows PEFT gives logits of those, too.
    if model.active_peft_config.peft_type in ("PROMPT_TUNING", "P_TUNING"):
        theirs = theirs[:, model.active_peft_config.num_virtual_tokens :]
    if ours.shape != theirs.shape:
        sys.exit(f"shapes differ: theirs {tuple(theirs.shape)}, ours {tuple(ours.shape)}")
    largest = theirs.abs().max()
    difference = ((theirs - ours).abs().max() / largest).item()
    moved = ((theirs - untouched).abs().max() / largest).item()
    print(json.dumps({"difference": difference, "moved_by_the_adapter": moved, "tolerance": given.tolerance}))
    if moved <= given.tolerance:
        sys.exit("the adapter moved nothing: the comparison would prove nothing")
    if difference > given.tolerance:
        sys.exit(f"logits differ by {difference:.2e}, more than {given.tolerance:.0e}")


if __name__ == "__main__":
    main()
