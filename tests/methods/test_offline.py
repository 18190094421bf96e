"""InPO, SmPO, Inversion-DPO, DSPO, ORPO: hand-worked values (offline sheet, sections 4 to 7, 11 and 18), identities."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from small import settings, write_pairs
from tiny import SD_SCHEDULE
from torch import Tensor
from world import batch_of, make_context, make_roles, make_trainer, warm

from diffalign import load_recipe, train
from diffalign.data.batch import Batch
from diffalign.denoiser import Denoiser, reached
from diffalign.errors import UserError
from diffalign.methods import make_method
from diffalign.methods.pair import PairErrors, PairMethod
from diffalign.methods.preference.dpo import dpo_loss
from diffalign.methods.preference.dspo import DSPOErrors, dspo_loss
from diffalign.methods.preference.orpo import log_odds, orpo_loss
from diffalign.methods.preference.smpo import PICKSCORE_RANGE, preference_probability, smpo_loss
from diffalign.plan import make_plan
from diffalign.setup import make_method_of
from diffalign.trainer import Trainer


def t64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


V1 = (t64(0.100), t64(0.120), t64(0.101), t64(0.119))


def metrics(trainer: Trainer, batch: Batch | None = None) -> dict[str, Tensor]:
    with torch.no_grad():
        method = trainer.method
        return method.loss(trainer.ctx, batch or batch_of(trainer), method.phases[0]).metrics


class Constant:
    """A network that says one thing, whatever it is shown; remembers the times it was told."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.told = value, []

    def __call__(self, role: str, x: Tensor, t: Tensor, cond: Any, guidance: float = 1.0) -> Tensor:
        self.told.append(t.tolist())
        return self.value.expand_as(x)


# ---- SmPO ---------------------------------------------------------------------------------------------------------


def test_smpo_golden_values() -> None:
    expected = {0.5: 0.6931471806, 0.55: 0.1269280110, 0.6: 0.0181499279}
    for p, value in expected.items():
        assert smpo_loss(*V1, t64(p))[0].item() == pytest.approx(value, abs=1e-9)
    assert smpo_loss(*V1, t64(1.0))[0].item() == pytest.approx(2.0612e-9, rel=1e-4)
    p = preference_probability(t64(0.21), t64(0.20), *PICKSCORE_RANGE)
    assert p.item() == pytest.approx(0.5150032585, abs=1e-9)
    assert 10 * (2 * p.item() - 1) == pytest.approx(0.3000651701, abs=1e-9)
    gaps = {0.005: 0.5075, 0.02: 0.5300, 0.05: 0.5745}
    for gap, p in gaps.items():
        assert preference_probability(t64(0.2 + gap), t64(0.2), *PICKSCORE_RANGE).item() == pytest.approx(p, abs=5e-5)


def test_smpo_identities() -> None:
    m_w, m_l, r_w, r_l = V1
    swapped = (m_l, m_w, r_l, r_w)
    torch.testing.assert_close(smpo_loss(*V1, t64(0.6))[0], smpo_loss(*swapped, t64(0.4))[0])  # (c)
    torch.testing.assert_close(smpo_loss(*V1, t64(0.55))[0], dpo_loss(*V1, 2000)[0])  # (b)
    torch.testing.assert_close(smpo_loss(*V1, t64(1.0), gamma=1)[0], dpo_loss(*V1, 2000)[0])
    shifted = preference_probability(t64(0.31), t64(0.30), *PICKSCORE_RANGE)
    torch.testing.assert_close(shifted, preference_probability(t64(0.21), t64(0.20), *PICKSCORE_RANGE))  # (g)
    grads = []
    for gamma in (1.0, None):  # (d): at u = 0 the gradient is that of the label-smoothed mixture
        m = t64(0.1).requires_grad_()
        if gamma:
            loss = smpo_loss(m, t64(0.1), t64(0.1), t64(0.1), t64(0.7), 100, gamma)[0]
        else:
            loss = 0.7 * dpo_loss(m, t64(0.1), t64(0.1), t64(0.1), 100)[0]
            loss = loss + 0.3 * dpo_loss(t64(0.1), m, t64(0.1), t64(0.1), 100)[0]
        loss.sum().backward()
        grads.append(m.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_smpo_takes_each_pairs_own_scores() -> None:
    trainer = warm(make_trainer(make_method("smpo", {"beta": 20.0, "score_range": [-4.0, 4.0]})))
    batch = batch_of(trainer)
    found = metrics(trainer, batch)
    plain = -0.5 * 20.0 * 10.0 * -found["margin"]
    columns = batch.columns
    p = torch.sigmoid((columns["chosen_score"] - columns["rejected_score"]) / 8)
    torch.testing.assert_close(found["logit"], plain * (2 * p - 1), rtol=1e-4, atol=1e-5)
    columns["chosen_score"], columns["rejected_score"] = columns["rejected_score"], columns["chosen_score"]
    torch.testing.assert_close(metrics(trainer, batch)["logit"], -found["logit"])


def test_smpo_fits_its_range_to_the_data() -> None:
    method = make_method("smpo", {"score_range": "fit"})
    method.fit({"chosen_score": t64(3, 9, 5), "rejected_score": t64(2, 4, 1)})
    errors = PairErrors(*(v.expand(1) for v in V1), columns={"chosen_score": t64(9), "rejected_score": t64(1)})
    p = torch.sigmoid(t64(1.0))
    torch.testing.assert_close(method.objective(errors)[0], smpo_loss(*V1, p)[0])
    with pytest.raises(UserError, match="every score is 2"):
        method.fit({"chosen_score": t64(2, 2), "rejected_score": t64(2, 2)})
    with pytest.raises(ValidationError, match="two numbers that rise"):
        make_method("smpo", {"score_range": [1.0, 0.0]})


# ---- inversion ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "rows"),
    [
        (10, {0: (1, 1), 2: (101, 2), 101: (101, 2), 102: (201, 3), 402: (501, 6), 802: (901, 10), 999: (901, 10)}),
        (5, {0: (1, 1), 2: (201, 2), 402: (601, 4), 802: (801, 5)}),
    ],
)
def test_the_authors_grid(steps: int, rows: dict[int, tuple[int, int]]) -> None:
    """V17 and V19."""
    method = make_method("inpo", {"levels": "authors", "inversion_steps": steps})
    levels, mask, told = method.grid(make_context(make_roles()), torch.tensor(list(rows)))
    assert reached(levels, mask).tolist() == [level for level, _ in rows.values()]
    assert mask.sum(1).tolist() == [count for _, count in rows.values()]
    assert told is not None and told[0].item() == 1 - 1000 // steps


def test_each_pair_is_inverted_to_its_own_time() -> None:
    """Constant predictor, eta 0: the exact inversion is forward noising with that constant, at the t that is told."""
    trainer = make_trainer(make_method("inpo", {"eta": 0.0}))
    batch = batch_of(trainer)
    constant = Constant(torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8))
    trainer.ctx.model = constant  # type: ignore[method-assign]
    noised = trainer.method.noise(trainer.ctx, batch)
    x0 = torch.cat([batch.latents["chosen"], batch.latents["rejected"]])
    assert len(set(noised.t[:4].tolist())) == 4 and torch.equal(noised.t[:4], noised.t[4:])
    eps = constant.value.expand_as(x0)
    torch.testing.assert_close(noised.x_t, trainer.ctx.denoiser.add_noise(x0, eps, noised.t), rtol=1e-4, atol=1e-4)
    # (B at the lowest t: rounding of x_t over a small sigma)
    torch.testing.assert_close(noised.target, eps, rtol=2e-3, atol=2e-3)
    for sample, t in enumerate(noised.t.tolist()):
        assert max(told[sample] for told in constant.told) == t  # the last call was told the level entered


def test_reconstruction_and_no_gradient_through_the_inversion() -> None:
    for role in ("policy", "base"):
        trainer = warm(make_trainer(make_method("inpo", {"inverter": role, "inversion_steps": 4})))
        trainer.roles.train_only(("student",))
        batch = batch_of(trainer)
        noised = trainer.method.noise(trainer.ctx, batch)
        assert not noised.x_t.requires_grad and not noised.target.requires_grad
        x0 = torch.cat([batch.latents["chosen"], batch.latents["rejected"]])
        denoiser = trainer.ctx.denoiser
        torch.testing.assert_close(  # (d)
            denoiser.add_noise(x0, noised.target, noised.t), noised.x_t, rtol=1e-4, atol=1e-4
        )
        again = trainer.method.noise(trainer.ctx, batch)
        assert torch.equal(noised.x_t, again.x_t)


def test_policy_and_base_invert_differently_once_trained() -> None:
    latents = []
    for role in ("policy", "base"):
        trainer = warm(make_trainer(make_method("dpo", {"beta": 100.0})), 3)
        method = make_method("inpo", {"inverter": role, "eta": 0.0})
        latents.append(method.noise(trainer.ctx, batch_of(trainer)).x_t)
    assert float((latents[0] - latents[1]).abs().max()) > 1e-4


def test_eta_adds_the_variance_of_the_step() -> None:
    """Against the std of DDIM between the two levels, over many samples and with a network that says zero."""
    method = make_method("inpo", {"levels": "authors", "inversion_steps": 1, "eta": 1.0})
    trainer = make_trainer(method)
    trainer.ctx.model = Constant(torch.zeros(1, 1, 8, 8))  # type: ignore[method-assign]
    batch = batch_of(trainer, [i % 12 for i in range(12)])
    x = method.noise(trainer.ctx, batch).x_t
    x0 = torch.cat([batch.latents["chosen"], batch.latents["rejected"]])
    denoiser = trainer.ctx.denoiser
    a1, a0 = denoiser.alphas_cumprod[1].item(), denoiser.alphas_cumprod[0].item()
    spread = (x - x0 * math.sqrt(a1 / a0)).std().item()
    assert spread == pytest.approx(math.sqrt((1 - a0) / (1 - a1) * (1 - a1 / a0)), rel=0.05)
    winners, losers = (x - x0 * math.sqrt(a1 / a0)).chunk(2)
    assert abs(float((winners * losers).mean() / spread**2)) < 0.1  # independent


@pytest.mark.parametrize("name", ["inpo", "smpo"])
def test_inverted_methods_start_at_log_two(name: str) -> None:
    trainer = make_trainer(make_method(name, {"beta": 20.0, "inversion_steps": 3}))
    with torch.no_grad():
        loss = trainer.method.loss(trainer.ctx, batch_of(trainer), trainer.method.phases[0])
    torch.testing.assert_close(loss.values, torch.full((4,), math.log(2)), rtol=0, atol=1e-5)


def test_one_network_call_inverts_the_whole_batch() -> None:
    trainer = make_trainer(make_method("smpo", {"inversion_steps": 5}))
    calls: list[int] = []
    inner = trainer.ctx.roles.forward
    trainer.ctx.roles.forward = lambda unet, x, t, cond: (calls.append(len(x)), inner(unet, x, t, cond))[1]
    with torch.no_grad():
        trainer.method.loss(trainer.ctx, batch_of(trainer), trainer.method.phases[0])
    assert set(calls) == {8}
    assert len(calls) <= 2 + 2 * 6  # student and base once, and two estimates for each of at most 5 + 1 steps


# ---- Inversion-DPO ------------------------------------------------------------------------------------------------


def test_inversion_dpo_weights() -> None:
    """V16: k = 1 / (2 a_t)."""
    bars = make_context(make_roles()).denoiser.alphas_cumprod
    expected = {0: 0.5004254, 12: 0.5057454, 480: 1.6463930, 720: 7.0369362, 948: 59.2836374}
    for t, weight in expected.items():
        assert (1 / (2 * bars[t])).item() == pytest.approx(weight, rel=1e-6)


def test_inversion_dpo_path_form_by_hand() -> None:
    """Base and student that are off by a constant: d_i is that constant's square, the path is the base's."""
    trainer = make_trainer(make_method("inversion_dpo", {"form": "path", "inversion_steps": 4, "beta": 2.0}))
    batch = batch_of(trainer)
    offset = torch.cat([torch.full((4,), 0.3), torch.full((4,), 0.1)]).reshape(8, 1, 1, 1)
    seen: dict[str, list[Tensor]] = {"base": [], "student": []}

    def model(role: str, x: Tensor, t: Tensor, cond: Any, guidance: float) -> Tensor:
        assert guidance == 2.0
        seen[role].append(x.clone())
        return 0.1 * x + (offset if role == "student" else 0)

    trainer.ctx.model = model  # type: ignore[method-assign]
    found = metrics(trainer, batch)
    bars = trainer.ctx.denoiser.alphas_cumprod
    weights = [(1 / (2 * bars[t])).item() / 4 for t in (0, 250, 500, 750)]
    torch.testing.assert_close(found["chosen_error"], torch.full((4,), 0.09 * sum(weights)), rtol=1e-4, atol=1e-6)
    assert float(found["logit"][0]) == pytest.approx(-(0.09 - 0.01) * sum(weights), rel=1e-4)
    torch.testing.assert_close(seen["base"][0], seen["base"][1])  # (i): the first step goes from a_0 to a_0
    assert all(torch.equal(a, b) for a, b in zip(seen["base"], seen["student"], strict=True))
    released = make_method("inversion_dpo", {"form": "path", "inversion_steps": 4, "beta": 2.0, "sign": 1})
    with torch.no_grad():
        logit = released.loss(trainer.ctx, batch, released.phases[0]).metrics["logit"]
    torch.testing.assert_close(logit, -found["logit"])


def test_inversion_dpo_moves_from_the_start_only_in_the_target_form() -> None:
    sizes = {}
    for form in ("target", "path"):
        trainer = make_trainer(make_method("inversion_dpo", {"form": form, "inversion_steps": 3, "beta": 50.0}))
        trainer.roles.train_only(("student",))
        loss = trainer.method.loss(trainer.ctx, batch_of(trainer), trainer.method.phases[0])
        torch.testing.assert_close(loss.values.detach(), torch.full((4,), math.log(2)), rtol=0, atol=1e-4)
        loss.values.sum().backward()
        grads = [p.grad for p in trainer.roles.parameters("student") if p.grad is not None]
        sizes[form] = max(float(g.abs().max()) for g in grads)
    assert sizes["path"] == 0.0 and sizes["target"] > 1e-4
    with pytest.raises(ValidationError, match="sign=1 is the released"):
        make_method("inversion_dpo", {"sign": 1})
    with pytest.raises(ValidationError, match="safeguard has no form"):
        make_method("inversion_dpo", {"safeguard": 0.5})


def test_recomputed_path_gives_the_gradient_of_the_held_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffalign.methods.preference import inversion_dpo

    gradients = []
    for held in (False, True):
        if held:
            monkeypatch.setattr(inversion_dpo, "checkpoint", lambda f, *args, use_reentrant: f(*args))
        trainer = warm(make_trainer(make_method("inversion_dpo", {"inversion_steps": 3, "beta": 50.0})))
        trainer.roles.train_only(("student",))
        trainer.method.loss(trainer.ctx, batch_of(trainer), trainer.method.phases[0]).values.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.roles.parameters("student")]))
    torch.testing.assert_close(gradients[0], gradients[1])
    assert float(gradients[0].abs().max()) > 1e-4


def saved_bytes(trainer: Trainer) -> int:
    """Bytes that autograd keeps for the backward pass of one loss."""
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.nbytes), x)[1], lambda x: x):
        trainer.method.loss(trainer.ctx, batch_of(trainer), trainer.method.phases[0])
    return sum(sizes)


def test_memory_does_not_grow_with_the_path() -> None:
    held = {}
    for steps in (2, 8):
        trainer = make_trainer(make_method("inversion_dpo", {"inversion_steps": steps}))
        trainer.roles.train_only(("student",))
        held[steps] = saved_bytes(trainer)
    # a step keeps the point, its time and its goal for recomputation, not a network's activations
    assert held[8] - held[2] < 6 * 4 * 8 * 4 * 64 * 4


# ---- DSPO ---------------------------------------------------------------------------------------------------------


def dspo_case(*, student: Tensor, target: Tensor, base: Tensor) -> DSPOErrors:
    residual, reference = student - target, base - target
    square = residual.square().flatten(1).mean(1), reference.square().flatten(1).mean(1)
    drift = residual - reference
    (m_w, m_l), (r_w, r_l) = (s.chunk(2) for s in square)
    n = len(student) // 2
    cross = (residual * drift)[:n].flatten(1).mean(1)
    return DSPOErrors(m_w, m_l, r_w, r_l, cross=cross, drift=drift[:n].square().flatten(1).mean(1))


def test_dspo_is_the_square_it_is_written_from() -> None:
    torch.manual_seed(0)
    student, target, base = (torch.randn(6, 4, 2, 2, dtype=torch.float64) for _ in range(3))
    beta = 0.7
    loss, u = dspo_loss(dspo_case(student=student, target=target, base=base), beta)
    doubt = (1 - torch.sigmoid(u))[:, None, None, None]
    whole = ((student - target)[:3] - beta * doubt * (student - base)[:3]).square().mean((1, 2, 3))
    torch.testing.assert_close(loss, whole)


def test_dspo_identities() -> None:
    torch.manual_seed(0)
    base, target = (torch.randn(4, 4, 2, 2, dtype=torch.float64) for _ in range(2))
    for beta, slope in ((0.0, 1.0), (0.5, 0.75), (2.0, 0.0)):  # at th = ref: (1 - beta/2) times the SFT gradient
        student = base.clone().requires_grad_()
        loss, _ = dspo_loss(dspo_case(student=student, target=target, base=base), beta)
        sft = (base - target)[:2].square().mean((1, 2, 3))
        torch.testing.assert_close(loss.detach(), sft)
        loss.sum().backward()
        torch.testing.assert_close(student.grad[:2], slope * 2 * (base - target)[:2] / 16)
    student = base.clone().requires_grad_()
    case = dspo_case(student=student, target=target, base=base)
    loss, u = dspo_loss(case, 100.0, "sdxl")  # V13
    torch.testing.assert_close(loss.detach(), t64(0.25, 0.25))
    (slope,) = torch.autograd.grad(loss.sum(), u)
    torch.testing.assert_close(slope, t64(-0.25, -0.25))


def test_dspo_runs_its_own_errors() -> None:
    trainer = warm(make_trainer(make_method("dspo", {"beta": 1.0})))
    batch = batch_of(trainer)
    method = trainer.method
    assert isinstance(method, PairMethod)
    with torch.no_grad():
        noised = method.noise(trainer.ctx, batch)
        student, base = (method.residual(trainer.ctx, role, noised) for role in ("student", "base"))
        case = dspo_case(student=student, target=torch.zeros_like(student), base=base)
        expected, _ = dspo_loss(case, 1.0)
        loss = method.loss(trainer.ctx, batch, method.phases[0])
    torch.testing.assert_close(loss.values, expected, rtol=1e-4, atol=1e-6)


# ---- ORPO ---------------------------------------------------------------------------------------------------------


def test_orpo_golden_values() -> None:
    """V10, and the signs of section 4."""
    for chosen, rejected, value, grads in (
        (0.1, 0.1, 0.1693147181, (0.95, 0.05)),
        (0.1, 0.2, 0.1744396670, (0.9475021, 0.0524979)),
    ):
        m_w, m_l = t64(chosen).requires_grad_(), t64(rejected).requires_grad_()
        loss, _ = orpo_loss(m_w, m_l, 0.1, "released")
        loss.sum().backward()
        assert loss.item() == pytest.approx(value, abs=1e-9)
        assert (m_w.grad.item(), m_l.grad.item()) == pytest.approx(grads, abs=1e-6)
    m_w, m_l = t64(0.1).requires_grad_(), t64(0.1).requires_grad_()
    orpo_loss(m_w, m_l, 0.1)[0].sum().backward()
    assert (m_w.grad.item(), m_l.grad.item()) == pytest.approx((1.05, -0.05))
    assert orpo_loss(t64(0.2), t64(0.3), 0.0)[0].item() == pytest.approx(0.2)  # beta 0: SFT


def test_orpo_log_odds() -> None:
    p = torch.exp(-t64(0.05, 0.4, 2.0))
    torch.testing.assert_close(log_odds(t64(0.05, 0.4, 2.0)), torch.log(p / (1 - p)))
    large = torch.tensor([200.0], requires_grad=True)
    value = log_odds(large)
    value.sum().backward()
    assert value.item() == -200 and large.grad.item() == -1
    loss, logit = orpo_loss(t64(0.1), t64(0.3), 0.1, "odds")
    assert logit.item() > 0 and loss.item() < 0.1 + 0.1 * math.log(2)


def test_the_released_sign_comes_with_a_warning() -> None:
    assert make_method("orpo", {}).notes() == []
    assert "loser's error" in make_method("orpo", {"margin": "released"}).notes()[0]


# ---- from the command line's side -----------------------------------------------------------------------------------


def _split(given: list[str]) -> tuple[str, list[str]]:
    return given[0], given[1:]


def test_smpo_trains_on_scores_and_refuses_rows_without(tiny_model_folder: Path, tmp_path: Path) -> None:
    for scored in (True, False):
        data = write_pairs(tmp_path / f"pairs{scored}")
        table = data / "metadata.jsonl"
        rows = [json.loads(line) for line in table.read_text().splitlines()]
        for number, row in enumerate(rows):
            if scored or number:  # one row without
                row |= {"chosen_score": 2.0 + number, "rejected_score": 1.0}
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
        changes = {"method.name": "smpo", "method.score_range": "fit", "method.inversion_steps": 2, "train.steps": 2}
        recipe = load_recipe(*_split(settings(tiny_model_folder, data, tmp_path / f"run{scored}", **changes)))
        if scored:
            assert train(recipe, progress=False).step == 2
        else:
            recipe.data.cache_dir = str(tmp_path / "none")
            for use in (make_plan, train):
                with pytest.raises(
                    UserError,
                    match=r"needs chosen_score and rejected_score in every row; 1 of .*`diffalign pairs score`",
                ):
                    use(recipe)
            assert not list((tmp_path / "none").rglob("*.safetensors")), "refused before anything is encoded"


@pytest.mark.parametrize("name", ["inpo", "smpo", "inversion_dpo"])
def test_inversion_steps_must_fit_the_schedule(name: str, tmp_path: Path) -> None:
    """Refused before anything is encoded or written, by a plan too."""
    data, out, cache = write_pairs(tmp_path / "pairs", 2), tmp_path / "run", tmp_path / "cache"
    given = [f"method.name={name}", f"data.path={data}", f"data.cache_dir={cache}", f"output.dir={out}"]
    if name == "smpo":  # its rows need scores, and are looked at first
        table = data / "metadata.jsonl"
        rows = [
            json.loads(line) | {"chosen_score": 0.25 + k / 100, "rejected_score": 0.15}
            for k, line in enumerate(table.read_text().splitlines())
        ]
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for steps, hint in ((600, "of which it covers 600; take 1000"), (400, "of which it covers 800; take 500")):
        recipe = load_recipe("tiny/dpo", [*given, f"method.inversion_steps={steps}"])
        for use in (make_plan, train):
            with pytest.raises(UserError, match=hint):
                use(recipe)
    with pytest.raises(UserError, match="inversion_steps"):
        make_method_of(load_recipe("tiny/dpo", [*given, "method.inversion_steps=1001"]))
    assert not out.exists() and not cache.exists()
    for steps in (5, 10, 40, 80):  # the authors'
        make_method(name, {"inversion_steps": steps}).check(make_context(make_roles()).denoiser)


@pytest.mark.parametrize("name", ["inpo", "smpo", "inversion_dpo", "dspo", "mapo", "orpo"])
def test_a_v_network_is_trained_as_the_eps_network_that_it_is(name: str) -> None:
    """One network in both forms: with errors in noise the numbers are the same, inversions included."""
    own = {"inversion_dpo": {"inversion_steps": 3}, "smpo": {"score_range": [-4.0, 4.0]}}.get(name, {})
    method = make_method(name, {"beta": 20.0, "error_space": "epsilon", **own})
    found = []
    for kind in ("epsilon", "v_prediction"):
        trainer = make_trainer(method)
        denoiser = trainer.ctx.denoiser = Denoiser.from_config({**SD_SCHEDULE, "prediction_type": kind})

        def model(
            role: str, x: Tensor, t: Tensor, cond: Any, guidance: float = 1.0, denoiser: Denoiser = denoiser
        ) -> Any:
            eps = (0.3 if role == "base" else 0.25) * x + 0.1 * torch.roll(x, 1, 0) * (t / 1000).reshape(-1, 1, 1, 1)
            return denoiser.from_eps(eps, x, t)

        trainer.ctx.model = model  # type: ignore[method-assign]
        found.append(metrics(trainer))
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=2e-3, atol=1e-4, msg=key)
    assert float(found[0]["logit"].abs().max()) > 1e-3
