#!/usr/bin/env bash
# Builds and runs the README's programs on a small random model.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$PYTHON" - "$work" <<'PY'
import sys, pathlib, torch, transformers
from budwood import _C
work = pathlib.Path(sys.argv[1])
torch.manual_seed(0)
config = transformers.LlamaConfig(vocab_size=97, hidden_size=48, intermediate_size=72, num_hidden_layers=2,
    num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2)
transformers.LlamaForCausalLM(config).save_pretrained(work / "model")
writer = _C.TokenFileWriter(str(work / "text.tokens"), vocab_size=97)
ids = [i * 7 % 97 for i in range(600)]
writer.add(ids, [1] * len(ids))
writer.commit()
PY

cmake -S "$root/examples/cpp" -B "$work/build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
  -DCMAKE_PREFIX_PATH="$("$PYTHON" -c 'import budwood; print(budwood.cmake_prefix_path)')" > "$work/log" 2>&1 \
  && cmake --build "$work/build" >> "$work/log" 2>&1 || { cat "$work/log"; exit 1; }
for program in own_loop with_trainer; do
  echo "-- examples/cpp/$program"
  "$work/build/$program" "$work/model" "$work/text.tokens" "$work/$program"
  test -s "$work/$program/merged/model.safetensors"
  test -s "$work/$program/adapter/adapter_model.safetensors"
done
echo "-- examples/python/hf_lora.py"
"$PYTHON" "$root/examples/python/hf_lora.py"
