"""The back end of attention is chosen by its gradients, and by its time among those that are right."""

import pytest
import torch
from torch.nn.attention import SDPBackend

from models import attention
from models.attention import Trial, attention_error, choose_attention
from models.fused_layers import get_fused_layers
from tests.unit.test_trainer import make_fused
from utils.logging_utils import setup_logging


@pytest.fixture
def fused(tiny, tmp_path, simulated_gpu):
    return make_fused(tiny, tmp_path).fused


@pytest.mark.parametrize("images, tokens", [(1, 20), (2, 7)])
def test_attention_of_the_layers_agrees_with_plain_matmuls(fused, images, tokens):
    assert attention_error(fused[0], images, tokens) < 1e-5


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_an_error_in_output_or_any_gradient_is_found(which, fused, monkeypatch):
    right = attention._gradients

    def wrong(layer, leaves):
        found = right(layer, leaves)
        found[which] = found[which].clone()
        found[which][:, -1] *= 1300
        return found

    monkeypatch.setattr(attention, "_gradients", wrong)
    assert attention_error(fused[0], 1, 20) > 1


def test_the_fastest_that_is_right_is_chosen(fused, monkeypatch, capsys):
    setup_logging()
    cudnn, flash, efficient = attention.BACKENDS
    trials = {
        cudnn: Trial(cudnn, 0.001, 1300.0),
        flash: Trial(flash, 0.003, 0.002),
        efficient: Trial(efficient, 0.004, 0.001),
    }
    monkeypatch.setattr(attention, "_try_backend", lambda layer, backend, *shape: trials[backend])
    assert choose_attention(fused, 2, 20) is flash
    printed = capsys.readouterr().out
    assert "attention: cudnn_attention 1.00 ms, error 1300.0000: not used, its gradients differ" in printed
    assert "attention | flash_attention 3.00 ms, error 0.0020 | efficient_attention 4.00 ms" in printed
    trials[cudnn] = trials[cudnn]._replace(error=0.002)
    assert choose_attention(fused, 2, 20) is cudnn
    trials.update(dict.fromkeys(trials))
    assert choose_attention(fused, 2, 20) is None


def test_a_back_end_that_is_not_for_this_device_is_passed_over(fused):
    assert attention._try_backend(fused[0], SDPBackend.CUDNN_ATTENTION, 1, 20) is None


def test_the_layers_train_with_the_back_end_that_was_chosen(tiny, tmp_path, simulated_gpu):
    """On a CPU only mathematics and flash are there; a back end that is not fails, so it is asked for."""
    trainer = make_fused(tiny, tmp_path)
    layers = get_fused_layers(trainer.model.get_base_model().model.language_model.layers)
    layers[0].kernels.attention = SDPBackend.MATH
    trainer.train()
    layers[0].kernels.attention = SDPBackend.CUDNN_ATTENTION
    with pytest.raises(RuntimeError, match="No viable backend|No available kernel"):
        trainer.train()
    assert torch.isfinite(torch.tensor(trainer.step_checks.metrics["loss"]))
