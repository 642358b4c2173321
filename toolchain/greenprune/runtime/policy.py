"""Policy: how far a session may trust its aggressive network; the dial of the manifest, turned
(device side)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from greenprune.errors import BundleError
from greenprune.runtime.budget import BudgetController
from greenprune.runtime.checks import finite
from greenprune.runtime.drift import Reference

if TYPE_CHECKING:
    from greenprune.bundle import DialRow, Manifest

Route = Literal["aggressive", "mild", "dense"]
ROUTES: tuple[Route, ...] = get_args(Route)
ANY_LOSS = 1.0


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What a session may do. ``Policy()`` is the row that the bundle starts with.

    Raises:
        BundleError: values that are impossible or exclude each other.
    """

    max_accuracy_loss: float | None = None
    """Take the row certified for at most this loss against the certificate's reference, as a
    fraction: 0.01 is one point."""
    energy_budget_mj: float | None = None
    """Keep the mean energy of a sample here by moving among the certified rows (those within
    ``max_accuracy_loss``, where both are given) and accepting nothing."""
    route: Route | None = None
    """One network answers everything; nothing is certified, and faults of it are raised."""
    threshold: float | None = None
    """Accept where ``score >= threshold``."""
    allow_uncertified: bool = False
    """Allow rows and thresholds that no certificate covers here."""

    def __post_init__(self) -> None:
        named = ("max_accuracy_loss", "energy_budget_mj", "threshold")
        for name in named:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, finite(f"policy: {name}", value))
        if self.max_accuracy_loss is not None and not 0 < self.max_accuracy_loss < 1:
            raise BundleError(
                f"policy: max_accuracy_loss = {self.max_accuracy_loss}: expected a fraction "
                "between 0 and 1; one point is 0.01"
            )
        if self.energy_budget_mj is not None and self.energy_budget_mj <= 0:
            raise BundleError(
                f"policy: energy_budget_mj = {self.energy_budget_mj}: expected more than 0"
            )
        if self.route is not None and self.route not in ROUTES:
            raise BundleError(
                f"policy: route = {self.route!r}: expected None or one of {', '.join(ROUTES)}"
            )
        if not isinstance(self.allow_uncertified, bool):
            found = f"allow_uncertified = {self.allow_uncertified!r:.60}"
            raise BundleError(f"policy: {found}: expected True or False")
        asked = [name for name in (*named, "route") if getattr(self, name) is not None]
        if len(asked) > 1 and set(asked) != {"max_accuracy_loss", "energy_budget_mj"}:
            raise BundleError(
                f"policy: {' and '.join(asked)} exclude each other; expected one of them "
                "(max_accuracy_loss and energy_budget_mj go together)"
            )


@dataclass(frozen=True, kw_only=True)
class Point:
    """One way to route a call: accept where ``score >= threshold``; None accepts nothing."""

    threshold: float | None
    certified: bool
    coverage: float = 0.0
    """Share of the certification samples that it accepts."""
    reference: Reference | None = None
    """What the certificate saw at this threshold; None where nobody looked."""


NOTHING = Point(threshold=None, certified=False)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A policy worked out for one bundle on one runtime; replaced as a whole, never changed."""

    policy: Policy
    route: Route | None = None
    points: tuple[Point, ...] = ()
    """One, or those that the controller moves among."""
    controller: BudgetController | None = None

    def point(self) -> Point:
        """The point for the next call; it depends on earlier calls alone."""
        if not self.points:
            return NOTHING
        return self.points[self.controller.choice if self.controller else 0]


def make_plan(policy: Policy, manifest: Manifest, runtime: str) -> Plan:
    """Work a policy out.

    Raises:
        BundleError: the dial has no row for it; the message lists the rows. Or the budget is below
            all that certified rows can reach, or the bundle has no measured energy for it.
    """
    if policy.route is not None:
        return Plan(policy=policy, route=policy.route)
    if policy.energy_budget_mj is not None:
        return _budget_plan(policy, policy.energy_budget_mj, manifest, runtime)
    if policy.max_accuracy_loss is not None:
        loss = policy.max_accuracy_loss
        row = _row_for(policy, loss, manifest, runtime)
        return Plan(policy=policy, points=(_point(row.threshold, loss, manifest, runtime),))
    if policy.threshold is None:
        loss, threshold = manifest.certification.operating_loss, manifest.selector.threshold
        return Plan(policy=policy, points=(_point(threshold, loss, manifest, runtime),))
    point = _point(policy.threshold, ANY_LOSS, manifest, runtime)
    if not (point.certified or policy.allow_uncertified):
        raise BundleError(
            f"policy: threshold = {policy.threshold} is not certified for "
            f"{manifest.setting(runtime)}; expected that of a certified row, or "
            f"allow_uncertified=True; "
            f"{_list_rows(manifest, runtime)}"
        )
    return Plan(policy=policy, points=(point,))


def energies_mj(manifest: Manifest, runtime: str) -> dict[str, float]:
    """Energy of one inference by variant, in mJ; empty where it was not measured: it is known for
    the bundle's own runtime alone."""
    if runtime != manifest.runtime:
        return {}
    return {
        variant: float(found["value"])
        for variant, found in manifest.energy_mj.items()
        if variant in manifest.variants and found.get("value") is not None
    }


def provenance(manifest: Manifest) -> str:
    """Where the energies come from, and whether the measurement's verdict doubts them."""
    told = manifest.energy_mj.values()
    kinds = ", ".join(sorted({str(found["provenance"]) for found in told}))
    return kinds if all(found.get("valid", True) for found in told) else f"{kinds}, not valid"


def dial(manifest: Manifest, runtime: str) -> tuple[DialRow, ...]:
    """The rows of the manifest; certified are those whose certificate holds on ``runtime``."""
    record = manifest.selector
    if _holds_here(manifest, runtime):
        return record.table
    elsewhere = f"certified on {record.certified_on or 'no device yet'} only"
    if record.certified_on == manifest.setting(runtime):
        elsewhere += ", and this machine is another"
    return tuple(
        replace(row, certified=False, reason=elsewhere) if row.certified else row
        for row in record.table
    )


def _holds_here(manifest: Manifest, runtime: str) -> bool:
    """Whether the certificate was made on a machine like this one, for these answers."""
    from greenprune import registry

    alike = manifest.selector.certified_on == manifest.setting(runtime)
    return alike and registry.load_target(manifest.target).is_here()


def _certified_rows(manifest: Manifest, runtime: str) -> list[DialRow]:
    """The rows whose certificate holds here, strict to loose."""
    rows = [row for row in dial(manifest, runtime) if row.certified]
    return sorted(rows, key=lambda row: row.max_accuracy_loss)


def _point(threshold: float | None, loss: float, manifest: Manifest, runtime: str) -> Point:
    """The point of a threshold, with what the dial knows of it; certified for at most ``loss``."""
    rows = _certified_rows(manifest, runtime)
    certified = [row for row in rows if row.max_accuracy_loss <= loss]
    if threshold is None:
        # The certificate's walk tests accepting nothing before all thresholds.
        return Point(threshold=None, certified=bool(certified))
    known = next((row for row in manifest.selector.table if row.threshold == threshold), None)
    return Point(
        threshold=threshold,
        certified=any(row.threshold == threshold for row in certified),
        coverage=known.coverage if known else 0.0,
        reference=Reference.of_row(known) if known and _holds_here(manifest, runtime) else None,
    )


def _row_for(policy: Policy, loss: float, manifest: Manifest, runtime: str) -> DialRow:
    rows = _certified_rows(manifest, runtime)
    if policy.allow_uncertified:
        rows += [row for row in manifest.selector.table if row.threshold is not None]
    fitting = [row for row in rows if row.max_accuracy_loss <= loss]
    if not fitting:
        kind = "with a threshold" if policy.allow_uncertified else "that is certified"
        raise BundleError(
            f"policy: expected a row of the dial {kind} for a loss of at most "
            f"{loss * 100:.2f} points on {manifest.setting(runtime)}, found none; "
            f"{_list_rows(manifest, runtime)}"
        )
    return max(fitting, key=lambda row: row.max_accuracy_loss)


def _budget_plan(policy: Policy, budget_mj: float, manifest: Manifest, runtime: str) -> Plan:
    energies = energies_mj(manifest, runtime)
    if "mild" not in energies or "aggressive" not in energies:
        raise BundleError(
            f"policy: energy_budget_mj needs the energy of mild and aggressive on '{runtime}'; "
            f"this bundle has {', '.join(energies) or 'none'}; measure it with greenprune-bench"
        )
    if policy.allow_uncertified:
        raise BundleError(
            "policy: energy_budget_mj moves among certified rows only; expected it without "
            "allow_uncertified"
        )
    loss = ANY_LOSS
    if policy.max_accuracy_loss is not None:
        loss = _row_for(policy, policy.max_accuracy_loss, manifest, runtime).max_accuracy_loss
    thresholds = [
        row.threshold
        for row in _certified_rows(manifest, runtime)
        if row.threshold is not None and row.max_accuracy_loss <= loss
    ]
    points = [_point(threshold, loss, manifest, runtime) for threshold in (None, *thresholds)]
    controller = BudgetController(
        budget_mj=budget_mj,
        aggressive_mj=energies["aggressive"],
        mild_mj=energies["mild"],
        thresholds=[point.threshold for point in points],
        coverages=[point.coverage for point in points],
    )
    if controller.cheapest_mj > budget_mj:
        raise BundleError(
            f"policy: energy_budget_mj = {budget_mj}: out of reach; the certified rows reach down "
            f"to {controller.cheapest_mj:.4g} mJ a sample, mild alone takes "
            f"{energies['mild']:.4g} mJ; {_list_rows(manifest, runtime)}"
        )
    return Plan(policy=policy, points=tuple(points), controller=controller)


def _list_rows(manifest: Manifest, runtime: str) -> str:
    lines = [
        f"{row.max_accuracy_loss * 100:.2f} points: "
        + (
            f"certified, threshold {row.threshold}, accepts {row.coverage:.0%}"
            if row.certified
            else f"not certified ({row.reason})"
        )
        for row in dial(manifest, runtime)
    ]
    return f"the dial of '{manifest.name}' has: {'; '.join(lines) or 'no rows'}"
