"""Times one LoRA training step of Hugging Face PEFT + torch on the CPU, as `shanty bench step --device cpu` times ours.

Same shape: f32 base, LoRA r=16 on all linear layers, AdamW, clipping at 1.0, batch x length random tokens, every token
trained. Prints one JSON object. Peak memory is the process's largest resident set.
"""

import argparse
import json
import resource
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--model", required=True)
    arguments.add_argument("--batch", type=int, default=8)
    arguments.add_argument("--length", type=int, default=256)
    arguments.add_argument("--rank", type=int, default=16)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--steps", type=int, default=8)
    arguments.add_argument("--warmup", type=int, default=2)
    given = arguments.parse_args()

    torch.set_num_threads(given.threads)
    torch.manual_seed(17)
    base = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    base.config.use_cache = False
    model = get_peft_model(
        base,
        LoraConfig(r=given.rank, lora_alpha=2 * given.rank, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4)
    vocabulary = base.config.vocab_size

    seconds = []
    for step in range(given.warmup + given.steps):
        ids = torch.randint(0, vocabulary, (given.batch, given.length))
        started = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step >= given.warmup:
            seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds)
    print(
        json.dumps(
            {
                "program": "peft",
                "torch": torch.__version__,
                "tokens_per_second": given.batch * given.length / median,
                "step_seconds": median,
                "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "trainable_parameters": sum(parameter.numel() for parameter in trained),
            }
        )
    )


if __name__ == "__main__":
    main()
