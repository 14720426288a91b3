"""Forward KL divergence between two models' next-token distributions, without keeping either's logits."""

import torch
import torch.nn.functional as F

CHUNK = 2048


def _chunk(student: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor, labels: torch.Tensor | None,
           share: float) -> tuple[torch.Tensor, torch.Tensor]:
  """KL(teacher || student) per token [n], and the loss's gradient on the student's hidden state [n, hidden] float32.

  With labels [n], a share of what the student is taught is the label itself (none where it is negative).
  """
  log_s = F.log_softmax(F.linear(student, head).float(), -1)
  log_t = F.log_softmax(F.linear(teacher, head).float(), -1)
  p_t = log_t.exp()
  kl = (p_t * (log_t - log_s)).sum(-1)
  difference = log_s.exp() - p_t
  if labels is not None:
    own = (torch.arange(head.shape[0], device=labels.device) == labels[:, None]).float()
    difference = difference - share * torch.where(labels[:, None] >= 0, own - p_t, 0.0)
  return kl, F.linear(difference.to(head.dtype), head.t()).float()


class _ForwardKL(torch.autograd.Function):
  @staticmethod
  def forward(ctx, student, teacher, head, chunk_fn, weights, labels, share):
    cuts = range(0, len(student), CHUNK)
    cut = lambda x, i: None if x is None else x[i:i + CHUNK]
    parts = [chunk_fn(cut(student, i), cut(teacher, i), head, cut(labels, i), share) for i in cuts]
    kl, gradient = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    if weights is not None:
      kl, gradient = kl * weights, gradient * weights[:, None]
    ctx.save_for_backward(gradient)
    ctx.dtype = student.dtype
    return kl.mean()

  @staticmethod
  def backward(ctx, upstream):
    gradient, = ctx.saved_tensors
    return (upstream / gradient.shape[0] * gradient).to(ctx.dtype), *[None] * 6


_compiled_chunk = None


def forward_kl(student: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor, weights: torch.Tensor | None = None,
               labels: torch.Tensor | None = None, share: float = 0.0) -> torch.Tensor:
  """Mean over tokens of weights * KL(teacher || student), nats. Hidden states [n, hidden] after the final norm; head
  frozen. With `labels` its gradient is that of the cross-entropy against (1 - share) teacher + share label."""
  global _compiled_chunk
  fn = _chunk
  if student.is_cuda:
    _compiled_chunk = _compiled_chunk or torch.compile(_chunk)
    fn = _compiled_chunk
  return _ForwardKL.apply(student, teacher.detach(), head, fn, weights, labels if share else None, share)
