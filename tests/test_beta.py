"""--suggest-beta: the probe on tiny-sd, what it does not write, and whom it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command import diffalign
from small import settings, write_pairs

from diffalign.beta import WINNER_WORSE, _logits, _scales, _untied, refusal, suggest_beta
from diffalign.errors import UserError
from diffalign.eval.health import SUGGESTED, health
from diffalign.eval.training_report import Training
from diffalign.methods import make_method
from diffalign.methods.pair import PairErrors
from diffalign.recipe import load_recipe
from diffalign.setup import make_method_of


def errors() -> PairErrors:
    a = torch.tensor([0.10, 0.12, 0.30], requires_grad=True)
    b = torch.tensor([0.12, 0.11, 0.31], requires_grad=True)
    return PairErrors(a, b, torch.tensor([0.101, 0.119, 0.3]), torch.tensor([0.119, 0.112, 0.3]))


def test_the_untied_loss_starts_as_the_methods_own() -> None:
    """At Delta = 0 both have the gradient beta/4 (grad m_w - grad m_l); the untied one keeps it."""
    method = make_method("dpo", {"beta": 40.0})
    start = errors()
    start.base_chosen, start.base_rejected = start.chosen.detach().clone(), start.rejected.detach().clone()
    for found in (method, _untied(method)):
        values, logits = found.objective(start)
        slopes = torch.autograd.grad(values.sum(), [start.chosen, start.rejected])
        torch.testing.assert_close(torch.stack(slopes), torch.tensor([[10.0] * 3, [-10.0] * 3]))
        assert not logits.any()
    far = errors()
    values, logits = _untied(method).objective(far)
    assert torch.equal(logits, method.objective(far)[1])
    torch.testing.assert_close(torch.autograd.grad(values.sum(), far.chosen)[0], torch.full((3,), 10.0))


def test_logits_by_beta() -> None:
    method = make_method("dpo", {"beta": 40.0})
    with torch.no_grad():
        torch.testing.assert_close(_logits(method, errors(), 5000.0)[0], torch.tensor(5.0), rtol=1e-4, atol=0)  # V1
    assert _scales(method) and not _scales(make_method("mapo", {}))


def test_a_probe_of_the_tiny_world(tmp_path: Path) -> None:
    """A high learning rate shortens the way to the edge; the recipe's own gives 660 to 860 over three seeds."""
    out = tmp_path / "never"
    recipe = load_recipe("tiny/dpo", ["train.batch=4", "train.lr=1e-2", "validate.pairs=16", f"output.dir={out}"])
    said: list[str] = []
    found = suggest_beta(recipe, said.append)
    assert not out.exists() and any("probe step 8" in line for line in said)
    assert found.reached and found.looks[-1].damage >= WINNER_WORSE > 0
    assert 100 < found.suggested < 5000, found
    rows = {scale.beta: scale for scale in found.scales}
    assert rows[found.suggested].mean == pytest.approx(1, rel=0.1)
    assert [scale.beta for scale in found.scales] == sorted(rows) and found.recipe in rows
    low, high = found.scales[0], found.scales[-1]
    assert low.mean < 0.02 and low.saturated == 0 and high.mean > 50 and high.saturated > 0.5
    assert recipe.train.warmup == 20 and recipe.train.schedule == "linear", "the recipe is left as it was"
    assert json.loads(json.dumps(found.json()))["suggested"] == found.suggested


def test_methods_without_such_a_beta_are_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    _, *rest = settings(tiny_model_folder, write_pairs(tmp_path / "pairs"), tmp_path / "run", method__beta=None)
    for method in ("mapo", "sft"):
        with pytest.raises(UserError, match=f"method '{method}' has no beta"):
            suggest_beta(load_recipe(f"tiny/{method}", rest))
    for method in ("inpo", "smpo", "inversion_dpo", "dspo", "capo", "ppd"):
        with pytest.raises(UserError, match=f"method '{method}' has its own way to its errors"):
            suggest_beta(load_recipe(f"tiny/{method}", rest))
    assert not (tmp_path / "run").exists()


def test_advice_names_the_probe_where_it_is_taken() -> None:
    """What the report knows of methods, which it must not import, is what the probe says."""
    recipes = [f"tiny/{name}" for name in ("dpo", "dcpo", "pso", "inpo", "kto", "rankdpo", "orpo", "sft", "ppd")]
    taken = {recipe for recipe in recipes if not refusal(make_method_of(load_recipe(recipe)))}
    assert taken == {f"tiny/{name}" for name in SUGGESTED}
    overfull = [{"step": step, "kind": "validate", "accuracy": 0.5, "saturated": step / 100} for step in range(60)]
    advice = {name: health(overfull, {"name": name, "beta": 1.0}).advice for name in ("dpo", "kto")}
    assert advice == {"dpo": "lower method.beta (`--suggest-beta` names one)", "kto": "lower method.beta"}
    assert health(overfull, {"name": "plain"}).advice == "lower train.lr"
    assert Training(recipe="method: {name: dpo}").method == {"name": "dpo"}
    assert Training(recipe="method: [").method == {}, "a damaged file is no reason for a report to fail"


def test_the_command(tiny_model_folder: Path, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs")
    arguments = settings(tiny_model_folder, data, tmp_path / "run", validate__pairs=4)
    done = diffalign("train", *arguments, "--suggest-beta", "--json", "--quiet")
    found = json.loads(done.out)
    assert done.status == 0 and found["suggested"] > 0 and len(found["scales"]) >= 7 and found["method"] == "dpo"
    assert not (tmp_path / "run").exists()
