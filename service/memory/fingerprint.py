"""Encoder fingerprints: whether a memory fits the encoder that is loaded, and how the two differ."""

from __future__ import annotations

from core.encoders.protocol import Encoder
from service.domain.memory import (
    TenantRecord,
)
from service.errors import FingerprintMismatch


def check_fingerprint(record: TenantRecord, encoder: Encoder) -> None:
    """Return if a tenant's features were made with this encoder.

    Raises:
        FingerprintMismatch: they were not; says what differs and what to do.
    """
    differs = differences(record, encoder)
    if differs:
        raise FingerprintMismatch(
            f"The memory of {record.name!r} was {differs}. Serve with DMN_ENCODER="
            f"{record.origin.get('encoder', '...')}, or PUT /tenants/{record.name} again: shots whose images are kept "
            "are then read by this encoder, and the dynamic memory starts afresh."
        )


def differences(record: TenantRecord, encoder: Encoder) -> str:
    """Return in what the encoder that made a memory differs from this one, as the end of a sentence; or nothing."""
    if record.fingerprint == encoder.fingerprint:
        return ""
    made, own = record.origin, encoder.origin
    names = [name for name in own if made.get(name) != own[name]]
    return (
        f"made with the encoder {made.get('encoder', '(unknown)')} ({record.fingerprint[:12]}), and this service runs "
        f"{encoder.name} ({encoder.fingerprint[:12]}): {', '.join(names) or 'fingerprints'} differ"
    )


def origin_of(encoder: Encoder) -> dict[str, str]:
    """Return what a tenant's record says of where its features come from."""
    return {"encoder": encoder.name, **encoder.origin}
