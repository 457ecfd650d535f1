"""Combines adapters with PEFT's add_weighted_adapter and compares what is added to each weight with a folder that shanty wrote.

Exits with 1, saying why, when PEFT warns while it opens the folder, a module is in one and not in the other, or a change differs by more
than 1e-5 of its largest number. Products are compared, not factors: singular vectors have no sign.
"""

import argparse
import logging
import sys
import warnings

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def changes(model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and adapter in module.lora_A:
            found[name] = module.get_delta_weight(adapter).double()
    return found


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--model", required=True)
    arguments.add_argument("--how", required=True)
    arguments.add_argument("--weights", required=True)
    arguments.add_argument("--combined", required=True)
    arguments.add_argument("adapters", nargs="+")
    given = arguments.parse_args(
        [part if not part.startswith("-") or part.startswith("--") else f" {part}" for part in sys.argv[1:]]
    )

    weights = [float(weight) for weight in given.weights.split(",")]
    base = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    model = PeftModel.from_pretrained(base, given.adapters[0], adapter_name="0")
    for index, adapter in enumerate(given.adapters[1:], 1):
        model.load_adapter(adapter, adapter_name=str(index))
    names = [str(index) for index in range(len(given.adapters))]
    model.add_weighted_adapter(names, weights, "theirs", combination_type=given.how)
    theirs = changes(model, "theirs")

    lines = []

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    for name in ("peft", "transformers"):
        logging.getLogger(name).addHandler(Heard(logging.WARNING))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.load_adapter(given.combined, adapter_name="ours")
    about_code = (FutureWarning, DeprecationWarning, PendingDeprecationWarning)
    lines += [str(warning.message) for warning in caught if not issubclass(warning.category, about_code)]
    if lines:
        sys.exit("opening the combination warned:\n" + "\n".join(lines))
    ours = changes(model, "ours")

    if ours.keys() != theirs.keys():
        sys.exit(f"modules differ: {sorted(ours.keys() ^ theirs.keys())}")
    worst = 0.0
    for name, expected in theirs.items():
        size = expected.abs().max().item()
        worst = max(worst, (ours[name] - expected).abs().max().item() / max(size, 1e-30))
    print(f"{len(theirs)} modules, off by {worst:.1e}")
    if worst > 1e-5:
        sys.exit(f"changes differ by {worst:.1e}")


if __name__ == "__main__":
    main()
