"""No int8 weight is off by more than half a step, and rows decode alone as they do together, a few at a time."""

import pytest
import torch

from medkit.quantization import rowwise
from medkit.quantization.rowwise import Int8Rows, Nf4Rows, QuantizedEmbedding, QuantizedLinear

ROWS, COLUMNS = 100, 128


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def weight(request):
    torch.manual_seed(0)
    matrix = torch.randn(ROWS, COLUMNS) * torch.logspace(-3, 3, ROWS)[:, None]  # rows of very different size
    matrix[7] = 0
    return matrix.to(request.param)


def make_rows(weight, scheme, double_quant):
    nf4 = scheme == "nf4"
    return Nf4Rows(rowwise.quantize_nf4(weight, double_quant), weight.dtype) if nf4 else Int8Rows.quantize(weight)


def test_no_int8_weight_is_off_by_more_than_half_a_step(weight):
    rows = Int8Rows.quantize(weight)
    step = weight.float().abs().amax(1, keepdim=True) / 127
    error = (rows.codes * rows.scale - weight.float()).abs()
    assert (error <= step / 2 * (1 + 1e-5)).all()
    assert rows.codes.dtype == torch.int8 and rows.codes.abs().max() == 127
    assert not rows.codes[7].any() and rows.scale.isfinite().all() and (rows.scale > 0).all()
    assert rows.codes.nbytes + rows.scale.nbytes == ROWS * COLUMNS + 4 * ROWS


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_rows_decode_alone_as_they_do_together(weight, scheme, double_quant):
    whole = rowwise.fake_quantize(weight, scheme, double_quant)
    embedding = QuantizedEmbedding(make_rows(weight, scheme, double_quant))
    ids = torch.tensor([[3, 99, 0], [3, 7, 50]])
    assert torch.equal(embedding(ids), whole[ids])
    assert embedding(ids).dtype == weight.dtype
    assert embedding(ids[:, :0]).shape == (2, 0, COLUMNS)


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
@pytest.mark.parametrize("rows_at_once", [1, 33, ROWS])
def test_a_linear_layer_decodes_no_more_than_its_chunk(monkeypatch, scheme, rows_at_once):
    torch.manual_seed(1)
    weight, bias, x = torch.randn(ROWS, COLUMNS), torch.randn(ROWS), torch.randn(2, 45, COLUMNS)  # 32, 32, 26
    layer = QuantizedLinear(make_rows(weight, scheme, True), bias)
    decoded, project = [], layer.rows.project
    monkeypatch.setattr(layer.rows, "project", lambda x, a, b: decoded.append(b - a) or project(x, a, b))
    monkeypatch.setattr(rowwise, "DECODED_BYTES", rows_at_once * COLUMNS * x.element_size())
    wanted = torch.nn.functional.linear(x, rowwise.fake_quantize(weight, scheme, True), bias)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-4)
    assert max(decoded) <= rows_at_once and sum(decoded) == ROWS
    torch.testing.assert_close(layer(x[0, 0]), wanted[0, 0], rtol=1e-5, atol=1e-4)
    assert layer(x[:, :0]).shape == (2, 0, ROWS)
