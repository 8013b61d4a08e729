"""Engines turn a plan into a model that is ready for the one training loop.

Each is a module with four functions: `load_model(spec, plan, model)` gives the `peft.PeftModel`,
`wire(trainer, spec, plan)` gives the trainer what the engine computes in its own way, `read_back(trainer)`
tells what really ran, and `shortfalls(used)` says where that is less than the engine can do.
"""

from __future__ import annotations

from types import ModuleType

from shared.plan import Plan


def engine_of(plan: Plan) -> ModuleType:
    """The engine that the plan names. One a process: importing Unsloth patches TRL and transformers."""
    if plan.engine == "unsloth":
        from worker.training.engines import unsloth

        return unsloth
    if plan.engine == "compiled":
        from worker.training.engines import compiled

        return compiled
    from worker.training.engines import reference

    return reference
