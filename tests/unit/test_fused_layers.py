"""The fused layer against the stock one: output, gradients, what it keeps, and when it steps aside."""

import functools
import os
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModel,
    BitsAndBytesConfig,
    DynamicCache,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)
from transformers.integrations import replace_with_bnb_linear

from models import fused_layers, kernels
from models.fp8 import use_fp8
from models.fused_layers import FusedLayer, find_obstacle, fuse_layers, get_fused_layers, set_activation_checkpointing
from tests.conftest import ROOT
from utils.logging_utils import UserError, setup_logging

TARGETS = r".*(q|k|v|o|gate|up|down)_proj"
KINDS = {"mistral": MistralConfig, "llama": LlamaConfig, "qwen2": Qwen2Config, "granite": GraniteConfig}
MULTIPLIERS = dict(residual_multiplier=0.22, attention_multiplier=0.05, embedding_multiplier=12.0)  # of Granite


@pytest.fixture(autouse=True)
def few_rows_too(monkeypatch):
    monkeypatch.setattr(fused_layers, "MIN_ROWS", 1)


def language_model(kind="mistral", load_in_4bit=False, targets=TARGETS, **lora):
    """A small language model with grouped heads and adapters that already do something; the same one every time."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = KINDS[kind](
        vocab_size=50, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=256, **(MULTIPLIERS if kind == "granite" else {}),
    )  # fmt: skip
    model = AutoModel.from_config(config, attn_implementation="sdpa")
    if load_in_4bit:
        weights = {name: module.weight.data for name, module in model.named_modules() if hasattr(module, "in_features")}
        biases = {name: part.data for name, part in model.named_parameters() if name.endswith("_proj.bias")}
        how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        how.bnb_4bit_compute_dtype = torch.float32
        model = replace_with_bnb_linear(model, [], how)
        for name, weight in weights.items():
            module = model.get_submodule(name)
            module.weight = type(module.weight)(weight, quant_type="nf4", compress_statistics=True, module=module).to(
                "cpu"
            )
            module.support_avx512bf16_for_cpu = False
        for name, bias in biases.items():
            model.get_submodule(name.removesuffix(".bias")).bias = torch.nn.Parameter(bias)
        model.is_loaded_in_4bit = True
    model.requires_grad_(False)
    if targets is None:
        return model
    model = get_peft_model(model, LoraConfig(target_modules=targets, **{"r": 4, "lora_alpha": 8} | lora))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
        if name.endswith("_proj.base_layer.bias"):
            parameter.data.normal_()
    return model


def with_attention_dropout(model):
    for layer in layers_of(model):
        layer.self_attn.attention_dropout = 0.1
    return model


def layers_of(model):
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).layers


def run(model, needs_rows=True, images=3, tokens=37, kept=slice(None)):
    """(output at the positions kept, gradient of the inputs, {name: gradient of a parameter})."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(images, tokens, 256, generator=generator).requires_grad_(needs_rows)
    output = model(inputs_embeds=rows, use_cache=False).last_hidden_state[:, kept]
    (output * torch.randn(output.shape, generator=generator)).sum().backward()
    return output, rows.grad, {name: part.grad for name, part in model.named_parameters() if part.requires_grad}


def assert_same(expected, found):
    torch.testing.assert_close(expected[0], found[0], atol=1e-5, rtol=1e-5)
    if expected[1] is not None:
        torch.testing.assert_close(expected[1], found[1], atol=1e-4, rtol=1e-4)
    for name, gradient in expected[2].items():
        scale = gradient.abs().max()
        torch.testing.assert_close(found[2][name] / scale, gradient / scale, atol=2e-5, rtol=0, msg=name)


@pytest.mark.parametrize("needs_rows", [True, False])
@pytest.mark.parametrize("how", ["keep", "recompute", "offload"])
@pytest.mark.parametrize(
    "kind, load_in_4bit", [("mistral", True), ("llama", False), ("qwen2", True), ("granite", True)]
)
def test_output_and_gradients_are_those_of_the_stock_layers(kind, load_in_4bit, how, needs_rows):
    model = language_model(kind, load_in_4bit).train()
    layers = fuse_layers(layers_of(model))
    set_activation_checkpointing(layers, 3 if how == "keep" else 0, offloaded=3 if how == "offload" else 0)
    assert_same(run_stock(kind, load_in_4bit, needs_rows), run(model, needs_rows))


@functools.cache
def run_stock(kind: str, load_in_4bit: bool, needs_rows: bool):
    return run(language_model(kind, load_in_4bit).train(), needs_rows)


@pytest.mark.slow
def test_compiled_kernels_compute_what_eager_ones_do_for_any_number_of_rows():
    from torch._dynamo.utils import counters

    stock, model = language_model(load_in_4bit=True).train(), language_model(load_in_4bit=True).train()
    layers = fuse_layers(layers_of(model))
    set_activation_checkpointing(layers, 1)
    layers[0].kernels.compile()
    counters.clear()
    for images, tokens in ((3, 37), (2, 50), (1, 41)):
        assert_same(run(stock, True, images, tokens), run(model, True, images, tokens))
        stock.zero_grad(), model.zero_grad()
    assert counters["stats"]["unique_graphs"] == 6 and not counters["graph_break"]
    compiled = layers[0].kernels.by_name
    layers[0].kernels.eager()
    assert not layers[0].kernels.compiled and layers[0].kernels.by_name == kernels.Kernels().by_name != compiled


def test_layers_without_lora_and_with_frozen_lora():
    plain = language_model(targets=None).train()
    stock = run(plain)
    fuse_layers(layers_of(plain))
    assert_same(stock, run(plain))
    frozen = [language_model().train() for _ in range(2)]
    for model in frozen:
        model.requires_grad_(False)
    fuse_layers(layers_of(frozen[1]))
    expected = run(frozen[0])
    assert_same(expected, run(frozen[1]))
    assert expected[1].abs().max() > 0 and not expected[2]


def test_a_checkpointed_layer_saves_its_input_alone():
    """Bytes saved between forward and backward, against what memory.py counts on."""
    from models.memory import step_cost

    config = language_model().config
    found = {}
    for keep in (0, 3):
        model = language_model().train()
        layers = fuse_layers(layers_of(model))
        set_activation_checkpointing(layers, keep)
        rows = torch.randn(2, 40, 256, requires_grad=True)
        positions = model.get_base_model().rotary_emb(rows, torch.arange(40)[None])
        node = layers_of(model)[0](rows, position_embeddings=positions).grad_fn.next_functions[0][0]
        saved = node.saved or []
        tensors = [tensor for part in saved for tensor in (part if isinstance(part, list) else [part])]
        found[keep] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    expected = step_cost(config, 64, 4, compiled=True, tokens=1, held=0).activation
    assert found[0] == 0
    assert found[3] == pytest.approx(80 * (expected - 4 * 8), rel=0.01)  # the log-sum is attention's own


def test_scoring_uses_a_cache_and_a_mask():
    """Prefill with a cache, then rows with a mask of their own: as models/scoring.py does."""
    outputs = []
    for is_fused in (False, True):
        model = language_model("llama").eval()
        if is_fused:
            fuse_layers(layers_of(model))
        generator = torch.Generator().manual_seed(3)
        cache = DynamicCache()
        with torch.no_grad():
            rows = torch.randn(2, 9, 256, generator=generator)
            first = model(inputs_embeds=rows, past_key_values=cache, use_cache=True)
            mask = torch.zeros(2, 1, 4, 13).masked_fill_(torch.rand(2, 1, 4, 13, generator=generator) < 0.3, -1e9)
            then = model(
                inputs_embeds=torch.randn(2, 4, 256, generator=generator),
                position_ids=torch.tensor([[9, 10, 10, 11]] * 2),
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
            )
        outputs.append((first.last_hidden_state, then.last_hidden_state, cache.get_seq_length()))
    torch.testing.assert_close(outputs[0][0], outputs[1][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs[0][1], outputs[1][1], atol=1e-5, rtol=1e-5)
    assert outputs[0][2] == outputs[1][2] == 13


def test_few_rows_a_mask_in_training_and_inactive_lora_go_to_the_stock_layer(monkeypatch):
    model = language_model().train()
    layers = fuse_layers(layers_of(model))
    asked = []

    def counted(stock):
        return lambda *args, **kwargs: asked.append(1) or stock(*args, **kwargs)

    for layer in layers:
        monkeypatch.setattr(layer, "stock", counted(layer.stock))
    rows = torch.randn(2, 8, 256, requires_grad=True)
    model(inputs_embeds=rows, use_cache=False)
    assert not asked
    model(inputs_embeds=rows, use_cache=False, attention_mask=torch.tensor([[1] * 8, [0] * 3 + [1] * 5]))
    assert len(asked) == 3
    with model.disable_adapter():
        model(inputs_embeds=rows, use_cache=False)
    assert len(asked) == 6
    model.merge_adapter()
    model(inputs_embeds=rows, use_cache=False)
    model.unmerge_adapter()
    assert len(asked) == 9
    monkeypatch.setattr(fused_layers, "MIN_ROWS", 17)
    model(inputs_embeds=rows, use_cache=False)
    assert len(asked) == 12


@pytest.mark.parametrize(
    "why, build",
    [
        ("dropout", lambda: language_model(lora_dropout=0.1)),
        ("dropout of attention", lambda: with_attention_dropout(language_model())),
        ("some linears without an adapter", lambda: language_model(targets=["q_proj"])),
        ("a variant", lambda: language_model(use_dora=True)),
        ("trainable weights besides LoRA", lambda: language_model(targets=None).requires_grad_(True)),
        ("another kind of layer", lambda: torch.nn.ModuleList([torch.nn.Linear(2, 2)])),
    ],
)
def test_what_is_not_fused(why, build):
    model = build()
    stack = model if isinstance(model, torch.nn.ModuleList) else layers_of(model)
    assert any(map(find_obstacle, stack)) and not fuse_layers(stack), why


def test_modules_names_and_weights_stay():
    model = language_model()
    before = {name: part.clone() for name, part in model.state_dict().items()}
    assert not any(map(find_obstacle, layers_of(model))) and not get_fused_layers(layers_of(model))
    made = fuse_layers(layers_of(model))
    assert get_fused_layers(layers_of(model)) == made and all(isinstance(layer, FusedLayer) for layer in made)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


DEQUANTIZE = """
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from models.kernels import dequantize
for dtype in (torch.float32, torch.float16):
    packed, state = quantize_4bit(torch.randn(32, 2048, dtype=dtype), quant_type="nf4", compress_statistics=True)
    up = torch.randn(32, 16)
    out = torch.full((32, 2048 + 64), 7.0, dtype=dtype)
    dequantize(packed.view(-1).view(torch.float32), state, up, 16, out)  # as runtime/distributed.py has it
    assert torch.equal(out[:, :2048], dequantize_4bit(packed, state))
    assert torch.equal(out[:, 2064:2080], up.to(dtype)) and not out[:, 2048:2064].any() and not out[:, 2080:].any()
    out = torch.full((32, 2048), 7.0, dtype=dtype)
    dequantize(packed, state, None, 0, out)
    assert torch.equal(out, dequantize_4bit(packed, state))
"""


FP8 = """
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from models.kernels import FP8, dequantize_fp8, round_rows
def same(found, expected):
    found, expected = found.float(), expected.to(FP8).float()
    # Ties round either way; the interpreter, unlike a GPU, forgets to carry where the mantissa rounds up to 2.
    near = (found - expected).abs() <= expected.abs() / 2 + 2**-9
    return (found != expected).float().mean() < 0.05 and bool(near.all())
packed, state = quantize_4bit(torch.randn(128, 2048), quant_type="nf4", compress_statistics=True)
plain = dequantize_4bit(packed, state)
scale = plain.abs().amax(0)[:, None] / 448
out = torch.zeros(2048, 256, dtype=FP8)
dequantize_fp8(packed, state, scale, out[:, 128:])
assert same(out[:, 128:], plain.T / scale) and not out[:, :128].float().any()
wide = torch.randn(5, 3072)
wide[1] = 0
for parts in ([wide[:, 1024:]], [wide[:, :1024], wide[:, 1024:]], list(wide.split(1024, 1))):
    rows = torch.cat(parts, 1)
    out, scale = torch.empty(rows.shape, dtype=FP8), torch.empty(5, 1)
    round_rows(out, scale, parts)
    assert torch.equal(scale, rows.abs().amax(1, keepdim=True).clamp_min(1e-30) / 448)
    assert same(out, rows / scale)
"""


@pytest.mark.parametrize("script", [DEQUANTIZE, FP8], ids=["as bitsandbytes", "to FP8"])
def test_triton_kernels_compute_what_torch_does(script):
    """In Triton's interpreter, which must be asked for before Triton is imported; no GPU is needed."""
    pytest.importorskip("triton", reason="Triton comes with torch for CUDA; its kernel ran on an H100 (docs/LOG.md)")
    there = {"env": os.environ | {"TRITON_INTERPRET": "1"}, "cwd": ROOT}
    done = subprocess.run([sys.executable, "-c", script], **there, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- FP8


@pytest.mark.parametrize("kind, load_in_4bit", [("mistral", True), ("llama", False), ("qwen2", True)])
def test_fp8_rounds_the_backward_pass_alone(kind, load_in_4bit, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    expected = run(language_model(kind, load_in_4bit).train())
    model = language_model(kind, load_in_4bit).train()
    layers = fuse_layers(layers_of(model))
    use_fp8(layers, torch.device("cuda"), "bf16")
    set_activation_checkpointing(layers, 1)
    found = run(model)
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    errors = sorted((found[2][name] - part).norm() / part.norm() for name, part in expected[2].items())
    assert 0.01 < errors[len(errors) // 2] < 0.05 and errors[-1] < 0.1
    last = "layers.2.mlp.down_proj.lora_B.default.weight"  # its gradient is from before any rounding
    torch.testing.assert_close(
        *(next(part for name, part in of[2].items() if last in name) for of in (found, expected))
    )


@pytest.mark.parametrize(
    ("device", "capability", "precision", "words"),
    [
        ("cpu", (9, 0), "no", "needs a CUDA GPU of compute capability 8.9 or newer"),
        ("cuda", (8, 6), "bf16", "needs a CUDA GPU of compute capability 8.9 or newer"),
        ("cuda", (8, 9), "fp16", "needs --mixed-precision bf16"),
    ],
)
def test_fp8_is_refused_where_nothing_computes_it(device, capability, precision, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(UserError, match=f"^--matmul fp8: {words}.*; use --matmul bf16$"):
        use_fp8(fuse_layers(layers_of(language_model())), torch.device(device), precision)


# ---- machines that cannot build kernels


def refuse(*args, **kwargs):
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")


def test_without_a_compiler_kernels_stay_eager_with_a_warning(monkeypatch, capsys):
    setup_logging()
    stock, model = language_model(load_in_4bit=True).train(), language_model(load_in_4bit=True).train()
    layers = fuse_layers(layers_of(model))
    monkeypatch.setattr(kernels.CompiledKernel, "fails", False)
    monkeypatch.setattr(torch, "compile", lambda kernel: refuse)
    monkeypatch.setattr(kernels, "can_dequantize", lambda weight, state: True)
    monkeypatch.setattr(kernels, "dequantize", refuse)
    layers[0].kernels.has_triton = True
    layers[0].kernels.compile()
    assert_same(run(stock), run(model))
    printed = capsys.readouterr().out
    assert printed.count("warning: kernels cannot be compiled on this machine (RuntimeError: Failed to find C com") == 2
    assert not layers[0].kernels.compiled
    assert "eager kernels are used, slower and in more memory" in printed
    assert "bitsandbytes dequantizes the weights" in printed


def test_out_of_memory_is_not_taken_for_a_missing_compiler(monkeypatch):
    def full(*args):
        raise RuntimeError("Triton Error [CUDA]: out of memory")

    model = language_model().train()
    layers = fuse_layers(layers_of(model))
    monkeypatch.setattr(torch, "compile", lambda kernel: full)
    layers[0].kernels.compile()
    with pytest.raises(RuntimeError, match="out of memory"):
        run(model)
    assert not kernels.CompiledKernel.fails


@pytest.mark.parametrize("how", ["keep", "recompute"])
@pytest.mark.parametrize("needs_rows", [True, False])
def test_the_last_layer_computes_only_the_rows_whose_logits_are_kept(how, needs_rows):
    """Of two positions; its output is zero elsewhere, and so are the gradients that the stock layers get."""
    kept, (stock, model) = torch.tensor([20, 36]), (language_model("granite", True).train() for _ in range(2))
    layers = fuse_layers(layers_of(model))
    set_activation_checkpointing(layers, 3 if how == "keep" else 0)
    layers[-1].used = kept
    asked = []
    layers[-1].groups[3].forward = lambda x, real=layers[-1].groups[3].forward: asked.append(len(x)) or real(x)
    found = run(model, needs_rows, kept=kept)
    assert asked == [3 * 2] and layers[-1].used is None
    assert_same(run(stock, needs_rows, kept=kept), found)
