"""Opens exported GGUF files in llama.cpp and compares tokens and logits with those of shanty.

Needs llama-cpp-python and numpy. Exits with 1, saying why.
"""

import argparse
import json
import struct
import sys

import numpy as np
from llama_cpp import Llama


def read_logits(path: str) -> np.ndarray:
    """`logits` of a safetensors file, f32."""
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
        entry = header["logits"]
        start, end = entry["data_offsets"]
        file.seek(8 + length + start)
        return np.frombuffer(file.read(end - start), dtype="<f4").reshape(entry["shape"])


def logits(path: str, ids: list[int], lora: str | None = None) -> tuple[Llama, np.ndarray]:
    model = Llama(model_path=path, lora_path=lora, n_ctx=256, logits_all=True, verbose=False, n_threads=1)
    model.eval(ids)
    return model, np.array(model.scores[: len(ids)], dtype=np.float64)


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--folder", required=True)
    arguments.add_argument("--text", required=True)
    arguments.add_argument("--ids", required=True)
    arguments.add_argument("--logits", required=True)
    given = arguments.parse_args()

    ids = json.loads(given.ids)[0]
    ours = read_logits(given.logits)[0].astype(np.float64)
    size = np.abs(ours).max()
    found = {}
    wrong = []
    # f32 here and f16 in llama.cpp's cache of keys and values: 2^-11 of each, through the layers.
    for name, tolerance in [("f32", 5e-3), ("f16", 5e-3), ("q8", 0.1), ("q4", 1.0)]:
        model, theirs = logits(f"{given.folder}/{name}.gguf", ids)
        found[name] = float(np.abs(theirs - ours).max() / size)
        if found[name] > tolerance:
            wrong.append(f"{name}: logits are off by {found[name]:.1e}, {tolerance:.0e} is allowed")
        tokens = model.tokenize(given.text.encode(), add_bos=False, special=False)
        if tokens != ids:
            wrong.append(f"{name}: llama.cpp's tokens are {tokens}, ours {ids}")
        if model.detokenize(ids).decode() != given.text:
            wrong.append(f"{name}: the text does not come back: {model.detokenize(ids)!r}")
    _, bare = logits(f"{given.folder}/base.gguf", ids)
    _, laid = logits(f"{given.folder}/base.gguf", ids, f"{given.folder}/lora.gguf")
    found["bare"] = float(np.abs(bare - ours).max() / size)
    found["lora"] = float(np.abs(laid - ours).max() / size)
    if found["bare"] < 2e-2:
        wrong.append("the adapter moves nothing: the comparison would prove nothing")
    if found["lora"] > 5e-3:
        wrong.append(f"the adapter alone: logits are off by {found['lora']:.1e}")
    print(json.dumps(found))
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
