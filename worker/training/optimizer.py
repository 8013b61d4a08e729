"""The 8-bit AdamW without a wait for the device behind each matrix."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch


class AdamW8bit(bitsandbytes.optim.AdamW):  # type: ignore[misc]
    """bitsandbytes' AdamW, whose own step waits for the GPU after every parameter.

    Its wait is for states that are paged to the host, which these are not. A LoRA on seven modules of 32
    layers has 448 matrices, and the GPU would idle between them.
    """

    initialized: bool

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # noqa: ARG002 - torch's signature
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        for group_number, group in enumerate(self.param_groups):
            for number, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.init_state(group, parameter, group_number, number)
                self.update_step(group, parameter, group_number, number)
