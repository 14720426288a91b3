import pytest
import torch

from winnow_training import attention


def inputs(length, seed=0, dim=16):
  g = torch.Generator().manual_seed(seed)
  q = torch.randn(1, 4, length, dim, generator=g, requires_grad=True)
  k = torch.randn(1, 2, length, dim, generator=g, requires_grad=True)
  v = torch.randn(1, 2, length, dim, generator=g, requires_grad=True)
  return q, k, v


def test_masked_follows_the_definition():
  q, k, v = inputs(12)
  bias, window = torch.randn(1, 2, 12), 3
  out = attention.masked(q, k, v, bias, window)
  for head in range(4):
    for i in range(12):
      scores = torch.stack([q[0, head, i] @ k[0, head // 2, j] / 4 + (bias[0, head // 2, j] if i - j > window else 0)
                            for j in range(i + 1)])
      expected = scores.softmax(0) @ v[0, head // 2, :i + 1]
      torch.testing.assert_close(out[0, head, i], expected, rtol=1e-4, atol=1e-5)


def biases(length, keep):
  g = torch.Generator().manual_seed(1)
  kept = torch.rand(1, 2, length, generator=g) < keep
  return torch.where(kept, -torch.rand(1, 2, length, generator=g) * 3, -40.0)


@pytest.mark.parametrize("window", [5, 127, 128, 300])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.7, 1.0])
def test_compact_equals_masked(window, keep):
  length = 4 * attention.BLOCK
  bias = biases(length, keep)
  near = attention.window_mask(length, window, torch.device("cpu"))
  with torch.no_grad():
    q, k, v = (t.detach() for t in inputs(length, seed=window))
    expected = attention.masked(q, k, v, bias, window)
    torch.testing.assert_close(attention.compact(q, k, v, bias, window, near), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flex_attention has no backward on a CPU")
@pytest.mark.parametrize("window", [5, 128, 300])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.7, 1.0])
def test_compact_gradients_equal_masked_gradients(window, keep):
  length, dim = 8 * attention.BLOCK, 64
  q, k, v = (t.detach().cuda().requires_grad_() for t in inputs(length, seed=window, dim=dim))
  bias = biases(length, keep).cuda().requires_grad_()
  weight = torch.randn(1, 4, length, dim, device="cuda")
  near = attention.window_mask(length, window, torch.device("cuda"))

  expected = attention.masked(q, k, v, bias, window)
  expected_grads = torch.autograd.grad((expected * weight).sum(), (q, k, v, bias))
  low = [t.bfloat16() for t in (q, k, v)]
  out = torch.compile(attention.compact)(*low, bias, window, near)
  grads = torch.autograd.grad((out.float() * weight).sum(), (q, k, v, bias))
  for got, want in zip((out.float(), *grads), (expected, *expected_grads)):
    assert torch.isfinite(got).all()
    error = (got - want).norm() / want.norm().clamp(min=1e-3)
    assert error < 0.02, error.item()


def test_far_mask_visits_every_needed_block_and_skips_the_rest():
  length, window = 8 * attention.BLOCK, 200
  g = torch.Generator().manual_seed(3)
  bias = torch.where(torch.rand(1, 2, length, generator=g) < torch.tensor([0.05, 0.5])[None, :, None], 0.0, -40.0)
  order = attention._survivors(bias)
  mask = attention._far_mask(order, window, group=2)
  for head in range(4):
    slots = order[0, head // 2]
    visible = torch.arange(length)[:, None] - slots[None, :] > window
    needed = visible.view(8, attention.BLOCK, 8, attention.BLOCK).any(3).any(1)
    for i in range(8):
      visited = mask.kv_indices[0, head, i, :mask.kv_num_blocks[0, head, i]].tolist()
      assert visited == needed[i].nonzero().flatten().tolist()
    for j in range(8):
      visited = mask.q_indices[0, head, j, :mask.q_num_blocks[0, head, j]].tolist()
      assert visited == needed[:, j].nonzero().flatten().tolist()
