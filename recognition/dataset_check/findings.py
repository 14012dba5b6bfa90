"""What a check found: facts for the record, and findings that a person should act on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ERROR, WARNING = "error", "warning"


@dataclass(frozen=True)
class Finding:
    """Something that would spoil a training run (error) or may (warning)."""

    severity: str  # ERROR or WARNING
    check: str  # which check speaks, in two words
    seen: str  # what was measured
    meaning: str  # what it most likely means
    remedy: str  # what to do

    def line(self) -> str:
        """All of it on one line."""
        return f"{self.check}: {self.seen}; most likely {self.meaning}; {self.remedy}"


@dataclass
class Outcome:
    """What one check, or several, give."""

    facts: dict[str, Any] = field(default_factory=dict)  # ready for JSON
    findings: list[Finding] = field(default_factory=list)

    def error(self, check: str, seen: str, meaning: str, remedy: str) -> None:
        """Add an error."""
        self.findings.append(Finding(ERROR, check, seen, meaning, remedy))

    def warning(self, check: str, seen: str, meaning: str, remedy: str) -> None:
        """Add a warning."""
        self.findings.append(Finding(WARNING, check, seen, meaning, remedy))

    def take(self, other: Outcome) -> None:
        """Add what another check gave."""
        self.facts.update(other.facts)
        self.findings += other.findings
