"""Forward KL divergence between two models' next-token distributions, without keeping either's logits."""

import torch
import torch.nn.functional as F

CHUNK = 2048


def _chunk(student: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
  """KL(teacher || student) per token [n], and its gradient on the student's hidden state [n, hidden] float32."""
  log_s = F.log_softmax(F.linear(student, head).float(), -1)
  log_t = F.log_softmax(F.linear(teacher, head).float(), -1)
  p_t = log_t.exp()
  kl = (p_t * (log_t - log_s)).sum(-1)
  return kl, F.linear((log_s.exp() - p_t).to(head.dtype), head.t()).float()


class _ForwardKL(torch.autograd.Function):
  @staticmethod
  def forward(ctx, student, teacher, head, chunk_fn):
    parts = [chunk_fn(s, t, head) for s, t in zip(student.split(CHUNK), teacher.split(CHUNK))]
    kl = torch.cat([p[0] for p in parts])
    ctx.save_for_backward(torch.cat([p[1] for p in parts]))
    ctx.dtype = student.dtype
    return kl.mean()

  @staticmethod
  def backward(ctx, upstream):
    gradient, = ctx.saved_tensors
    return (upstream / gradient.shape[0] * gradient).to(ctx.dtype), None, None, None


_compiled_chunk = None


def forward_kl(student: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
  """Mean over tokens of KL(teacher || student), nats. Hidden states [n, hidden] after the final norm; head frozen."""
  global _compiled_chunk
  fn = _chunk
  if student.is_cuda:
    _compiled_chunk = _compiled_chunk or torch.compile(_chunk)
    fn = _compiled_chunk
  return _ForwardKL.apply(student, teacher.detach(), head, fn)
