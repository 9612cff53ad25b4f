"""Break the kernels one line at a time, and check that the tests notice: `python tests/kernels/mutations.py`.

Each mutation is applied to its own copy of `lion_kernels`, on which a test runs. A mutation is "killed" if the test
fails. The script fails if a mutation survives, if the text it replaces does not occur exactly once, or if the tests
fail without mutations. Arguments select mutations by name.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "kernels" / "lion_kernels"
# The copy is imported before pytest puts the repository's package on the path.
RUN = """
import sys
sys.path.insert(0, sys.argv[1])
import lion_kernels
assert lion_kernels.__file__.startswith(sys.argv[1]), lion_kernels.__file__
import pytest
sys.exit(pytest.main(["-x", "-q", "--no-header", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


class Mutation(NamedTuple):
    """Replaces `old`, which occurs once in `file`, by `new`; `test`, a node of test_contract.py, should then fail."""

    name: str
    file: str
    old: str
    new: str
    test: str


def _agrees(case: str, way: str = "triton") -> str:
    return f"test_agrees_with_the_reference[{case}-{way}]"


MUTATIONS = [
    Mutation(
        "drop the scale of the scores",
        "attention/tiles.py",
        "b_s *= head.scale * LOG2E",
        "b_s *= LOG2E",
        _agrees("multi_scale_attention: 2 x 33 queries, 17+1+70 keys, 2 heads of 40, scale 0.2"),
    ),
    Mutation(
        "transpose a stride of the keys",
        "attention/tiles.py",
        "stride_k = stride_k_row.to(tl.int64) * UNIT",
        "stride_k = stride_k_head.to(tl.int64) * UNIT",
        _agrees("multi_scale_attention: 2 x 33 queries, 17+1+70 keys, 2 heads of 40, scale 0.2"),
    ),
    Mutation(
        "forget that the odd key's tile is not full",
        "attention/tiles.py",
        'b_s = tl.where((o_column < head.keys)[None, :], b_s, float("-inf"))',
        "b_s = b_s + 0.0",
        _agrees("multi_scale_attention: 1 x 257 queries, 257 keys, 1 heads of 88"),
    ),
    Mutation(
        "let a query attend the key after it",
        "attention/tiles.py",
        "b_s = tl.where(o_column[None, :] <= o_position[:, None], b_s,",
        "b_s = tl.where(o_column[None, :] <= o_position[:, None] + 1, b_s,",
        _agrees("relative_bias_attention: 2 x 65 queries, 65 keys, 1 heads of 24, causal"),
    ),
    Mutation(
        "drop the bias table's clamp",
        "attention/tiles.py",
        "tl.minimum(tl.maximum(o_distance, -head.reach), head.reach) + head.reach",
        "tl.maximum(o_distance, -head.reach) + head.reach",
        _agrees("relative_bias_attention: 1 x 50 queries, 193 keys, 1 heads of 16, max_distance 20"),
    ),
    Mutation(
        "take the bias of the mirrored distance",
        "attention/tiles.py",
        "if TRANSPOSED else o_column[None, :] - o_position[:, None]",
        "if TRANSPOSED else o_position[:, None] - o_column[None, :]",
        _agrees("relative_bias_attention: 1 x 97 queries, 97 keys, 1 heads of 64"),
    ),
    Mutation(
        "forget delta in the scores' gradient",
        "attention/tiles.py",
        "return b_p * (b_dp - b_delta[:, None])",
        "return b_p * b_dp",
        _agrees("multi_scale_attention: 2 x 33 queries, 17+1+70 keys, 2 heads of 40, scale 0.2"),
    ),
    Mutation(
        "swap the columns that a random number is for",
        "core/dropout.py",
        "tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3))",
        "tl.join(tl.join(b_0, b_1), tl.join(b_2, b_3))",
        _agrees("multi_scale_attention: 2 x 17 queries, 17+40 keys, 2 heads of 72, gate, dropout"),
    ),
    Mutation(
        "do not rescale the sum when the maximum moves",
        "attention/forward.py",
        "b_out = scale_rows(b_out, b_decay[:, None])",
        "b_out = scale_rows(b_out, 1.0)",
        _agrees("multi_scale_attention: 1 x 257 queries, 257 keys, 1 heads of 88"),
    ),
    Mutation(
        "meet the last keys a second time",
        "attention/forward.py",
        "tl.maximum(tl.cdiv(head.keys, BN) - 1, 0)",
        "tl.cdiv(head.keys, BN)",
        _agrees("multi_scale_attention: 1 x 257 queries, 257 keys, 1 heads of 88"),
    ),
    Mutation(
        "leave the gate out of the turned product",
        "low_rank/kernels.py",
        "tl.dot(tl.trans(b_up), tl.trans(b_gated), b_products[i], input_precision=PRECISION)",
        "tl.dot(tl.trans(b_up), tl.trans(b_grad.to(dtype)), b_products[i], input_precision=PRECISION)",
        "test_half_precision_is_no_worse_than_the_plain_formula"
        "[fp16-mixture_of_adapters: channel gate, x 3 x 5 x 64, E 2, r 64-triton]",
    ),
    Mutation(
        "forget the padding in the keys' gradient",
        "attention/backward.py",
        'b_s = tl.where(m_key[:, None], b_s, float("-inf"))',
        "b_s = b_s + 0.0",
        _agrees("multi_scale_attention: 2 x 70 queries, 17+1+70 keys, 1 heads of 16, mask and gate"),
    ),
    Mutation(
        "take the first map's gate in the keys' gradient",
        "attention/backward.py",
        "gate = tl.load(p_gate + head.i_map).to(tl.float32) if p_gate is not None else 1.0",
        "gate = tl.load(p_gate).to(tl.float32) if p_gate is not None else 1.0",
        _agrees("multi_scale_attention: 2 x 17 queries, 17+40 keys, 2 heads of 72, gate, dropout"),
    ),
    Mutation(
        "mix the maps by the wrong gate",
        "attention/maps.py",
        "b_map * tl.load(p_gate + s).to(tl.float32)",
        "b_map * tl.load(p_gate + MAPS - 1 - s).to(tl.float32)",
        _agrees("multi_scale_attention: 2 x 17 queries, 17+40 keys, 2 heads of 72, gate, dropout"),
    ),
    Mutation(
        "forget the maps before in the queries' gradient",
        "attention/maps.py",
        "previous=partial if s and needs_q else None,",
        "previous=None,",
        _agrees("multi_scale_attention: 2 x 33 queries, 17+1+70 keys, 2 heads of 40, scale 0.2"),
    ),
    Mutation(
        "sort the table's gradient by another diagonal",
        "attention/bias.py",
        "o_distance = i_diagonal * BLOCK + o_tile[None, :]",
        "o_distance = o_tile[None, :]",
        _agrees("relative_bias_attention: 1 x 97 queries, 97 keys, 1 heads of 64"),
    ),
    Mutation(
        "swap two experts' gates",
        "low_rank/kernels.py",
        "p_row = mixture.p_gate + tl.cast(mixture.channels, tl.int64) * (i_t * mixture.E + i_e)",
        "p_row = mixture.p_gate + tl.cast(mixture.channels, tl.int64) * (i_t * mixture.E + mixture.E - 1 - i_e)",
        _agrees("mixture_of_adapters: channel gate, x 3 x 17 x 64, E 2, r 64"),
    ),
    Mutation(
        "skip the residual",
        "low_rank/kernels.py",
        "b_out += tl.load(p_block, m_mn, other=0.0).to(tl.float32)",
        "b_out += 0.0",
        _agrees("mixture_of_adapters: channel gate, x 3 x 17 x 64, E 2, r 64"),
    ),
    Mutation(
        "let the activation's gradient through everywhere",
        "low_rank/kernels.py",
        "b_dhidden = tl.where(b_hidden > 0.0, b_dhidden, 0.0)",
        "b_dhidden = b_dhidden * 1.0",
        _agrees("mixture_of_adapters: dense gate, x 3 x 5 x 32, E 2, r 8"),
    ),
    Mutation(
        "add other tasks' rows to a task's gradient",
        "low_rank/kernels.py",
        "m_m = m_m & (tl.load(p_ids + o_gate, m_m, other=-1) == i_t)",
        "m_m = m_m & (tl.load(p_ids + o_gate, m_m, other=-1) >= 0)",
        _agrees("mixture_of_adapters: channel by row gate, x 257 x 40, E 2, r 8"),
    ),
    Mutation(
        "forget the bias in the channel gate's gradient",
        "low_rank/kernels.py",
        "b_dgate = tl.sum(b_product * b_weight, 1) + b_bias * b_sum",
        "b_dgate = tl.sum(b_product * b_weight, 1)",
        _agrees("mixture_of_adapters: channel gate, x 3 x 17 x 64, E 2, r 64"),
    ),
    Mutation(
        "skip an expert that a row names",
        "low_rank/kernels.py",
        "((b_ids >= first) & (b_ids <= last))",
        "((b_ids > first) & (b_ids <= last))",
        _agrees("mixture_of_adapters: sparse gate, x 3 x 5 x 72, E 8, r 16"),
    ),
    Mutation(
        "skip the linear layer's bias",
        "low_rank/kernels.py",
        "b_out += tl.load(p_linear_bias + o_n, m_n, other=0.0).to(tl.float32)[None, :]",
        "b_out += 0.0",
        _agrees("mixture_of_lora_linear: dense gate, x 17 x 1408 to 176, E 2, r 4", "fused"),
    ),
    Mutation(
        "take the first expert's hidden for all",
        "low_rank/kernels.py",
        "p_block = p_row + i_e * mixture.RANK + o_r[None, :]",
        "p_block = p_row + o_r[None, :]",
        _agrees("mixture_of_lora_linear: dense gate, x 17 x 1408 to 176, E 2, r 4", "fused"),
    ),
    Mutation(
        "drop LoRA's scaling",
        "mixture_of_lora_linear.py",
        "given._replace(weights=gate * scaling)",
        "given._replace(weights=gate * 1.0)",
        _agrees("mixture_of_lora_linear: sparse gate, x 2 x 17 x 176 to 64, E 8, r 16", "fused"),
    ),
    Mutation(
        "take no expert for the first",
        "low_rank/gates.py",
        "named = expert_ids.unsqueeze(-1) ==",
        "named = expert_ids.clamp(min=0).unsqueeze(-1) ==",
        _agrees("mixture_of_adapters: sparse gate, x 3 x 5 x 72, E 8, r 16"),
    ),
    Mutation(
        "take the mean square over the padded row",
        "rms_norm.py",
        "b_rstd = tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)",
        "b_rstd = tl.rsqrt(tl.sum(b_x * b_x, 1) / BD + eps)",
        _agrees("rms_norm: 257 x 176"),
    ),
    Mutation(
        "forget the projection in the RMS norm's gradient",
        "rms_norm.py",
        "b_dx = (b_dn - b_n * (tl.sum(b_dn * b_n, 1) / D)[:, None]) * b_rstd",
        "b_dx = b_dn * b_rstd",
        _agrees("rms_norm: 257 x 176"),
    ),
    Mutation(
        "forget the mask of the odd channels in the variance",
        "core/layer_norm.py",
        "b_centred = tl.where(m_d[None, :], b_z - b_mean[:, None], 0.0)",
        "b_centred = b_z - b_mean[:, None]",
        _agrees("residual_layer_norm: 17 x 176, dropout"),
    ),
    Mutation(
        "forget dropout in the gradient of x",
        "core/layer_norm.py",
        "b_dz = tl.where(m_keep, b_dz * scale, 0.0)",
        "b_dz = b_dz * 1.0",
        _agrees("residual_layer_norm: 17 x 176, dropout"),
    ),
    Mutation(
        "take the GELU's slope for its probability",
        "gated_gelu.py",
        "b_slope = b_probability + b_gate * normal_density(b_gate)",
        "b_slope = b_probability",
        _agrees("gated_gelu: 257 x 176"),
    ),
    Mutation(
        "sum the soft prompt's gradient over all places",
        "core/gather.py",
        "m_row &= b_id.to(tl.int64) == soft_prompt_id",
        "m_row &= b_id.to(tl.int64) >= 0",
        _agrees("assemble_inputs: 3 x (17 + 33) x 176"),
    ),
    Mutation(
        "embed the soft prompt's id as a token",
        "core/gather.py",
        "if i_id == soft_prompt_id:",
        "if i_id == soft_prompt_id + vocabulary:",
        _agrees("assemble_inputs: 3 x (17 + 33) x 176"),
    ),
]


def apply(mutation: Mutation, package: Path) -> None:
    """Apply the mutation to the copy of lion_kernels in `package`.

    Raises:
        ValueError: the text to be replaced does not occur exactly once.
    """
    file = package / mutation.file
    source = file.read_text(encoding="utf-8")
    if source.count(mutation.old) != 1:
        found = f"found {source.count(mutation.old)} times: {mutation.old}"
        raise ValueError(f"{mutation.name}: expected once in {mutation.file}, {found}")
    file.write_text(source.replace(mutation.old, mutation.new), encoding="utf-8")


def run(*tests: str, mutation: Mutation | None = None) -> tuple[int, str]:
    """Run `tests` on a copy of the package, with `mutation` if given; return pytest's exit status and output."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "lion_kernels"
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        if mutation is not None:
            apply(mutation, copy)
        nodes = [f"tests/kernels/test_contract.py::{test}" for test in tests]
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-c", RUN, folder, *nodes]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        return result.returncode, result.stdout + result.stderr


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help="mutations to make; all by default")
    names = parser.parse_args().names
    chosen = [mutation for mutation in MUTATIONS if not names or mutation.name in names]
    if unknown := set(names) - {mutation.name for mutation in chosen}:
        parser.error(f"unknown mutations: {', '.join(sorted(unknown))}")
    status, output = run(*dict.fromkeys(mutation.test for mutation in chosen))
    if status:
        print(output)
        print("the tests fail without any mutation", file=sys.stderr)
        return 1
    survivors = []
    for mutation in chosen:
        start = time.perf_counter()
        status, output = run(mutation.test, mutation=mutation)
        # 1 means that a test failed; any other status says nothing about the mutation.
        verdict = {0: "SURVIVES", 1: "killed"}.get(status, f"ERROR {status}")
        if status != 1:
            survivors.append(mutation.name)
        found = re.search(r"^E +(.*)$", output, re.MULTILINE)
        reason = found.group(1)[:48] if found else ""
        took = time.perf_counter() - start
        print(f"{verdict:<8} {took:5.1f} s  {mutation.file:<26} {mutation.name:<52} {reason}", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutations killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
