"""Compares the GPU engine with PEFT + bitsandbytes: the same weights, tokens and random adapter, hidden states layer by layer and
every adapter gradient.

usage: compare_peft.py GPU_CHECK FOLDER [--model DIR | --layers N] [--batch 2 --length 512 --rank 16] [--train STEPS]

GPU_CHECK is the program that `cargo xtask gpu-check` packs, FOLDER is where files go. Without --model a Llama with the layers of an 8B model is made of
random weights. bitsandbytes quantises the model (NF4, blocks of 64, double quantisation) and writes it; both sides read what it wrote.

The truth is the same model in f32 on the same card: bitsandbytes' own dequantisation to f32, no TF32. Three programs are measured against it by
||x - truth|| / ||truth||: PEFT with everything in bf16 as such a model is loaded ("bf16"); PEFT as prepare_model_for_kbit_training leaves it,
whose norms, embedding, head and residual stream are f32 ("kbit"); and ours in bf16. Ours must be at most twice as far from the truth as PEFT in bf16, tensor by
tensor; in f32 it must be within 1e-4, which shows that what is computed is the same function. Needs torch, transformers, peft, bitsandbytes.
"""
import argparse, copy, json, os, statistics, subprocess, sys
os.environ.setdefault("HF_HUB_OFFLINE", "1"); os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
import bitsandbytes as bnb

ap = argparse.ArgumentParser()
ap.add_argument("gpu_check"); ap.add_argument("folder")
ap.add_argument("--model"); ap.add_argument("--layers", type=int, default=3)
ap.add_argument("--batch", type=int, default=2); ap.add_argument("--length", type=int, default=512)
ap.add_argument("--rank", type=int, default=16); ap.add_argument("--train", type=int, default=0)
ap.add_argument("--ratio", type=float, default=2.0)
ap.add_argument("--bound", type=float, default=0, help="adapter uniform within this bound, as gpu_check has it, instead of normal")
a = ap.parse_args()
torch.backends.cuda.matmul.allow_tf32 = False
torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
os.makedirs(a.folder, exist_ok=True)
name = os.path.basename(a.model.rstrip("/")) if a.model else f"8B layers x {a.layers}"
made, quantised, adapter = (os.path.join(a.folder, part) for part in ("model", "nf4", "adapter"))
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

if not a.model:
    config = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=a.layers, num_attention_heads=32, num_key_value_heads=8,
                         vocab_size=16384, tie_word_embeddings=False, max_position_embeddings=8192, rope_theta=500000.0, rms_norm_eps=1e-5)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(made); del model
source = a.model or made
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
base = AutoModelForCausalLM.from_pretrained(source, quantization_config=nf4, dtype=torch.bfloat16, attn_implementation="sdpa", device_map={"": 0})
base.save_pretrained(quantised)
vocabulary = base.config.vocab_size

# A random adapter, A and B.
lora = LoraConfig(r=a.rank, lora_alpha=2 * a.rank, target_modules=TARGETS, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM")
model = get_peft_model(base, lora)
for key, parameter in model.named_parameters():
    if a.bound and "lora_" in key: torch.nn.init.uniform_(parameter, -a.bound, a.bound)
    elif "lora_A" in key: torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    elif "lora_B" in key: torch.nn.init.normal_(parameter, std=0.1 * a.rank ** -0.5)
model.save_pretrained(adapter)
ids = torch.randint(0, vocabulary, (a.batch, a.length))
with open(os.path.join(a.folder, "ids.json"), "w") as file: json.dump(ids.tolist(), file)
ids = ids.cuda()


def measure(model, autocast):
    """Hidden states, gradients and loss."""
    hidden = {}
    inner = model.base_model.model.model
    hooks = []
    for index, layer in enumerate(inner.layers):
        hooks.append(layer.register_forward_pre_hook(
            lambda m, args, kwargs, i=index: hidden.__setitem__(f"hidden.{i}", (args[0] if args else kwargs["hidden_states"]).detach().float().flatten(0, 1)), with_kwargs=True))
    hooks.append(inner.norm.register_forward_pre_hook(
        lambda m, args, last=len(inner.layers): hidden.__setitem__(f"hidden.{last}", args[0].detach().float().flatten(0, 1))))
    model.zero_grad(set_to_none=True)
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    for hook in hooks: hook.remove()
    out = {key: value.cpu() for key, value in hidden.items()}
    for key, parameter in model.named_parameters():
        if parameter.grad is not None: out[key.replace(".default", "")] = parameter.grad.detach().float().cpu()
    out["loss"] = torch.tensor([loss.item()])
    return out


def curve(model, autocast, steps):
    """Losses of training steps on one batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(); losses.append(loss.item())
    return torch.tensor(losses)


def truth():
    """The same model in f32."""
    config = copy.deepcopy(base.config); config.dtype = torch.float32
    if hasattr(config, "quantization_config"): del config.quantization_config
    with torch.device("cuda"):
        wide = LlamaForCausalLM._from_config(config, attn_implementation="eager").float()
    modules = dict(base.named_modules())
    with torch.no_grad():
        for key, module in wide.named_modules():
            if isinstance(module, torch.nn.Linear):
                own = modules.get(key) or modules[key.replace("model.", "", 1)]
                own = getattr(own, "base_layer", own)
                if isinstance(own, bnb.nn.Linear4bit):
                    state = copy.copy(own.weight.quant_state); state.dtype = torch.float32
                    module.weight.copy_(bnb.functional.dequantize_4bit(own.weight.data, state).reshape(module.weight.shape))
                else:
                    module.weight.copy_(own.weight.float())
            elif hasattr(module, "weight") and isinstance(module.weight, torch.nn.Parameter):
                module.weight.copy_(modules[key].weight.float())
    wide = PeftModel.from_pretrained(wide, adapter, is_trainable=True)
    return wide.float()


def error(x, y):
    return ((x.double() - y.double()).norm() / y.double().norm()).item()


# In bf16 as loaded; the adapter's own numbers stay f32, as PEFT keeps them.
results = {"bf16": measure(model, True)}
curves = {}
wide = truth()
expected = measure(wide, False)
if a.train:
    curves["truth"] = curve(wide, False, a.train)
del wide; torch.cuda.empty_cache()
if a.train:
    curves["bf16"] = curve(model, True, a.train)
del model, base; torch.cuda.empty_cache()
base = AutoModelForCausalLM.from_pretrained(quantised, dtype=torch.bfloat16, attn_implementation="sdpa", device_map={"": 0})
base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
results["kbit"] = measure(model, True)
del model, base; torch.cuda.empty_cache()
for key, precision in (("ours", "bf16"), ("ours, f32", "f32")):
    out = os.path.join(a.folder, f"{precision}.safetensors")
    subprocess.run([a.gpu_check, "dump", quantised, adapter, os.path.join(a.folder, "ids.json"), out, precision, str(a.train)], check=True)
    results[key] = load_file(out)
    if a.train: curves[key] = results[key].pop("curve")

failed = []
keys = sorted(expected, key=lambda key: (not key.startswith("hidden"), key))
for run, values in results.items():
    missing = set(expected) ^ set(values)
    if missing: sys.exit(f"{run} lacks or has besides: {sorted(missing)[:5]}")
errors = {run: {key: error(values[key].reshape(expected[key].shape), expected[key]) for key in keys} for run, values in results.items()}
for key in keys:
    ours, theirs = errors["ours"][key], errors["bf16"][key]
    # A hidden state that is an embedding's row is exact on both sides. A loss is one number, in which errors cancel by chance.
    least = 1e-3 if key == "loss" else 1e-6
    if not ours <= max(a.ratio * theirs, least): failed.append(f"{key}: ours {ours:.2e}, PEFT in bf16 {theirs:.2e}")
    if not errors["ours, f32"][key] <= 1e-4: failed.append(f"{key}: ours in f32 {errors['ours, f32'][key]:.2e}")
groups = [("hidden states", [k for k in keys if k.startswith("hidden") and k != "hidden.0"]), ("gradients of A", [k for k in keys if "lora_A" in k]),
          ("gradients of B", [k for k in keys if "lora_B" in k]), ("loss", ["loss"])]
print(f"{name}, {a.batch} x {a.length} tokens, rank {a.rank}; {torch.cuda.get_device_name(0)}; error against f32: median (largest)")
print(f"{'':16}" + "".join(f"{run:>24}" for run in errors) + f"{'ours / PEFT in bf16':>26}")
summary = {}
for group, members in groups:
    if not members: continue
    cell = lambda run: (statistics.median(errors[run][k] for k in members), max(errors[run][k] for k in members))
    ratios = [errors["ours"][k] / max(errors["bf16"][k], 1e-12) for k in members]
    summary[group] = {run: cell(run) for run in errors} | {"ratio": (statistics.median(ratios), max(ratios)), "tensors": len(members)}
    print(f"{group:16}" + "".join(f"{cell(run)[0]:>13.2e} ({cell(run)[1]:.2e})" for run in errors) + f"{statistics.median(ratios):>17.2f} ({max(ratios):.2f})")
for key in keys:
    if key.startswith("hidden"): print(f"  {key:12}" + "".join(f"{errors[run][key]:>24.2e}" for run in errors))
whole = lambda run: error(torch.cat([results[run][k].flatten() for k in keys if "lora" in k]), torch.cat([expected[k].flatten() for k in keys if "lora" in k]))
summary["whole gradient"] = {run: whole(run) for run in results}
print("whole gradient: " + ", ".join(f"{run} {value:.2e}" for run, value in summary["whole gradient"].items()))
if curves:
    summary["curve"] = {run: error(losses, curves["truth"]) for run, losses in curves.items() if run != "truth"}
    print(f"{a.train} steps, {curves['truth'][0]:.4f} -> {curves['truth'][-1]:.4f}, error of the losses against f32: " +
          ", ".join(f"{run} {value:.2e}" for run, value in summary["curve"].items()))
with open(os.path.join(a.folder, "summary.json"), "w") as file: json.dump({"model": name, "summary": summary, "failed": failed}, file)
for line in failed[:20]: print("FAIL", line)
print(f"{len(keys)} tensors, {len(failed)} failed")
sys.exit(1 if failed else 0)
