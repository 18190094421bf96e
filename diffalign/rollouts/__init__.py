"""Sampling inside training: how a student samples (`Policy`), samples under way (`Walk`), and what is kept of them
for a round of updates (`Rollouts`).

How samples live in the trainer (DESIGN 2): a training step of an online method is a *round*. Its phase says
``batch="round"``: one fresh batch of prompts serves all repeats of the phase. Before the first of them the trainer asks
``Method.collect`` for the prompts' samples; each update then takes its part of them. What is left at the end of a round
is thrown away. So a checkpoint, which is written between steps, holds no samples; a run that is killed in the middle of
a rollout starts the round again from the last checkpoint and, since every draw is keyed, makes the same samples bit for
bit. No method counts iterations, and the trainer knows no method.
"""

from .buffer import Rollouts, deal
from .policy import FLOWS, Policy, few_steps, many_steps
from .walk import Taken, Walk, whole_picture

__all__ = ["FLOWS", "Policy", "Rollouts", "Taken", "Walk", "deal", "few_steps", "many_steps", "whole_picture"]
