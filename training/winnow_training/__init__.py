"""DMS retrofit of a decoder-only language model by logit distillation."""
